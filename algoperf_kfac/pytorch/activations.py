"""What a PyTorch model keeps for its backward pass."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from algoperf_kfac.pytorch.operations import Function


class Saved(TorchFunctionMode):
    """Adds up what autograd keeps for the backward pass, each storage once and parameters not at all.

    A model seen on a CPU or the meta device keeps what it would on a GPU, except where the operation is another:

    - Dropout, unless in place, is fused there and keeps its mask as one byte per entry, not as a float.
    - An LSTM of cuDNN keeps the four gates, cell and hidden state of every step in its reserve, beside input and
      output (Appleyard et al. 2016, arXiv 1604.01946). The LSTM of a CPU keeps a workspace of oneDNN several times
      as large, the one of the meta device every intermediate result.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.bytes = 0
        self._seen = {p.untyped_storage()._cdata for p in model.parameters()}
        self._alive: list[torch.UntypedStorage] = []  # identities are only unique among storages that are alive
        self._paused = False

    def add(self, tensor: Tensor) -> None:
        for part in _parts(tensor):
            storage = part.untyped_storage()
            if storage._cdata not in self._seen:
                self._seen.add(storage._cdata)
                self._alive.append(storage)
                self.bytes += storage.nbytes()

    def pack(self, tensor: Tensor) -> Tensor:
        if not self._paused:
            self.add(tensor)
        return tensor

    def __torch_function__(
        self, func: Function, types: Any, args: Iterable[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        args, kwargs = list(args), kwargs or {}
        if func in (F.dropout, torch.dropout):
            x, rate, training, inplace = _dropout(*args, **kwargs)
            if training and not inplace and 0 < rate < 1:
                return torch.native_dropout(x, rate, training)[0]
        if func is not torch.lstm or kwargs or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        self._paused = True
        try:
            output = func(*args)
        finally:
            self._paused = False
        if output[0].requires_grad:
            self._add_lstm(args, output[0])
        return output

    def _add_lstm(self, args: list[Any], output: Tensor) -> None:
        data, packed = args[0], isinstance(args[1], Tensor)
        states, weights, _, num_layers, _, _, bidirectional = args[1 + packed : 8 + packed]
        for tensor in (data, *states, *weights, output):
            self.add(tensor)
        hidden = weights[0].shape[0] // 4
        rows = math.prod(data.shape[:-1])
        directions = num_layers * (2 if bidirectional else 1)
        self.bytes += 6 * rows * hidden * directions * data.element_size()
        if not all(isinstance(weight, nn.Parameter) for weight in weights):
            # cuDNN wants them in one piece; the module's own parameters already are.
            self.bytes += sum(weight.numel() * weight.element_size() for weight in weights)


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """What has storage of a tensor: itself, or indices and values of a sparse one."""
    if tensor.layout is torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return (tensor,)


def _dropout(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, *, train: bool | None = None
) -> tuple[Tensor, float, bool, bool]:
    """The arguments of `F.dropout`, or of `torch.dropout`."""
    return input, p, training if train is None else train, inplace


@contextlib.contextmanager
def saving(model: nn.Module) -> Iterator[Saved]:
    """Inside, what autograd keeps is counted."""
    saved = Saved(model)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor), saved:
        yield saved
