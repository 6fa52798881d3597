"""`nn.MultiheadAttention`, which calls one function of torch for everything between its inputs and its output.

Inside that function are ordinary linear layers: on statistics steps it runs as it is written, operation by
operation, with the same numbers. Queries, keys and values of one input are projected by the whole of
in_proj_weight: one layer, whose outputs are three and have blocks of B of their own. Of several inputs each is
projected by its part: a layer each.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algoperf_kfac.layers import RAW
from algoperf_kfac.pytorch.contractions import placed
from algoperf_kfac.pytorch.kinds._base import Found, Kind, Site, Watch
from algoperf_kfac.pytorch.operations import RULES, Called, Operation

if TYPE_CHECKING:
    from algoperf_kfac.pytorch.observer import Observer

FUSED = F.multi_head_attention_forward
PROJECTIONS = "in_proj_weight"
LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def unfused() -> Callable[..., Any]:
    """torch's own function without its first question, whether somebody is watching: it has been answered."""
    seen_inside = {**FUSED.__globals__, "has_torch_function": lambda tensors: False}
    function = types.FunctionType(FUSED.__code__, seen_inside, FUSED.__name__, FUSED.__defaults__)
    function.__kwdefaults__ = FUSED.__kwdefaults__
    return function


def sequence_first(model: nn.Module) -> set[str]:
    """Names of the parameters of torch's attention modules and Transformer layers that take (T, N, features)."""
    names: set[str] = set()
    for path, module in model.named_modules():
        attention = getattr(module, "self_attn", None) if isinstance(module, LAYERS) else module
        if isinstance(attention, nn.MultiheadAttention) and not attention.batch_first:
            names |= {name for name, _ in module.named_parameters(path, remove_duplicate=False)}
    return names


class Attention(Kind):
    """The projections of a `torch.nn.MultiheadAttention`."""

    def __init__(self) -> None:
        self._projections: set[str] = set()  # names of in_proj_weight
        self._batch_first: set[str] = set()  # names of out_proj.weight, of modules that take the batch first

    def cover(self, site: Site) -> Found | None:
        module = site.module
        if not isinstance(module, nn.MultiheadAttention):
            return None
        if PROJECTIONS in site.params:
            self._projections.add(site.name_of(site.params[PROJECTIONS]))
        if module.batch_first:
            self._batch_first.add(site.name_of(module.out_proj.weight))
        return Found([], RAW)  # which of the projections are one layer shows when it is called

    def output_splits(self, operation: Operation, names: Mapping[int, str]) -> dict[str, int]:
        name = names.get(id(operation.weight), "")
        if name not in self._projections:
            return {}
        parts = 3 * operation.shape[0] // len(operation.weight)
        return {name.rpartition(".")[0] or name: parts}

    def watch(self, observer: Observer) -> Watch:
        params = observer.layers.params
        return _AttentionWatch(observer, {id(params[name]) for name in self._batch_first if name in params})


class _AttentionWatch(Watch):
    """Runs the function as it is written, and tells its rows apart.

    Args:
        observer: of the capture.
        batch_first: identities of out_proj.weight, of modules that take the batch first.
    """

    def __init__(self, observer: Observer, batch_first: set[int]) -> None:
        self._observer, self._batch_first = observer, batch_first
        self._inside: tuple[int, int, bool, bool] | None = None

    def called(self, called: Called) -> Any:
        if called.func is FUSED and torch.is_grad_enabled():
            call = inspect.signature(FUSED).bind(*called.args, **called.kwargs).arguments
            query, batched = call["query"], call["query"].dim() == 3
            before = self._inside
            first = batched and id(call["out_proj_weight"]) in self._batch_first
            self._inside = (len(query), query.shape[1] if batched else 1, first, batched and not first)
            try:
                return self._observer.see(unfused(), *called.args, **called.kwargs)
            finally:
                self._inside = before
        if self._inside is not None and called.func is F.linear:
            operation = placed(RULES[F.linear](*called.args, **called.kwargs), self._observer.uses.views.of)
            if operation is not None:
                self._give_rows(operation, *self._inside)
                return self._observer.operation(operation, called.run())
        return NotImplemented

    @staticmethod
    def _give_rows(
        operation: Operation, steps: int, examples: int, batch_first: bool, sequence_first: bool
    ) -> None:
        """From (T, N, ...) or (T N, ...) to rows as the module has them, (N, T) where the batch is first.

        Without a module they are as the function takes them.
        """

        def arrange(t: Tensor) -> Tensor:
            t = t if t.dim() == 3 else t.unflatten(0, (steps, examples))
            return t.transpose(0, 1) if batch_first else t

        operation.input, operation.arrange = arrange(operation.input), arrange
        operation.sequence_first = sequence_first
