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
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from algoperf_kfac.errors import MissingStatisticsError
from algoperf_kfac.layers import LayerSpec, Layout, also_read_by, computed_before
from algoperf_kfac.positions import Positions, Rows, candidates_for, check_fits
from algoperf_kfac.pytorch import fisher
from algoperf_kfac.pytorch.calls import Call
from algoperf_kfac.pytorch.checks import compare
from algoperf_kfac.pytorch.compiled import Taps
from algoperf_kfac.pytorch.contractions import operations_of
from algoperf_kfac.pytorch.hooks import first_hook, in_backward, output_hook
from algoperf_kfac.pytorch.interception import Interceptor, TracedInterceptor, eagerly
from algoperf_kfac.pytorch.kinds import AnyRecorder
from algoperf_kfac.pytorch.loss_scale import LossScale
from algoperf_kfac.pytorch.operations import LOSSES, RULES, Called, Operation, is_mean
from algoperf_kfac.pytorch.options import Options
from algoperf_kfac.pytorch.recorder import Recorder
from algoperf_kfac.pytorch.sights import Sight, Sights
from algoperf_kfac.pytorch.statistics import Scalar, Statistics
from algoperf_kfac.pytorch.uses import Uses
from algoperf_kfac.subset import limit_for

if TYPE_CHECKING:
    from types import TracebackType

    from torch.utils.hooks import RemovableHandle

    from algoperf_kfac.pytorch.layer_book import Layers


# Why no layer is recorded, and what to do about it.
TRANSFORMED = (
    "The model ran inside torch.func (grad, vmap, ...), where layers cannot be recorded: on statistics steps "
    "(optimizer.is_statistics_step) run it as it is, and loss.backward(), inside capture()"
)
# What properties of tensors return, which a mode sees like functions: nothing that a gradient could go through.
NO_TENSORS = (torch.Size, int, float, str, torch.dtype, torch.device, type(None))
EMPTY = "The batch has no examples: leave such a step out, optimizer.step() included"


@dataclasses.dataclass(frozen=True)
class Gathered:
    """What a capture came to.

    Attributes:
        statistics: by layer.
        missing: layers without, and what they missed.
        wrong: layers whose statistics would not be the whole of them, and why.
        backward: whether there was a backward pass.
        rows: examples that each layer with statistics was taken to see.
        scaled: whether the caller said what the loss was divided by.
        errors: by layer, how far what was captured is from the weight's gradient, relative to it; of a checked
            capture.
        readers: by identity of a parameter: the operation without a rule in which it met data.
        strangers: parameters with a gradient that operations with a rule read, and the optimizer does not have.
        hint: why no layer at all was recorded, as far as that is known, and what to do.
        second: by layer whose second dimension alone is as long as what the loss function took: both sizes.
        sights: of a capture that ran uncompiled, what compiled graphs need to know of its layers.
        obstacles: why compiled graphs could not have taken all of it.
    """

    statistics: dict[str, Statistics]
    missing: dict[str, str]
    wrong: dict[str, str]
    backward: bool
    rows: dict[str, int]
    scaled: bool
    errors: dict[str, float]
    readers: dict[int, str]
    strangers: list[Tensor]
    hint: str
    second: dict[str, tuple[int, int]]
    sights: dict[str, Sight]
    obstacles: list[str]


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
        uses: what becomes of parameters in operations without a rule.
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
        self.uses = Uses()
        self._weights: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}  # of the weights, where they are checked
        self._strangers: dict[int, Tensor] = {}
        self._scale = LossScale()
        self._sights = Sights()
        self._handles: list[RemovableHandle] = []
        self._record_gradients = options.config.fisher == "empirical"
        self._aside = False
        self._seeing = 0  # functions that a kind of layers runs in place of a fused one
        self._entered = False
        self._backward = False
        self._passes = 0
        self._hint = ""
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Capture:
        if self._entered:
            raise RuntimeError("a capture() is for one pass: call optimizer.capture() again")
        self._entered = True
        if self.active:
            taps = self._options.taps
            # A compiled graph hides its operations: without taps the same model runs eagerly.
            if taps is None and "torch._dynamo" in sys.modules:
                self._stack.enter_context(eagerly())
            self._stack.enter_context(Interceptor(self) if taps is None else TracedInterceptor(self, taps))
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
            # Nothing hangs on the graph any more, which a kept loss keeps alive.
            if self._options.taps is not None:
                self._options.taps.clear()
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
            self.recorders.clear()
            self._weights.clear()
            self._gradients.clear()

    def backward_fisher(
        self,
        outputs: Tensor | tuple[Tensor, Tensor],
        loss_type: enum.Enum | str,
        mask: Tensor | None = None,
        *,
        class_dim: int = -1,
    ) -> None:
        """The extra backward passes of `fisher="mc"` and "exact", through the forward pass just made.

        Does nothing for the empirical Fisher and outside statistics steps, so it may always be called; call it
        before `loss.backward()`, which frees the graph. A model with several heads: once for each.

        Args:
            outputs, loss_type, mask: as in `fisher.sampled_loss`.
            class_dim: dimension of the logits over classes; 1 for (N, C, H, W).
        """
        config = self._options.config
        if not self.active or config.fisher == "empirical":
            return
        outputs = fisher.classes_last(outputs, loss_type, class_dim)
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
        if isinstance(output, NO_TENSORS):
            return output
        if called.func in RULES and torch._C._functorch.peek_interpreter_stack() is not None:
            self._hint = TRANSFORMED
        if called.name == "__iter__" and self.uses.views.of(called.args[0]) is not None:
            output = iter(called.replace(list(output)))
        operations = operations_of(called, self.uses.views)
        if operations:
            for operation in operations:
                output = self.operation(operation, output)
                if isinstance(output, Tensor) and output.requires_grad:
                    spec = self.spec_of(operation.weight, operation.layout)
                    if spec is not None:
                        self._sights.note(called, operation, spec, fused=self._seeing > 0)
            return output
        self.uses.views.flatten(called, output)
        self.uses.follow(called, called.run())
        if torch.is_grad_enabled() and called.func in LOSSES and output.requires_grad:
            self._scale.note_loss(called)
            if is_mean(called):
                self._handles.append(output.register_hook(self._note_loss))
        return output

    def backward(self, run: Callable[[], object], inputs: Iterable[object] | None, *, again: bool) -> object:
        """Run a backward pass.

        Args:
            run: the pass.
            inputs: what gradients are taken with respect to, None for all parameters.
            again: whether gradients of the gradients are to follow (create_graph).
        """
        weights = None if inputs is None else [p for p in inputs if isinstance(p, torch.nn.Parameter)]
        self._aside = inputs is not None and not weights
        if weights:
            self._sights.obstruct("gradients are taken for given parameters")
        elif self._backward and not self._aside:
            self._sights.obstruct("a capture has several backward passes")
        if self._aside and again and self.recorders:
            raise RuntimeError(
                "autograd.grad(..., create_graph=True) inside capture(): K-FAC has no statistics for the gradient "
                "of a gradient. Take the statistics of the plain loss alone inside capture(), and call backward() "
                "on the penalty outside of it: gradients add up"
            )
        self._scale.gradient = None
        if not self._aside and not self._backward:
            self._options.before_backward()
        try:
            return run()
        finally:
            if self._aside:
                for recorder in self.recorders.values():
                    recorder.set_aside()
            else:
                self._backward = True
            self._aside = False

    def _note_loss(self, gradient: Tensor) -> None:
        """The gradient that the mean of a loss function gets."""
        if not self._aside:
            self._scale.note_gradient(gradient)

    def operation(self, operation: Operation, output: Tensor) -> Tensor:
        """Record a weighted operation; returns the output to hand on in its place.

        A layer that runs within the backward pass is run again by activation checkpointing. Where checkpointing
        is reentrant, the first run was without gradients, and this one is recorded once its gradient arrives;
        otherwise the first run was recorded, and no gradient will reach this one.
        """
        spec = self.spec_of(operation.weight, operation.layout)
        known = None if spec is None else self.recorders.get(spec.name)
        if isinstance(known, Recorder) and not in_backward():
            self._next_forward(known)
        if not output.requires_grad or not output.numel() or not operation.input.numel():
            self._hint = self._hint or (EMPTY if output.requires_grad else "")
            return output
        self.uses.miss(operation.input, f"{operation.name} as its input")
        spec = spec or self.layers.promote(operation)
        if spec is None:
            if operation.weight.requires_grad and not self.layers.knows(operation.weight):
                self._strangers[id(operation.weight)] = operation.weight
            self.uses.miss(operation.weight, operation.name)
            return output
        return self.record(spec, operation, output, self.choose(spec, operation, output))

    def record(self, spec: LayerSpec, operation: Operation, output: Tensor, positions: Positions | None) -> Tensor:
        """Record a call of a covered layer; returns the output to hand on in its place."""
        own = spec.bias is not None and operation.bias is self.layers.params[spec.bias]
        if spec.bias is not None and operation.bias is None and spec.name not in self.recorders:
            spec = self.layers.without_bias(spec)
        if spec.bias is None:
            self.uses.miss(operation.bias, f"{operation.name} as its bias")
        elif not own or operation.bias_start != spec.bias_start:
            self.uses.miss(operation.weight, "a call without its bias")
        recorder = self.recorder(spec, operation.weight)
        if not isinstance(recorder, Recorder):  # a kind's, and not for operations of this sort
            self.uses.miss(operation.weight, operation.name)
            return output
        return self.attach(recorder, operation, output, positions)

    def attach(
        self, recorder: Recorder, operation: Operation, output: Tensor, positions: Positions | None
    ) -> Tensor:
        """Record a call's input now (or when its layer is run again), and its output gradient when it comes."""
        again = in_backward()
        if not again:
            self._next_forward(recorder)
        geometry, rows = operation.geometry(output), operation.rows(output)
        device = output.device.type
        limit = limit_for(
            self._options.config.statistics_rows, candidates_for(recorder.spec.name, self._options.positions)
        )

        def record() -> Call:
            with torch.no_grad(), torch.autocast(device, enabled=False):
                return recorder.input(operation, geometry, rows, positions, limit)

        hook = self._gradient_hook(recorder, record if again else record(), output, operation.arrange)
        output, handle = output_hook(output, hook)
        self._handles.append(handle)
        return output

    def _next_forward(self, recorder: Recorder) -> None:
        recorder.note_loss(self._scale.gradient)
        recorder.next_forward()

    def _gradient_hook(
        self,
        recorder: Recorder,
        call: Call | Callable[[], Call],
        output: Tensor,
        arrange: Callable[[Tensor], Tensor] | None,
    ) -> Callable[[Tensor | None], None]:
        """Records the output gradient of a call, and first the call itself where that was left open."""
        shape, device = output.shape, output.device

        def hook(grad: Tensor | None) -> None:
            nonlocal call
            if self._aside:
                if isinstance(call, Call):
                    call.aside = True
                return
            if not self._record_gradients:
                return
            self._backward = True  # of a capture around this one, which handles backward() alone
            with torch._C.DisableTorchFunction(), torch.no_grad(), torch.autocast(device.type, enabled=False):
                # None is what an autograd.Function may return for zero.
                grad = torch.zeros(shape, device=device) if grad is None else grad.reshape(shape)
                if not isinstance(call, Call):
                    call = call()
                recorder.output_gradient(call, grad if arrange is None else arrange(grad))

        return hook

    def spec_of(self, weight: Tensor, layout: Layout = ()) -> LayerSpec | None:
        """The covered layer of a weight, or of a part of it; None if there is none."""
        return self.layers.by_weight.get(id(weight), {}).get(layout)

    def see(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a function as a part of the model: for a kind, in place of one that torch has fused."""
        self._seeing += 1
        try:
            with Interceptor(self):
                return function(*args, **kwargs)
        finally:
            self._seeing -= 1

    def recorder(self, spec: LayerSpec, weight: Tensor) -> AnyRecorder:
        """What gathers the statistics of a layer; made at its first call."""
        if spec.name not in self.recorders:
            dtype = torch.promote_types(weight.dtype, torch.float32)
            one_pass = self._options.config.fisher == "empirical"
            # A layer that joined later is checked when it is first seen.
            checks = self._options.checks or (one_pass and spec.name not in self.layers.seen)
            checks = checks and weight.requires_grad  # of a layer with a frozen weight the bias alone may move
            self.recorders[spec.name] = self.layers.recorder(spec, dtype, one_pass=one_pass, checks=checks)
            self._weights[spec.name] = weight
            if checks:
                self._handles.append(first_hook(weight, lambda grad: self._add_gradient(spec.name, grad)))
        return self.recorders[spec.name]

    def _add_gradient(self, name: str, grad: Tensor) -> None:
        """What a backward pass adds to a weight's gradient in this process, all its uses together."""
        if not self._aside:
            # A copy: the tensor becomes the parameter's .grad, which processes average and callers clip in place.
            grad = grad.detach().clone()
            self._gradients[name] = self._gradients[name] + grad if name in self._gradients else grad

    def forget(self, name: str) -> None:
        """Drop what was gathered for a layer."""
        self.recorders.pop(name, None)

    def candidates(self, spec: LayerSpec, rows: Rows) -> list[Positions]:
        """The descriptions of positions that a layer may take, in order.

        Args:
            spec: the layer.
            rows: of the call at hand.
        """
        self._scale.note_call(spec.name, rows)
        return candidates_for(spec.name, self._options.positions)

    def choose(self, spec: LayerSpec, operation: Operation, output: Tensor) -> Positions | None:
        """The description of positions that a call takes."""
        self._scale.note_call(spec.name, operation.rows(output))
        first = spec.weight in self.layers.sequence_first
        return operation.positions(spec.name, output, self._options.positions, sequence_first=first)

    def kept_inputs(self) -> Iterator[Tensor]:
        """Inputs that are kept until their gradients come, most of them kept by autograd as well."""
        for recorder in self.recorders.values():
            yield from recorder.kept_inputs()

    # What came of it.

    def _collect(self) -> None:
        for watch in self._watches:
            watch.settle()
        taps = self._options.taps
        if taps is None:
            calls = {name: rows for name, rows in self._scale.calls.items() if name in self.layers.covered}
            check_fits(self._options.positions, calls, self.layers.names())
        else:
            self._take(taps)
        missing: dict[str, str] = {}
        wrong: dict[str, str] = {}
        for spec in (layer.spec for layer in self.layers.covered.values()):
            use = self._missed_use(spec)
            recorder = self.recorders.get(spec.name)
            if recorder is None:
                if use is None:
                    missing[spec.name] = "its inputs"
                else:
                    wrong[spec.name] = computed_before(use)
            elif use is not None:
                wrong[spec.name] = also_read_by(use)
            elif not recorder.is_complete:
                missing[spec.name] = "its output gradients"
        kind = self._options.config.fisher
        if (
            kind != "empirical"
            and self._backward
            and not self._passes
            and "its output gradients" in missing.values()
        ):
            raise MissingStatisticsError(
                f"fisher={kind!r} needs capture.backward_fisher(outputs, loss_type) between the forward pass and "
                "loss.backward()"
            )
        counted = {n: r for n, r in self.recorders.items() if n not in missing and n not in wrong}
        for recorder in counted.values():
            recorder.note_loss(self._scale.gradient)
            recorder.end_group()
        products = {name: recorder.product for name, recorder in counted.items()}
        errors, too_far = compare(self.layers.covered, products, self._gradients, self.uses.penalised)
        wrong |= too_far
        counted = {name: recorder for name, recorder in counted.items() if name not in too_far}
        factor = self._scale.factor(counted, self._options.config, self.loss_normalizer)
        sights, obstacles = ({}, []) if taps is not None else self._seen(counted)
        by_loss = self.loss_normalizer is None and self._options.config.fisher == "empirical"
        statistics = {name: recorder.statistics(factor, by_loss=by_loss) for name, recorder in counted.items()}
        rows = self._scale.rows(counted, self.layers.covered)
        hint = "" if self.recorders else self._hint
        second = self._scale.batch_second(counted)
        strangers = list(self._strangers.values())
        readers = self.uses.missed
        scaled = self.loss_normalizer is not None
        self._finish(
            Gathered(
                statistics,
                missing,
                wrong,
                self._backward,
                rows,
                scaled,
                errors,
                readers,
                strangers,
                hint,
                second,
                sights,
                obstacles,
            )
        )

    def _take(self, taps: Taps) -> None:
        """What compiled graphs took, beside what ran uncompiled.

        Backends that run a graph as Python (backend="eager") show its operations once more: the tap is the whole.
        """
        ran_uncompiled = self.recorders
        self.recorders = {}
        for tap in taps.taps:
            name, recorder = tap.spec.name, Recorder(tap.spec, tap.dtype)
            shown = ran_uncompiled.pop(name, None)
            if tap.take(recorder):
                self._backward = True  # torch 2.9 may not ask the mode on the step that compiles
                self._scale.calls[name] = [tap.sight.rows]
                self.recorders[name] = recorder
            elif shown is not None:
                self.recorders[name] = shown
        self.recorders |= ran_uncompiled

    def _seen(self, recorders: dict[str, AnyRecorder]) -> tuple[dict[str, Sight], list[str]]:
        """What compiled graphs have to know of layers, the one that sees the batch first; and what forbids them."""
        if self._options.config.fisher != "empirical":
            return {}, [f"fisher={self._options.config.fisher!r}"]
        ordered = {name: recorders[name] for name in self._scale.by_batch(recorders)}
        return self._sights.of(ordered, self._scale.calls, self.layers.covered)

    def _missed_use(self, spec: LayerSpec) -> str | None:
        """An operation that reads the weight or bias of a layer and is not recorded."""
        names = (spec.weight, spec.bias) if spec.bias is not None else (spec.weight,)
        uses = (self.uses.missed.get(id(self.layers.params[name])) for name in names)
        return next((use for use in uses if use is not None), None)
