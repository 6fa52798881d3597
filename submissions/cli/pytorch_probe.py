"""Sees a PyTorch model through one training step: on the meta device, or on a small real batch where that fails."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.layers import Coverage
from algoperf_kfac.plan import Load
from algoperf_kfac.pytorch.capture import Capture
from algoperf_kfac.pytorch.discovery import RAW
from algoperf_kfac.pytorch.operations import LOOKUPS, RULES
from algoperf_kfac.pytorch.tied import TiedRecorder
from commands.errors import UserError
from submissions.cli.meta import on_meta
from submissions.cli.probe import Probe
from submissions.cli.references import line
from submissions.common.kfac.pytorch import make_optimizer

UNREAD = "no operation with a rule reads it"
PRODUCTS = frozenset({torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__})


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model to see.

    Attributes:
        build: makes the model.
        outputs: outputs of a training forward pass of the model on a batch of so many examples.
        batch_size: examples on one device.
        small_batch_size: examples of the real batch where the meta device does not do; None for all of them.
        segments: number of rows -> number of graphs they belong to, where rows are not examples.
        workload: what the submission is told of the model, if it belongs to a workload.
    """

    build: Callable[[], nn.Module]
    outputs: Callable[[nn.Module, int], Any]
    batch_size: int
    small_batch_size: int | None
    segments: Mapping[int, int] = dataclasses.field(default_factory=dict)
    workload: Any = None


def probe(subject: Subject, config: KFACConfig) -> Probe:
    """One statistics step of a submission on the model.

    Args:
        subject: the model.
        config: the submission's.

    Raises:
        UserError: the model runs neither on the meta device nor on a real batch.
    """
    return probe_optimizer(subject, lambda model: make_optimizer(model, config, subject.workload, seed=0))


def probe_optimizer(subject: Subject, make_optimizer: Callable[[nn.Module], Any]) -> Probe:
    """One statistics step of a K-FAC optimizer on the model.

    Args:
        subject: the model.
        make_optimizer: the optimizer for a model.

    Raises:
        UserError: the model runs neither on the meta device nor on a real batch.
    """
    try:
        with on_meta():
            return _step(subject, make_optimizer, subject.batch_size)
    except UserError:
        raise
    except Exception as error:
        reason = error
    size = min(subject.small_batch_size or subject.batch_size, subject.batch_size)
    try:
        seen = _step(subject, make_optimizer, size)
        if size < subject.batch_size:
            half = _step(subject, make_optimizer, size // 2) if size > 1 else None
            seen = _scaled(seen, size, half, subject.batch_size)
    except Exception as error:
        raise UserError(
            f"the model runs neither on the meta device ({line(reason)}) nor on a batch of {size} ({line(error)})"
        ) from error
    note = f"seen on a real batch of {size}"
    note += f", scaled to {subject.batch_size}" if size < subject.batch_size else ""
    return dataclasses.replace(seen, note=note)


def _scaled(seen: Probe, size: int, half: Probe | None, batch_size: int) -> Probe:
    """What a larger batch would show.

    Not all that is kept grows with the batch (masks over positions, matrices made from weights): bytes are taken on
    along the straight line through those of `size` and of half the size, or of no bytes without examples.
    """
    below = size // 2 if half is not None else 0

    def extended(bytes_at_size: float, bytes_below: float) -> float:
        return bytes_at_size + (bytes_at_size - bytes_below) * (batch_size - size) / (size - below)

    return dataclasses.replace(
        seen,
        loads={name: load.scaled(batch_size / size) for name, load in seen.loads.items()},
        activation_bytes=extended(seen.activation_bytes, half.activation_bytes if half else 0.0),
        capture_bytes=extended(seen.capture_bytes, half.capture_bytes if half else 0.0),
    )


def _step(subject: Subject, make_optimizer: Callable[[nn.Module], Any], batch_size: int) -> Probe:
    model = subject.build()
    model.train()
    optimizer = make_optimizer(model)
    names = {id(p): name for name, p in model.named_parameters()}
    recorder = _LoadRecorder(names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a layer that takes the fallback is in the table, with its reason
        with _saving(model) as plain:
            subject.outputs(model, batch_size)
        # Positions as the submissions give them, as far as memory goes.
        capture = optimizer.capture(positions="gradient", loss_normalizer=1.0)
        with recorder, _saving(model) as captured, capture:
            outputs = [t for t in tensors(subject.outputs(model, batch_size)) if t.requires_grad]
            if not outputs:
                raise ValueError("the model's outputs do not depend on its parameters")
            for tensor in _kept_inputs(capture):
                captured.add(tensor)
            torch.stack([t.sum() for t in outputs]).sum().backward()
    loads = {
        name: load.of_examples(subject.segments[int(load.examples)]) if load.examples in subject.segments else load
        for name, load in _with_lstms(recorder.loads, model, batch_size).items()
    }
    extra = max(captured.bytes - plain.bytes, 0)
    return Probe(_as_seen(optimizer.coverage()), optimizer.config, loads, float(plain.bytes), float(extra))


def _with_lstms(loads: dict[str, Load], model: nn.Module, batch_size: int) -> dict[str, Load]:
    """An LSTM shows the product with its inputs alone, on the rows of all sequences: the other one sees as many."""
    names = {id(p): name for name, p in model.named_parameters()}
    loads = dict(loads)
    for module in model.modules():
        if not isinstance(module, nn.LSTM):
            continue
        for key, weight in module.named_parameters(recurse=False):
            seen = loads.get(names[id(weight)]) if key.startswith("weight_ih") else None
            if seen is None:
                continue
            rows, hidden = seen.products, getattr(module, key.replace("_ih", "_hh"))
            spread = seen.of_examples(batch_size)
            loads[names[id(weight)]] = spread
            loads[names[id(hidden)]] = dataclasses.replace(spread, input_elements=rows * hidden.shape[1])
    return loads


def _as_seen(coverage: Coverage) -> Coverage:
    """After a statistics step it is known of raw parameters that no operation with a rule reads them."""
    return Coverage(
        coverage.layers,
        tuple(dataclasses.replace(f, reason=UNREAD) if f.reason == RAW else f for f in coverage.fallbacks),
    )


class _LoadRecorder(TorchFunctionMode):
    """Adds up what every weight sees."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.loads: dict[str, Load] = {}
        self._names = names

    def __torch_function__(
        self, func: Any, types: Any, args: Iterable[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if torch._C._current_graph_task_id() == -1:  # not again within the backward pass
            rule = RULES.get(func) or LOOKUPS.get(func)
            if rule is not None:
                operation = rule(*args, **kwargs)
                self._add(operation.kind, operation.input, output, operation.weight)
            elif func in PRODUCTS and not kwargs:
                for weight, input in (args, tuple(args)[::-1]):
                    if isinstance(weight, Tensor) and weight._is_view() and id(weight._base) in self._names:
                        self._add("linear", input, output, weight._base)  # a table as output layer
        return output

    def _add(self, kind: str, input: Tensor, output: Tensor, weight: Tensor | None) -> None:
        name = self._names.get(id(weight))
        if name is not None and weight is not None:
            load = _load(kind, input, output, weight)
            self.loads[name] = self.loads[name] + load if name in self.loads else load


def _load(kind: str, input: Tensor, output: Tensor, weight: Tensor) -> Load:
    """The load of one call, dimension 0 of the output running over examples."""
    kernel = 1
    if kind in ("conv", "conv_transpose"):
        kernel = weight.shape[2]
        dims = weight.dim() - 2
        examples = output.shape[0] if output.dim() == dims + 2 else 1
        positions = math.prod(output.shape[-dims:])
        products = examples * (positions if kind == "conv" else math.prod(input.shape[-dims:]))
    else:
        leading = output.shape[:-1]
        examples = leading[0] if leading else 1
        positions = math.prod(leading[1:])
        products = 0 if kind == "embedding" else examples * positions  # a lookup multiplies nothing
    return Load(examples, positions, products, input.numel(), output.numel(), kernel)


class _Saved(TorchFunctionMode):
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
        self._alive: list[Any] = []  # identities are only unique among storages that are alive
        self._paused = False

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._alive.append(storage)
            self.bytes += storage.nbytes()

    def pack(self, tensor: Tensor) -> Tensor:
        if not self._paused:
            self.add(tensor)
        return tensor

    def __torch_function__(
        self, func: Any, types: Any, args: Iterable[Any] = (), kwargs: Mapping[str, Any] | None = None
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


def _dropout(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, *, train: bool | None = None
) -> tuple[Tensor, float, bool, bool]:
    """The arguments of `F.dropout`, or of `torch.dropout`."""
    return input, p, training if train is None else train, inplace


@contextlib.contextmanager
def _saving(model: nn.Module) -> Iterator[_Saved]:
    saved = _Saved(model)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor), saved:
        yield saved


def _kept_inputs(capture: Capture) -> Iterator[Tensor]:
    """Inputs that a capture keeps until their gradients come, most of them kept by autograd as well."""
    for recorder in capture._recorders.values():
        for part in (recorder.output, recorder.lookups) if isinstance(recorder, TiedRecorder) else (recorder,):
            yield from (call.input for call in part.calls if call.input is not None)


def tensors(outputs: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and mappings."""
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, Mapping):
        outputs = list(outputs.values())
    if isinstance(outputs, list | tuple):
        for item in outputs:
            yield from tensors(item)
