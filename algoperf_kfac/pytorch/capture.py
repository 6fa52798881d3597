"""Capture: seeing what goes into a layer and which gradient comes back, without editing the model.

On statistics steps a `TorchFunctionMode` watches the operations that take a parameter as weight. Operations are
matched by the identity of that parameter, not by module class, so that functional layers, views, in-place
operations and repeated uses are seen. Factors are accumulated at once, activations are not kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.errors import MissingStatisticsError
from algoperf_kfac.layers import LayerSpec
from algoperf_kfac.positions import Candidates, Positions, candidates_for, choose
from algoperf_kfac.pytorch import fisher
from algoperf_kfac.pytorch.operations import RULES, WEIGHT_READS, Called, Function, Operation
from algoperf_kfac.pytorch.statistics import AnyRecorder, Call, Recorder, Scalar, Statistics

if TYPE_CHECKING:
    from types import TracebackType

    from algoperf_kfac.pytorch.layer_book import Layers


@dataclasses.dataclass(frozen=True)
class Options:
    """What a capture is to do.

    Attributes:
        config: the configuration.
        active: whether this is a statistics step; if not, nothing is watched and entering costs nothing.
        positions: which positions count and to which example they belong.
        generator: of the label draws of fisher="mc".
    """

    config: KFACConfig
    active: bool
    positions: Candidates
    generator: torch.Generator | None = None


@dataclasses.dataclass(frozen=True)
class Gathered:
    """What a capture came to.

    Attributes:
        statistics: by layer.
        missing: layers without, and what they missed.
        also_read: layers whose weight something without a rule reads, too, and what that was.
    """

    statistics: dict[str, Statistics]
    missing: dict[str, str]
    also_read: dict[str, str]


class Capture(contextlib.AbstractContextManager["Capture"]):
    """Context around the forward and backward pass of one (micro-)batch; made by `KFAC.capture`.

    Args:
        layers: the book of layers.
        finish: is told what the capture came to.
        options: what it is to do.
        loss_normalizer: see below.

    Attributes:
        active: whether this is a statistics step; if not, nothing is watched and entering costs nothing.
        loss_normalizer: what the summed loss was divided by before `backward`: the number of examples
            (default), the number of valid tokens, ... A tensor is fine. Output gradients are scaled by it, so
            that B belongs to the summed, per-example loss. May be set until the context is left.
        layers: the book of layers.
        recorders: what gathers the statistics of the layers seen so far, by name.
    """

    def __init__(
        self,
        layers: Layers,
        finish: Callable[[Gathered], None],
        options: Options,
        loss_normalizer: Scalar | None = None,
    ) -> None:
        self.layers = layers
        self.active = options.active
        self.loss_normalizer = loss_normalizer
        self.recorders: dict[str, AnyRecorder] = {}
        self._finish = finish
        self._options = options
        self._watches = layers.watches(self) if options.active else []
        self._weights: dict[str, Tensor] = {}
        self._other_uses: dict[int, str] = {}
        self._record_gradients = options.config.fisher == "empirical"
        self._passes = 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Capture:
        if self.active:
            # A compiled graph hides its operations: statistics steps run the same model eagerly.
            if "torch._dynamo" in sys.modules:
                self._stack.enter_context(_eagerly())
            self._stack.enter_context(_Interceptor(self))
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self.active:
            return
        self._stack.close()
        self.active = False
        self._record_gradients = False
        try:
            if exc_type is None:
                self._collect()
        finally:
            self.recorders.clear()
            self._weights.clear()

    def backward_fisher(
        self,
        outputs: Tensor | tuple[Tensor, Tensor],
        loss_type: enum.Enum | str,
        mask: Tensor | None = None,
    ) -> None:
        """The extra backward passes of `fisher="mc"` and "exact", through the forward pass just made.

        Does nothing for the empirical Fisher and outside statistics steps, so it may always be called; call it
        before `loss.backward()`, which frees the graph. Arguments as in `fisher.sampled_loss`.
        """
        config = self._options.config
        if not self.active or config.fisher == "empirical":
            return
        if config.fisher == "mc":
            losses: Iterator[Tensor] = (
                fisher.sampled_loss(outputs, loss_type, mask, self._options.generator)
                for _ in range(config.fisher_samples)
            )
        else:
            losses = fisher.exact_losses(outputs, loss_type, mask)
        weights = list(self._weights.values())
        if not weights:
            return  # no layer is covered, or the forward pass is yet to come
        self._record_gradients = True
        for loss in losses:
            torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
            for recorder in self.recorders.values():
                recorder.end_pass()
            self._passes += 1
        self._record_gradients = False

    # What is called. The kinds of layers use these, too.

    def called(self, called: Called) -> Any:
        """Run a function of torch, recording it where it takes a parameter as weight; what to hand on for it."""
        for watch in self._watches:
            output = watch.called(called)
            if output is not NotImplemented:
                return output
        output = called.run()
        rule = RULES.get(called.func)
        if rule is not None:
            return self._operation(rule(*called.args, **called.kwargs), output)
        if called.name in WEIGHT_READS and torch.is_grad_enabled():
            for leaf in called.leaves():
                self.note_use(leaf, called.name)
        return output

    def _operation(self, operation: Operation, output: Tensor) -> Tensor:
        """Record a weighted operation; returns the output to hand on in its place.

        A layer that runs within the backward pass is run again by activation checkpointing. Where checkpointing
        is reentrant, the first run was without gradients, and this one is recorded once its gradient arrives;
        otherwise the first run was recorded, and no gradient will reach this one.
        """
        spec = self.spec_of(operation.weight)
        known = None if spec is None else self.recorders.get(spec.name)
        if isinstance(known, Recorder) and not _in_backward():
            known.next_forward()
        if not output.requires_grad:
            return output
        self.note_use(operation.input, f"{operation.kind} as its input")
        spec = spec or self.layers.promote(operation)
        if spec is None:
            return output
        return self.record(spec, operation, output, self.choose(spec, operation, output))

    def record(self, spec: LayerSpec, operation: Operation, output: Tensor, positions: Positions | None) -> Tensor:
        """Record a call of a covered layer; returns the output to hand on in its place."""
        if spec.bias is not None and operation.bias is None:
            self.note_use(operation.weight, "a call without its bias")
        recorder = self.recorder(spec, operation.weight)
        if not isinstance(recorder, Recorder):  # a kind's, and not for operations of this sort
            self.note_use(operation.weight, operation.kind)
            return output
        return self.attach(recorder, operation, output, positions)

    def attach(
        self, recorder: Recorder, operation: Operation, output: Tensor, positions: Positions | None
    ) -> Tensor:
        """Record a call's input now (or when its layer is run again), and its output gradient when it comes."""
        again = _in_backward()
        if not again:
            recorder.next_forward()
        geometry, rows = operation.geometry(output), operation.rows(output)
        device = output.device.type

        def record() -> Call:
            with torch.no_grad(), torch.autocast(device, enabled=False):
                return recorder.input(operation, geometry, rows, positions)

        hook = self._gradient_hook(recorder, record if again else record(), output)
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
        self, recorder: Recorder, call: Call | Callable[[], Call], output: Tensor
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
                recorder.output_gradient(call, grad)

        return hook

    def spec_of(self, weight: Tensor) -> LayerSpec | None:
        """The covered layer of a weight, None if there is none."""
        return self.layers.by_weight.get(id(weight))

    def recorder(self, spec: LayerSpec, weight: Tensor) -> AnyRecorder:
        """What gathers the statistics of a layer; made at its first call."""
        if spec.name not in self.recorders:
            dtype = torch.promote_types(weight.dtype, torch.float32)
            one_pass = self._options.config.fisher == "empirical"
            self.recorders[spec.name] = self.layers.recorder(spec, dtype, one_pass=one_pass)
            self._weights[spec.name] = weight
        return self.recorders[spec.name]

    def forget(self, name: str) -> None:
        """Drop what was gathered for a layer."""
        self.recorders.pop(name, None)

    def candidates(self, name: str) -> list[Positions]:
        """The descriptions of positions that a layer may take, in order."""
        return candidates_for(name, self._options.positions)

    def choose(self, spec: LayerSpec, operation: Operation, output: Tensor) -> Positions | None:
        """The description of positions that a call takes."""
        return choose(spec.name, self._options.positions, operation.rows(output))

    def note_use(self, value: object, what: str) -> None:
        """Remember that something without a rule used a parameter; other values are passed over."""
        if isinstance(value, torch.nn.Parameter):
            self._other_uses.setdefault(id(value), what)

    def is_used_otherwise(self, weight_id: int) -> bool:
        """Whether something without a rule used the parameter of this identity."""
        return weight_id in self._other_uses

    def kept_inputs(self) -> Iterator[Tensor]:
        """Inputs that are kept until their gradients come, most of them kept by autograd as well."""
        for recorder in self.recorders.values():
            yield from recorder.kept_inputs()

    # What came of it.

    def _collect(self) -> None:
        for watch in self._watches:
            watch.settle()
        fisher_kind = self._options.config.fisher
        missing: dict[str, str] = {}
        also_read: dict[str, str] = {}
        for weight_id, spec in self.layers.by_weight.items():
            if weight_id in self._other_uses:
                also_read[spec.name] = self._other_uses[weight_id]
                continue
            recorder = self.recorders.get(spec.name)
            if recorder is None:
                missing[spec.name] = "its inputs"
            elif not recorder.backward_done:
                if fisher_kind != "empirical" and not self._passes:
                    raise MissingStatisticsError(
                        f"fisher={fisher_kind!r} needs capture.backward_fisher(outputs, loss_type) "
                        "between the forward pass and loss.backward()"
                    )
                missing[spec.name] = "its output gradients"
        statistics = {}
        for name, recorder in self.recorders.items():
            if name not in missing and name not in also_read:
                recorder.end_group()
                statistics[name] = recorder.statistics(self._scale(recorder.examples))
        self._finish(Gathered(statistics, missing, also_read))

    def _scale(self, examples: Scalar) -> Scalar:
        """What squares of output gradients are multiplied by to belong to the per-example loss."""
        config = self._options.config
        if config.fisher == "empirical":
            scale = examples if self.loss_normalizer is None else self.loss_normalizer
            return scale * scale
        return 1.0 / config.fisher_samples if config.fisher == "mc" else 1.0


class _Interceptor(TorchFunctionMode):
    """Hands every function of torch to the capture."""

    def __init__(self, capture: Capture) -> None:
        super().__init__()
        self._capture = capture

    def __torch_function__(
        self, func: Function, types: Any, args: Iterable[Any] = (), kwargs: Mapping[str, Any] | None = None
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
        return self._capture.called(Called(func, list(args), kwargs))


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


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


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
