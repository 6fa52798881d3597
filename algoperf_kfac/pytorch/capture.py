"""Capture: seeing what goes into a layer and which gradient comes back, without editing the model.

On statistics steps a `TorchFunctionMode` watches the operations that take a parameter as weight. Operations are
matched by the identity of that parameter, not by module class, so that functional layers, views, in-place
operations and repeated uses are seen. Factors are accumulated at once, activations are not kept.
"""

from __future__ import annotations

import contextlib
import fnmatch
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.layers import LayerSpec
from algoperf_kfac.pytorch import fisher
from algoperf_kfac.pytorch.factors import Positions
from algoperf_kfac.pytorch.operations import RULES, WEIGHT_READS, Operation
from algoperf_kfac.pytorch.statistics import Call, Recorder, Scalar, Statistics
from algoperf_kfac.spec import LossType


class MissingStatisticsError(RuntimeError):
    """A declared layer did not receive its inputs or its output gradients on a statistics step."""


class _Interceptor(TorchFunctionMode):
    """Hands every operation with a rule to the capture."""

    def __init__(self, capture: Capture) -> None:
        super().__init__()
        self._capture = capture

    def __torch_function__(
        self, func: Any, types: Any, args: Iterable[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.backward:
            with self:
                return _tensor_backward(*args, **kwargs)
        if func is torch.autograd.backward and (edges := _edges(*args, **kwargs)):
            # A mode is off while it handles a function, and this one may run layers again (reentrant
            # checkpointing). Unlike for tensors, backward from gradient edges does not ask the mode again.
            with self:
                return func(edges, *list(args)[1:], **kwargs)
        output = func(*args, **kwargs)
        rule = RULES.get(func)
        if rule is None:
            if _operation_name(func) in WEIGHT_READS:
                self._capture.other_use(_operation_name(func), [*args, *kwargs.values()])
            return output
        return self._capture.operation(rule(*args, **kwargs), output)


def _tensor_backward(
    tensor: Tensor, gradient: Any = None, retain_graph: Any = None, create_graph: bool = False, inputs: Any = None
) -> None:
    """`Tensor.backward`, which in older versions of torch is all that asks the mode."""
    torch.autograd.backward(tensor, gradient, retain_graph, create_graph, inputs=inputs)


def _edges(tensors: Any, *args: Any, inputs: Any = None, **kwargs: Any) -> list[Any]:
    """The gradient edges from which `torch.autograd.backward` starts; none where it takes no edges."""
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    if inputs is not None or not all(isinstance(t, Tensor) and t.requires_grad for t in tensors):
        return []
    return [torch.autograd.graph.get_gradient_edge(t) for t in tensors]


def _operation_name(func: Any) -> str:
    """The name of an operation; for properties such as `Tensor.T` that of the property."""
    name = getattr(func, "__name__", str(func))
    return str(getattr(func.__self__, "__name__", name)) if name == "__get__" else name


class Capture(contextlib.AbstractContextManager["Capture"]):
    """Context around the forward and backward pass of one (micro-)batch; made by `KFAC.capture`.

    Attributes:
        active: whether this is a statistics step; if not, nothing is watched and entering costs nothing.
        loss_normalizer: what the summed loss was divided by before `backward`: the number of examples
            (default), the number of valid tokens, ... A tensor is fine. Output gradients are scaled by it, so
            that B belongs to the summed, per-example loss. May be set until the context is left.
    """

    def __init__(
        self,
        *,
        config: KFACConfig,
        layers: Mapping[int, LayerSpec],
        promote: Callable[[Operation], LayerSpec | None],
        finish: Callable[[dict[str, Statistics], dict[str, str], dict[str, str]], None],
        positions: Positions | Tensor | Mapping[str, Positions | Tensor] | None,
        loss_normalizer: Scalar | None,
        generator: torch.Generator | None,
        active: bool,
    ) -> None:
        self.active = active
        self.loss_normalizer = loss_normalizer
        self._config = config
        self._layers = layers
        self._promote = promote
        self._finish = finish
        self._positions = _as_positions(positions)
        self._generator = generator
        self._recorders: dict[str, Recorder] = {}
        self._weights: dict[str, Tensor] = {}
        self._other_uses: dict[int, str] = {}
        self._record_gradients = config.fisher == "empirical"
        self._passes = 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Capture:
        if self.active:
            # A compiled graph hides its operations: statistics steps run the same model eagerly.
            if "torch._dynamo" in sys.modules:
                self._stack.enter_context(_eagerly())
            self._stack.enter_context(_Interceptor(self))
        return self

    def __exit__(self, exc_type: Any, exc: Any, traceback: Any) -> None:
        if not self.active:
            return
        self._stack.close()
        self.active = False
        self._record_gradients = False
        try:
            if exc_type is None:
                self._collect()
        finally:
            self._recorders.clear()
            self._weights.clear()

    def backward_fisher(
        self,
        outputs: Tensor | tuple[Tensor, Tensor],
        loss_type: LossType | str,
        mask: Tensor | None = None,
    ) -> None:
        """The extra backward passes of `fisher="mc"` and "exact", through the forward pass just made.

        Does nothing for the empirical Fisher and outside statistics steps, so it may always be called; call it
        before `loss.backward()`, which frees the graph. Arguments as in `fisher.sampled_loss`.
        """
        if not self.active or self._config.fisher == "empirical":
            return
        if self._config.fisher == "mc":
            samples = self._config.fisher_samples
            losses: Iterator[Tensor] = (
                fisher.sampled_loss(outputs, loss_type, mask, self._generator) for _ in range(samples)
            )
        else:
            assert isinstance(outputs, Tensor)
            losses = fisher.exact_losses(outputs, loss_type, mask)
        weights = list(self._weights.values())
        if not weights:
            return  # no layer is covered, or the forward pass is yet to come
        self._record_gradients = True
        for loss in losses:
            torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
            for recorder in self._recorders.values():
                recorder.end_pass()
            self._passes += 1
        self._record_gradients = False

    def other_use(self, what: str, args: Iterable[Any]) -> None:
        """Remember that something without a rule used a parameter as a weight."""
        if not torch.is_grad_enabled():
            return
        for arg in args:
            for item in arg if isinstance(arg, list | tuple) else (arg,):
                if isinstance(item, torch.nn.Parameter):
                    self._other_uses.setdefault(id(item), what)

    def operation(self, operation: Operation, output: Tensor) -> Tensor:
        """Record a weighted operation; returns the output to hand on in its place.

        A layer that runs within the backward pass is run again by activation checkpointing. Where checkpointing
        is reentrant, the first run was without gradients, and this one is recorded once its gradient arrives;
        otherwise the first run was recorded, and no gradient will reach this one.
        """
        spec = self._layers.get(id(operation.weight))
        again = torch._C._current_graph_task_id() != -1
        if spec is not None and not again and spec.name in self._recorders:
            self._recorders[spec.name].next_forward()
        if not output.requires_grad:
            return output
        self.other_use(f"{operation.kind} as its input", (operation.input,))
        spec = spec or self._promote(operation)
        if spec is None:
            return output
        if spec.bias is not None and operation.bias is None:
            self.other_use("a call without its bias", (operation.weight,))
        if spec.name not in self._recorders:
            dtype = torch.promote_types(operation.weight.dtype, torch.float32)
            self._recorders[spec.name] = Recorder(spec, dtype)
            self._weights[spec.name] = operation.weight
        recorder = self._recorders[spec.name]
        geometry = operation.geometry(output)
        positions = self._positions_for(spec.name, operation, output)
        device = output.device.type

        def record() -> Call:
            with torch.no_grad(), torch.autocast(device, enabled=False):
                return recorder.input(operation, geometry, positions)

        hook = self._gradient_hook(recorder, record if again else record(), positions, output)
        producer = output._base.grad_fn if output._is_view() and output._base is not None else None
        if producer is not None and output._base is not None and output._base.numel() == output.numel():
            # An in-place operation on a view rewrites its history, and a hook on it would never fire; the operation
            # that made what it is a view of stays in the graph.
            producer.register_prehook(lambda grads: hook(grads[0]))
        else:
            output = output.clone() if output._is_view() else output
            output.register_hook(hook)
        return output

    def _gradient_hook(
        self, recorder: Recorder, call: Call | Callable[[], Call], positions: Positions | None, output: Tensor
    ) -> Callable[[Tensor | None], None]:
        """Records the output gradient of a call, and first the call itself where that was left open."""
        shape, device = output.shape, output.device

        def hook(grad: Tensor | None) -> None:
            nonlocal call
            if not self._record_gradients:
                return
            with torch._C.DisableTorchFunction(), torch.no_grad(), torch.autocast(device.type, enabled=False):
                # None is what an autograd.Function may return for zero.
                grad = torch.zeros(shape, device=device) if grad is None else grad.reshape(shape)
                if not isinstance(call, Call):
                    call = call()
                recorder.output_gradient(call, grad, positions)

        return hook

    def _positions_for(self, name: str, operation: Operation, output: Tensor) -> Positions | None:
        positions = self._positions
        if positions is None:
            return None
        if isinstance(positions, Mapping):
            matches = (value for pattern, value in positions.items() if fnmatch.fnmatchcase(name, pattern))
            return next(matches, None)
        # One description for the whole model: it applies to the layers whose shape it fits.
        shape, dim = tuple(output.shape), positions.batch_dim
        leading = _to_front(shape[:-1], dim) if operation.kind == "linear" else (shape[0], *shape[2:])
        mask, ids = positions.mask, positions.segment_ids
        if ids is not None and leading[:1] != tuple(ids.shape):
            if leading[:1] != (positions.num_segments,):
                # Taken as they are, these rows would silently be examples with a single position each.
                raise ValueError(
                    f"layer {name} has {leading[0] if leading else 1} rows in dimension 0, neither those of "
                    f"segment_ids ({len(ids)}) nor one per segment ({positions.num_segments}): describe its "
                    f"positions by its name, capture(positions={{{name!r}: ..., ...}})"
                )
            return None
        if mask is not None and leading[: mask.dim()] != _to_front(tuple(mask.shape), dim):
            return None
        return positions

    def _collect(self) -> None:
        missing: dict[str, str] = {}
        tied: dict[str, str] = {}
        for weight_id, spec in self._layers.items():
            if weight_id in self._other_uses:
                tied[spec.name] = self._other_uses[weight_id]
                continue
            recorder = self._recorders.get(spec.name)
            if recorder is None:
                missing[spec.name] = "its inputs"
            elif not recorder.backward_done:
                if self._config.fisher != "empirical" and not self._passes:
                    raise MissingStatisticsError(
                        f"fisher={self._config.fisher!r} needs capture.backward_fisher(outputs, loss_type) "
                        "between the forward pass and loss.backward()"
                    )
                missing[spec.name] = "its output gradients"
        statistics = {}
        for name, recorder in self._recorders.items():
            if name in missing or name in tied:
                continue
            recorder.end_group()
            assert recorder.a is not None
            assert recorder.b is not None
            if self._config.fisher == "empirical":
                scale = recorder.examples if self.loss_normalizer is None else self.loss_normalizer
                factor = scale * scale
            else:
                factor = 1.0 / self._config.fisher_samples if self._config.fisher == "mc" else 1.0
            b = [matrix * factor for matrix in recorder.b]
            statistics[name] = Statistics(recorder.a, b, recorder.a_count, recorder.examples)
        self._finish(statistics, missing, tied)


@contextlib.contextmanager
def _eagerly() -> Iterator[None]:
    """Run what torch.compile compiled as it was written."""
    if hasattr(torch.compiler, "set_stance"):
        with torch.compiler.set_stance("force_eager"):
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


def _to_front(sizes: tuple[int, ...], dim: int) -> tuple[int, ...]:
    """Sizes with dimension `dim` first, where there are several."""
    return (sizes[dim], *sizes[:dim], *sizes[dim + 1 :]) if len(sizes) > 1 else sizes


def _as_positions(
    positions: Positions | Tensor | Mapping[str, Positions | Tensor] | None,
) -> Positions | Mapping[str, Positions] | None:
    """A bare tensor is a mask."""
    if isinstance(positions, Tensor):
        return Positions(mask=positions)
    if isinstance(positions, Mapping):
        return {
            pattern: Positions(mask=value) if isinstance(value, Tensor) else value
            for pattern, value in positions.items()
        }
    return positions
