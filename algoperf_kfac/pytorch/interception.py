"""The function modes under which a model runs on statistics steps: every function of torch is handed on."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from algoperf_kfac.pytorch.operations import Called, Function
from algoperf_kfac.pytorch.tapped import leave_uncompiled, tapped
from algoperf_kfac.pytorch.taps import Taps

IN_A_COMPILED_FUNCTION = (
    "capture() inside a function that torch.compile compiled: compile the model (model = torch.compile(model)), "
    "and leave the training step as it is"
)


class Listener(Protocol):
    """What functions of torch are handed to."""

    def called(self, called: Called) -> Any:
        """Run a function of torch; what to hand on for its output."""

    def backward(
        self, run: Callable[[], object], inputs: Iterable[object] | None, *, again: bool, keeps: bool, adds: bool
    ) -> object:
        """Run a backward pass.

        Args:
            run: the pass.
            inputs: what gradients are taken with respect to, None for all parameters.
            again: whether gradients of the gradients are to follow (create_graph).
            keeps: whether the graph stays for further passes (retain_graph, create_graph).
            adds: whether it adds to the gradients that are there, and does not return its own.
        """


class Interceptor(TorchFunctionMode):
    """Hands every function of torch to a listener."""

    def __init__(self, listener: Listener) -> None:
        super().__init__()
        self._listener = listener

    def __torch_function__(
        self, func: Function, types: Any, args: Iterable[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.backward:
            return self._backward(torch.autograd.backward, *_of_tensor(*args, **kwargs))
        if func is torch.autograd.backward or func is torch.autograd.grad:
            if torch._C._functorch.peek_interpreter_stack() is not None:  # a transformation's own
                return func(*args, **kwargs)
            return self._backward(func, list(args), kwargs)
        return self._listener.called(Called(func, list(args), kwargs))

    def _backward(self, func: Function, args: list[Any], kwargs: Mapping[str, Any]) -> Any:
        bound = inspect.signature(func).bind(*args, **kwargs).arguments
        inputs = bound.get("inputs")
        inputs = [inputs] if isinstance(inputs, Tensor) else inputs
        inputs = list(inputs.values()) if isinstance(inputs, Mapping) else inputs
        edges = [] if func is torch.autograd.grad else _edges(*args, **kwargs)

        def run() -> Any:
            # A mode is off while it handles a function, and this one may run layers again (reentrant
            # checkpointing). Unlike for tensors, backward from gradient edges does not ask the mode again.
            if edges:
                with self:
                    return func(edges, *args[1:], **kwargs)
            return func(*args, **kwargs)

        again, adds = bool(bound.get("create_graph")), func is not torch.autograd.grad
        keeps = again if bound.get("retain_graph") is None else bool(bound["retain_graph"])
        return self._listener.backward(run, inputs, again=again, keeps=keeps, adds=adds)


class TracedInterceptor(Interceptor):
    """The same, and taps where dynamo traces a graph."""

    def __init__(self, listener: Listener, taps: Taps) -> None:
        super().__init__(listener)
        self._table, self._lookups, self._masks = taps.table, taps.lookups, taps.masks
        self._readers, self._turned, self._products = taps.readers, taps.turned, taps.products
        leave_uncompiled(TracedInterceptor.__torch_function__)
        self._uncompiled = torch.compiler.disable(listener.called)

    def __torch_function__(
        self, func: Function, types: Any, args: Iterable[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_dynamo_compiling():
            taps = self._table, self._lookups, self._readers, self._turned, self._products, self._masks
            return tapped(*taps, func, args, kwargs)
        # What a compiled graph consists of runs without gradients, and asks every mode.
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if func in (Tensor.backward, torch.autograd.backward, torch.autograd.grad):
            return super().__torch_function__(func, types, args, kwargs)
        return self._uncompiled(Called(func, list(args), kwargs))


def _of_tensor(
    tensor: Tensor, gradient: Any = None, retain_graph: Any = None, create_graph: bool = False, inputs: Any = None
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of `torch.autograd.backward` for those of `Tensor.backward`."""
    return [tensor, gradient, retain_graph, create_graph], {"inputs": inputs}


def _edges(tensors: Any, *args: Any, inputs: Any = None, **kwargs: Any) -> list[Any]:
    """The gradient edges from which `torch.autograd.backward` starts; none where it takes no edges."""
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    if inputs is not None or not all(isinstance(t, Tensor) and t.requires_grad for t in tensors):
        return []
    return [torch.autograd.graph.get_gradient_edge(t) for t in tensors]


def can_run_eagerly() -> bool:
    """Whether this torch can run what torch.compile compiled as it was written; True where nothing can be."""
    if "torch._dynamo" not in sys.modules or hasattr(torch.compiler, "set_stance"):
        return True
    return hasattr(sys.modules["torch._dynamo"].eval_frame, "_maybe_set_eval_frame")


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """Run what torch.compile compiled as it was written, where that can be done (`can_run_eagerly`)."""
    if not can_run_eagerly():
        yield
        return
    if hasattr(torch.compiler, "set_stance"):
        try:
            stance = torch.compiler.set_stance("force_eager")
        except RuntimeError as error:
            raise RuntimeError(IN_A_COMPILED_FUNCTION) from error
        with stance:
            yield
        return
    # Before torch 2.6: compiled functions ask this one to switch compilation on for their frame.
    from torch._dynamo import eval_frame

    switch = eval_frame._maybe_set_eval_frame
    eval_frame._maybe_set_eval_frame = lambda callback: switch(None)
    try:
        yield
    finally:
        eval_frame._maybe_set_eval_frame = switch
