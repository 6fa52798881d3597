"""Hooks on gradients, where torch's own would not be asked, or asked too late."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.utils import _python_dispatch

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


# Modes of selective activation checkpointing: they keep what operations gave, and hand it out in that order.
_KEEPING = tuple(
    mode
    for name in ("_CachingTorchDispatchMode", "_CachedTorchDispatchMode")
    if (mode := getattr(torch.utils.checkpoint, name, None)) is not None
)


@contextlib.contextmanager
def apart_from_checkpoints() -> Iterator[None]:
    """Within, operations are not taken for the model's by selective activation checkpointing."""
    if any(isinstance(mode, _KEEPING) for mode in _python_dispatch._get_current_dispatch_mode_stack()):
        with _python_dispatch._disable_current_modes():
            yield
    else:
        yield


def output_hook(output: Tensor, hook: Callable[[Tensor | None], None]) -> tuple[Tensor, RemovableHandle]:
    """Register a hook that sees the gradient of an output, even if an in-place operation follows.

    Returns:
        The output to hand on in its place, and the hook's handle.
    """
    base = output._base if output._is_view() else None
    if base is not None and base.grad_fn is not None and _same_order(output, base):
        # An in-place operation on a view rewrites its history, and a hook on it would never fire; the operation
        # that made what it is a view of stays in the graph.
        return output, arrival_hook(base, hook)
    output = output.clone() if output._is_view() else output
    return output, arrival_hook(output, hook)


def arrival_hook(output: Tensor, hook: Callable[[Tensor | None], None]) -> RemovableHandle:
    """Register a hook that sees the gradient with which the operation behind an output is differentiated.

    A hook on the tensor would see it ahead of the model's own hooks there, which may clip or scale it.
    """
    producer, number = output.grad_fn, output.output_nr
    if producer is None:
        return output.register_hook(hook)
    return producer.register_hook(lambda _, grads: hook(grads[number]))  # what hooks before it left of it


def _same_order(output: Tensor, base: Tensor) -> bool:
    """Whether a view holds its base's elements in their order."""
    return output.numel() == base.numel() and output.is_contiguous() and base.is_contiguous()


def first_hook(weight: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """Register a hook that sees a weight's gradient ahead of hooks that clip, scale or mask it."""
    handle = weight.register_hook(hook)
    hooks = weight._backward_hooks
    if hooks is not None and len(hooks) > 1:  # they run in the order in which they stand in this dict
        others = {key: other for key, other in hooks.items() if key != handle.id}
        mine = hooks[handle.id]
        hooks.clear()
        hooks[handle.id] = mine
        hooks.update(others)
    return handle


def in_backward() -> bool:
    """Whether this runs within a backward pass."""
    return torch._C._current_graph_task_id() != -1
