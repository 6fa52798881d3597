"""What a model does in a forward and a backward pass: the operations of its layers are seen, and recorded.

Operations are matched by the identity of the parameter that they take as weight, not by module class, so that
functional layers, views, in-place operations and repeated uses are seen. Factors are accumulated at once,
activations are not kept.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from algoperf_kfac.layers import LayerSpec, Layout
from algoperf_kfac.positions import Positions, Rows, candidates_for
from algoperf_kfac.pytorch.calls import Call
from algoperf_kfac.pytorch.contractions import operations_of
from algoperf_kfac.pytorch.hooks import apart_from_checkpoints, arrival_hook, first_hook, in_backward, output_hook
from algoperf_kfac.pytorch.interception import Interceptor
from algoperf_kfac.pytorch.kinds import AnyRecorder
from algoperf_kfac.pytorch.loss_parts import Place, Slice
from algoperf_kfac.pytorch.loss_scale import LossScale
from algoperf_kfac.pytorch.operations import LOSSES, RULES, Called, Operation, is_mean, summed_rows
from algoperf_kfac.pytorch.options import Options
from algoperf_kfac.pytorch.passes import Passes
from algoperf_kfac.pytorch.penalties import Penalties
from algoperf_kfac.pytorch.recorder import Recorder
from algoperf_kfac.pytorch.sights import Sights
from algoperf_kfac.pytorch.uses import WITHOUT_BIAS, Uses
from algoperf_kfac.pytorch.views import JOINS, tensors

if TYPE_CHECKING:
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


class Observer:
    """Sees what a model does in one forward and backward pass, and records the calls of its covered layers.

    The kinds of layers use it, too.

    Args:
        layers: the book of layers.
        options: what the capture is to do.

    Attributes:
        layers: the book of layers.
        recorders: what gathers the statistics of the layers seen so far, by name.
        gradients: of the weights of layers that are checked, by name: what the backward passes add to them.
        uses: what becomes of parameters in operations without a rule.
        scale: what the loss was divided by, as far as it shows.
        sights: what compiled graphs have to know.
        strangers: parameters with a gradient that operations with a rule read, and the optimizer does not have.
        transformed: names of layers that ran inside torch.func.
        parallels: DistributedDataParallel modules that were at work.
        hint: why layers are not recorded, as far as that is known, and what to do.
        weights: of the layers seen so far, by name.
        passes: the backward passes.
        penalties: what functions of parameters add to the gradients of weights that are checked.
    """

    def __init__(self, layers: Layers, options: Options) -> None:
        self.layers = layers
        self.recorders: dict[str, AnyRecorder] = {}
        self.gradients: dict[str, Tensor] = {}
        self.uses = Uses()
        self.scale = LossScale()
        self.sights = Sights()
        self.hint = ""
        self.transformed: set[str] = set()
        self.weights: dict[str, Tensor] = {}
        self.passes = Passes(self, options)
        self.penalties = Penalties(self._counts)
        self._options = options
        self._watches = layers.watches(self) if options.active else []
        self._parallels: dict[int, DistributedDataParallel] = {}
        self._strangers: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        # By layer that ran without gradients, as activation checkpointing has it: what the latest loss got.
        self._unrecorded: dict[str, Tensor | None] = {}
        self._noted: set[str] = set()  # layers whose weights' gradients are summed
        self._seeing = 0  # functions that a kind of layers runs in place of a fused one

    @property
    def strangers(self) -> list[Tensor]:
        return list(self._strangers.values())

    @property
    def parallels(self) -> list[DistributedDataParallel]:
        return list(self._parallels.values())

    def called(self, called: Called) -> Any:
        """Run a function of torch, recording it where it takes a parameter as weight; what to hand on for it."""
        parallel = getattr(DistributedDataParallel, "_active_ddp_module", None)  # not of torch's public interface
        if parallel is not None:
            self._parallels[id(parallel)] = parallel
        for watch in self._watches:
            output = watch.called(called)
            if output is not NotImplemented:
                return output
        output = called.run()
        if output is None:
            self.uses.write(called)
        if isinstance(output, NO_TENSORS):
            return output
        if called.func in RULES and torch._C._functorch.peek_interpreter_stack() is not None:
            self._note_transformed(called)
        with apart_from_checkpoints():
            return self._ran(called, output)

    def _ran(self, called: Called, output: Any) -> Any:
        """Record a function that was run."""
        if called.name == "__iter__" and self.uses.views.of(called.args[0]) is not None:
            output = iter(called.replace(list(output)))
        operations = operations_of(called, self.uses.views)
        if operations:
            applied = False
            for operation in operations:
                output = self.operation(operation, output)
                if isinstance(output, Tensor) and output.requires_grad:
                    spec = self._layer_of(operation)
                    if spec is not None:
                        self.note_function(called, operation, spec)
                        applied = True
            if not applied:
                self.uses.read(called, output)
            self._watch_penalty(called, output)
            return output
        self.uses.read(called, output)
        self.uses.views.flatten(called, output)
        self.uses.follow(called, called.run())
        self._watch_penalty(called, output)
        is_loss = torch.is_grad_enabled() and called.func in LOSSES and output.requires_grad
        if is_loss and not self.uses.sources(output):  # else a penalty: of parameters and constants
            part_of = self.scale.note_loss(called, output)
            if is_mean(called):
                self._handles.append(arrival_hook(output, functools.partial(self._note_loss, part_of)))
            elif (rows := summed_rows(called)) > 1:
                self._handles.append(arrival_hook(output, functools.partial(self._note_sum, rows)))
        return output

    def _watch_penalty(self, called: Called, output: Any) -> None:
        """See what comes to the weights of layers that are checked through a function of parameters alone."""
        uses = self.uses
        results = [t for t in tensors(output) if uses.sources(t) and (called.in_place or uses.views.of(t) is None)]
        if not results:
            return
        leaves = [leaf for leaf in called.leaves() if uses.sources(leaf)]
        views = [(leaf, view.param) for leaf in leaves if (view := uses.views.of(leaf))]
        # What it was before is gone, and with it where its gradient came from; weights that are put together may be
        # taken apart again, and be the layers' own.
        if called.in_place or (views and called.name in JOINS):
            uses.penalised |= {source for leaf in leaves for source in uses.sources(leaf)}
            return
        read = [(leaf, param) for leaf, param in views if self._is_checked(param)]
        # A table that is the output layer, too, is found when the capture is over, and compared all the same.
        uses.penalised |= {id(param) for _, param in views} - {id(param) for _, param in read}
        derived = [leaf for leaf in leaves if uses.views.of(leaf) is None]
        if read and not self.penalties.watch(results, read, derived):
            uses.penalised |= {id(param) for _, param in read}
        for _, param in read:
            for spec in self.layers.by_weight[id(param)].values():
                self._note_gradient(spec.name, param)

    def _note_gradient(self, name: str, weight: Tensor) -> None:
        """Sum what comes to a weight, from the first that the capture shows of it on: a penalty may come first."""
        if name not in self._noted:
            self._noted.add(name)
            self._handles.append(first_hook(weight, lambda grad: self._add_gradient(name, grad)))

    def _is_checked(self, weight: Tensor) -> bool:
        """Whether the gradient of a weight is compared with what is recorded of its layers."""
        specs = self.layers.by_weight.get(id(weight), {}).values()
        return weight.requires_grad and any(self._checks(spec) for spec in specs)

    def _checks(self, spec: LayerSpec) -> bool:
        """Whether a layer is checked; one that joined later is when it is first seen."""
        one_pass = self._options.config.fisher == "empirical"
        return self._options.checks or (one_pass and spec.name not in self.layers.seen)

    def _note_transformed(self, called: Called) -> None:
        """A layer, perhaps of the model, runs where it cannot be recorded."""
        self.hint = TRANSFORMED
        if torch.is_grad_enabled():
            known = (spec for leaf in called.leaves() for spec in self.layers.by_weight.get(id(leaf), {}).values())
            self.transformed |= {spec.name for spec in known}

    def backward(
        self, run: Callable[[], object], inputs: Iterable[object] | None, *, again: bool, keeps: bool, adds: bool
    ) -> object:
        """Run a backward pass; see `Passes.run`."""
        return self.passes.run(run, inputs, again=again, keeps=keeps, adds=adds)

    def note_function(self, called: Called, operation: Operation, spec: LayerSpec, use: int = 0) -> None:
        """Remember how a layer, or what may prove to be one, is applied.

        Args:
            called: the function that applies it.
            operation: what it does; its call was noted.
            spec: the layer.
            use: which of its recorder's `uses` it is.
        """
        if spec.name in self.scale.calls:  # others have no rows
            rows = self.scale.calls[spec.name][-1]
            self.sights.note(called, operation, spec, use, rows, fused=self._seeing > 0)

    def _note_loss(self, part_of: Slice | None, gradient: Tensor | None) -> None:
        """The gradient that the mean of a loss function gets, perhaps one over a part of the targets."""
        if self.passes.aside or gradient is None:
            return
        self.scale.note_gradient(gradient)
        if part_of is not None:
            part_of.note_gradient(gradient)

    def _note_sum(self, rows: int, gradient: Tensor | None) -> None:
        """The gradient that the sum of a loss function over so many rows gets."""
        if not self.passes.aside and gradient is not None:
            self.scale.note_sum(rows, gradient)

    def operation(self, operation: Operation, output: Tensor) -> Tensor:
        """Record a weighted operation; returns the output to hand on in its place.

        A layer that runs within the backward pass is run again by activation checkpointing. Where checkpointing
        is reentrant, the first run was without gradients, and this one is recorded once its gradient arrives;
        otherwise the first run was recorded, and no gradient will reach this one.
        """
        if operation.input.is_nested:
            self.sights.obstruct("nested tensors")
            if not operation.unnest():
                self.uses.miss(
                    operation.weight, f"{operation.name} of a nested tensor that is not (N, jagged, P_in)"
                )
                return output
        spec = self._layer_of(operation)
        if spec is not None and not output.requires_grad and not in_backward():
            self._unrecorded.setdefault(spec.name, self.scale.gradient)
        if not output.requires_grad or not output.numel() or not operation.input.numel():
            self.hint = self.hint or (EMPTY if output.requires_grad and operation.weight.numel() else "")
            return output
        if operation.input.layout is not torch.strided and not self._densify(operation):
            return output
        self.uses.miss(operation.input, f"{operation.name} as its input")
        if output.is_complex():
            self.uses.miss(operation.weight, f"{operation.name} on complex data")
            return output
        if spec is None and self.uses.sources(operation.input):  # a product of parameters
            self.uses.derive(output, operation.input, operation.weight)
            return output
        whole = self.spec_of(operation.weight)
        if whole is not None and self._is_penalty(whole, operation):
            self.uses.multiply(output, operation.weight)
            return output
        if spec is None and whole is not None and whole.name not in self.recorders:
            self.layers.give_way(whole)
        spec = spec or self.layers.promote(operation)
        if spec is None:
            if operation.weight.requires_grad and not self.layers.knows(operation.weight):
                self._strangers[id(operation.weight)] = operation.weight
            self.uses.miss(operation.weight, operation.name)
            self.uses.miss(operation.bias, f"{operation.name} as its bias")
            return output
        return self.record(spec, operation, output, self.choose(spec, operation, output))

    def _is_penalty(self, spec: LayerSpec, operation: Operation) -> bool:
        """Whether a layer that is called with its bias is multiplied by a constant here, as penalties do.

        A spectral norm by power iteration is one. The product is followed, so that it shows if it meets data. A
        constant with as many rows as the layer has examples is data itself, of which no gradient is wanted.
        """
        known = spec.name in self.recorders or spec.name in self.layers.seen
        if not known or not operation.constant or spec.bias is None or operation.bias is not None:
            return False
        x = operation.input
        return x.dim() < 2 or len(x) == 1 or not self.scale.has_examples(spec.name, len(x))

    def _densify(self, operation: Operation) -> bool:
        """Take the rows of a sparse input for dense ones; whether that can be done."""
        self.sights.obstruct("sparse inputs")
        if operation.densify():
            return True
        self.uses.miss(operation.weight, f"{operation.name} of a sparse input too large to be made dense")
        return False

    def record(self, spec: LayerSpec, operation: Operation, output: Tensor, positions: Positions | None) -> Tensor:
        """Record a call of a covered layer; returns the output to hand on in its place."""
        own = spec.bias is not None and operation.bias is self.layers.params[spec.bias]
        if spec.bias is not None and operation.bias is None and spec.name not in self.recorders:
            spec = self.layers.without_bias(spec)
        if not own:
            self.uses.miss(operation.bias, f"{operation.name} as its bias")
        if spec.bias is not None and not (own and operation.bias_start == spec.bias_start):
            self.uses.miss(operation.weight, WITHOUT_BIAS)
        recorder = self.recorder(spec, operation.weight)
        if not isinstance(recorder, Recorder):  # a kind's, and not for operations of this sort
            self.uses.miss(operation.weight, operation.name)
            return output
        return self.attach(recorder, operation, output, positions)

    def attach(
        self, recorder: Recorder, operation: Operation, output: Tensor, positions: Positions | None
    ) -> Tensor:
        """Record a call's input now (or when its layer is run again), and its output gradient when it comes."""
        with apart_from_checkpoints():
            return self._attach(recorder, operation, output, positions)

    def _attach(
        self, recorder: Recorder, operation: Operation, output: Tensor, positions: Positions | None
    ) -> Tensor:
        again = in_backward()
        if not again:
            self._unrecorded.pop(recorder.spec.name, None)
            self._next_forward(recorder, self.scale.gradient)
        operation = operation.as_computed(output.dtype)
        geometry, rows = operation.geometry(output), operation.rows(output)
        device = output.device.type
        spec, options = recorder.spec, self._options
        sizes = {*rows.leading[:1], math.prod(rows.leading)}
        place = None if again else Place.of(spec.name, sizes, output)
        limit = options.config.row_limit.fitted(spec.block_sizes, candidates_for(spec.name, options.positions))

        def record() -> Call:
            if again and spec.name in self._unrecorded:
                # The forward pass that is made up for now came after another one's backward pass.
                self._next_forward(recorder, self._unrecorded.pop(spec.name))
            with torch.no_grad(), torch.autocast(device, enabled=False):
                call = recorder.input(operation, geometry, rows, positions, limit)
                call.place = place
                return call

        hook = self._gradient_hook(recorder, record if again else record(), output, operation.arrange)
        output, handle = output_hook(output, hook)
        self._handles.append(handle)
        return output

    def _next_forward(self, recorder: Recorder, loss_gradient: Tensor | None) -> None:
        """A further forward pass begins for a layer, after one whose loss got a gradient."""
        recorder.note_loss(loss_gradient)
        if recorder.has_seen:
            self.scale.take_parts(recorder.spec.name, recorder)
            recorder.end_group()

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
            if self.passes.aside:
                if isinstance(call, Call):
                    call.aside = True
                return
            if not self.passes.records:
                return
            self.passes.note()
            with torch._C.DisableTorchFunction(), torch.no_grad(), torch.autocast(device.type, enabled=False):
                # None is what an autograd.Function may return for zero.
                grad = torch.zeros(shape, device=device) if grad is None else grad
                grad = grad if grad.is_nested else grad.reshape(shape)
                if not isinstance(call, Call):
                    call = call()
                grad = grad if arrange is None else arrange(grad)
                self.passes.record(functools.partial(recorder.output_gradient, call, grad))

        return hook

    def spec_of(self, weight: Tensor, layout: Layout = ()) -> LayerSpec | None:
        """The covered layer of a weight, or of a part of it; None if there is none."""
        return self.layers.by_weight.get(id(weight), {}).get(layout)

    def _layer_of(self, operation: Operation) -> LayerSpec | None:
        """The covered layer that an operation applies, if it has one and reads its weight as the matrix it is."""
        spec = self.spec_of(operation.weight, operation.layout)
        return spec if spec is not None and operation.is_of(spec) else None

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
            checks = self._checks(spec) and weight.requires_grad  # else the bias alone may move
            self.recorders[spec.name] = self.layers.recorder(spec, dtype, one_pass=one_pass, checks=checks)
            self.weights[spec.name] = weight
            if checks:
                self._note_gradient(spec.name, weight)
        return self.recorders[spec.name]

    def _add_gradient(self, name: str, grad: Tensor) -> None:
        """What a backward pass adds to a weight's gradient in this process, all its uses together."""
        if self._counts():
            # A copy: the tensor becomes the parameter's .grad, which processes average and callers clip in place.
            grad = grad.detach().clone()
            self.gradients[name] = self.gradients[name] + grad if name in self.gradients else grad

    def _counts(self) -> bool:
        """Whether the backward pass at hand is one whose gradients the step finds."""
        return not self.passes.aside and not self.passes.returned

    def forget(self, name: str) -> None:
        """Drop what was gathered for a layer."""
        self.recorders.pop(name, None)

    def candidates(self, spec: LayerSpec, rows: Rows) -> list[Positions]:
        """The descriptions of positions that a layer may take, in order.

        Args:
            spec: the layer.
            rows: of the call at hand.
        """
        self.scale.note_call(spec.name, rows)
        return candidates_for(spec.name, self._options.positions)

    def choose(self, spec: LayerSpec, operation: Operation, output: Tensor) -> Positions | None:
        """The description of positions that a call takes."""
        self.scale.note_call(spec.name, operation.rows(output))
        first = spec.weight in self.layers.sequence_first
        return operation.positions(spec.name, output, self._options.positions, sequence_first=first)

    def kept_inputs(self) -> Iterator[Tensor]:
        """Inputs that are kept until their gradients come, most of them kept by autograd as well."""
        for recorder in self.recorders.values():
            yield from recorder.kept_inputs()

    # When the passes are over.

    def settle(self) -> None:
        """Settle what was left open, the kinds of layers theirs."""
        self.passes.settle()
        for watch in self._watches:
            watch.settle()

    def release(self) -> None:
        """Let go of what was gathered; nothing hangs on the graph any more, which a kept loss keeps alive."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.recorders.clear()
        self.weights.clear()
        self.scale.parts.end_pass()
        self.passes.release()
        self.penalties.release()
        self._parallels.clear()
        self.gradients.clear()
        self._noted.clear()
