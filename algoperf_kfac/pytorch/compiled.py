"""Statistics inside compiled graphs: what torch.compile traces on statistics steps.

The output of a layer passes through an identity, the tap. Its backward pass sees input and output gradient, forms
the layer's sums as uncompiled code does (`Recorder`), and hands them out as gradients of zeros of their shapes.
Nothing is written to while the graph runs, so that the graph does not break; steps without statistics keep the
graph they have.

Which layers a model has and how they are read is learnt from a statistics step that runs uncompiled, the first one,
and saved with the optimizer's state. A model whose covered layers cannot all be tapped stays with such steps.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algoperf_kfac.errors import listed
from algoperf_kfac.layers import LayerSpec
from algoperf_kfac.positions import Candidates, Positions, candidates_for
from algoperf_kfac.pytorch.covered_layer import CoveredLayer
from algoperf_kfac.pytorch.discovery import unwrap
from algoperf_kfac.pytorch.kinds import AnyRecorder
from algoperf_kfac.pytorch.operations import LOOKUPS, RULES, Function, Operation
from algoperf_kfac.pytorch.recorder import Recorder
from algoperf_kfac.pytorch.sights import Sight, from_numbers, is_known, may_save, to_numbers
from algoperf_kfac.subset import RowLimit

# What stands in for tensors of an operation that its sums do not read.
_NONE = torch.empty(0, device="meta")
# What graphs know taps by: a number is the only handle that a graph can hold.
_TAPS: weakref.WeakValueDictionary[int, Tap] = weakref.WeakValueDictionary()
_numbers = itertools.count()

Table = dict[int, tuple[int, list[Tensor]]]
MakeRecorder = Callable[[LayerSpec, torch.dtype], AnyRecorder]
# Of one description: the number of its mask, or "gradient", or None; batch_dim; readout.
_Form = tuple[int | str | None, int | None, str]
_Forms = tuple[tuple[str, tuple[_Form, ...]], ...]  # by pattern
_WHOLE = ""  # the pattern of descriptions for the whole model


@dataclasses.dataclass(eq=False)
class Tap:
    """Takes the sums of one layer, or of one of its uses, within compiled graphs.

    Attributes:
        spec: the layer.
        recorder: makes one that saw nothing.
        sight: what is known of its call.
        dtype: of the factors.
        limit: from `limit_for`.
        forms: of the positions' descriptions.
        sequence_first: whether its module says that inputs are (T, N, features).
        zeros: whose gradients the sums are: the blocks of A, those of B, and (a_count, examples, vanished). They
            take no memory.
        number: what graphs know it by.
    """

    spec: LayerSpec
    recorder: Callable[[], Recorder]
    sight: Sight
    dtype: torch.dtype
    limit: int | None
    forms: _Forms
    sequence_first: bool
    zeros: list[Tensor]
    number: int = dataclasses.field(default_factory=lambda: next(_numbers))

    def __post_init__(self) -> None:
        _TAPS[self.number] = self

    def sums(self, operation: Operation, masks: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
        """The gradients of `zeros`.

        Args:
            operation: with its input; weight and bias do not matter.
            masks: of the positions.
            grad: of the operation's output.
        """
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            operation = operation.as_computed(grad.dtype)
            candidates = _together(self.forms, masks)
            positions = operation.positions(self.spec.name, grad, candidates, sequence_first=self.sequence_first)
            recorder = self.recorder()
            call = recorder.input(operation, operation.geometry(grad), operation.rows(grad), positions, self.limit)
            recorder.output_gradient(call, grad)
            recorder.end_group()
            sums = recorder.sums
            counts = (sums.a_count, sums.examples, sums.vanished)
            numbers = torch.stack([torch.as_tensor(n, dtype=self.dtype, device=grad.device) for n in counts])
            return [*(sums.a or ()), *(sums.b or ()), numbers]

    def clear(self) -> None:
        """Forget what graphs handed out."""
        for zero in self.zeros:
            zero.grad = None

    def take(self, recorder: Recorder) -> bool:
        """Hand on what graphs handed out; whether they did."""
        *blocks, numbers = (zero.grad for zero in self.zeros)
        self.clear()
        if numbers is None:
            return False
        sums = [block for block in blocks if block is not None]
        split = len(recorder.block_sizes[0])
        sight = self.sight
        a_count, examples, vanished = numbers.unbind()
        recorder.sums.add(sums[:split], sums[split:], a_count, examples, vanished, sight.examples)
        recorder.rounding = max(recorder.rounding, sight.rounding)
        return True


class _Identity(torch.autograd.Function):
    """A layer's output; its backward pass takes the sums."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, input: Tensor, tap: Tap, operation: Operation, masks: int, *tensors: Tensor
    ) -> Tensor:
        ctx.tap, ctx.operation = tap, operation
        ctx.save_for_backward(input, *tensors[:masks])
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        input, *masks = ctx.saved_tensors
        sums = ctx.tap.sums(dataclasses.replace(ctx.operation, input=input), masks, grad)
        return grad, None, None, None, None, *[None] * len(masks), *sums


def _record(
    output: Tensor, number: int, masks: list[Tensor], zeros: list[Tensor], args: Any, kwargs: Mapping[str, Any]
) -> Tensor:
    """The output of a call to hand on in its place; in the graph one operation, which dynamo does not look into."""
    if not output.requires_grad or not output.numel():
        return output
    tap = _TAPS[number]
    operation = _rule(tap.sight.function)(*args, **kwargs)
    bare = dataclasses.replace(operation, input=_NONE, weight=_NONE, bias=None)
    return _Identity.apply(output, operation.input.detach(), tap, bare, len(masks), *masks, *zeros)


def tapped(
    table: Table, lookups: Table, masks: list[Tensor], func: Function, args: Any, kwargs: Mapping[str, Any]
) -> Any:
    """Run a function of torch, with a tap where it applies a layer; traced by dynamo.

    Args:
        table, lookups, masks: of the step's `Taps`.
        func, args, kwargs: the call.
    """
    # Written in Python, with a call of its super's that torch 2.9 does not trace.
    func = torch.unflatten if func is Tensor.unflatten else func
    output = func(*args, **kwargs)
    weight = args[1] if len(args) > 1 else kwargs.get("weight")
    # The identity of anything that is made within the graph is not known to dynamo.
    if isinstance(weight, nn.Parameter):
        found = (lookups if func is F.embedding else table).get(id(weight))
        if found is not None:
            return _record(output, found[0], masks, found[1], args, kwargs)
    return output


@functools.cache
def _leave_whole() -> None:
    """Have dynamo take `_record` as one operation; it is loaded when a model that it compiled is seen."""
    torch.compiler.allow_in_graph(_record)


@functools.cache
def leave_uncompiled(function: Callable[..., Any]) -> None:
    """Have dynamo leave out the frames of a function, which it still traces within the graphs of others.

    Where a graph breaks, it would compile a mode's handler by itself, and torch 2.9 then takes the getter of one
    property for that of another.
    """
    from torch._dynamo import eval_frame

    eval_frame.skip_code(function.__code__)


@dataclasses.dataclass(frozen=True)
class Taps:
    """The taps of one statistics step.

    Attributes:
        taps: of all covered layers, in the order of their uses.
        table: by identity of a weight that multiplies, its tap's number and zeros.
        lookups: the same of a weight whose rows are looked up.
        masks: of the positions given for this step.
    """

    taps: list[Tap]
    table: Table
    lookups: Table
    masks: list[Tensor]

    def clear(self) -> None:
        """Forget what graphs handed out."""
        for tap in self.taps:
            tap.clear()


class CompiledStatistics:
    """Decides whether statistics steps of a model run compiled, and makes its taps.

    Args:
        model: as it was given, perhaps in wrappers.
        allowed: whether statistics may be taken in compiled graphs.
        alone: whether this is the only process.
    """

    def __init__(self, model: nn.Module, *, allowed: bool, alone: bool) -> None:
        self._allowed, self._alone = allowed, alone
        self._compiled = _is_compiled(model)
        self._model = unwrap(model)
        self.forget()

    def share(self) -> None:
        """There proved to be several processes."""
        self._alone = False

    def forget(self) -> None:
        """Learn anew: layers joined or left."""
        self._sights: dict[str, tuple[Sight, ...]] = {}
        self._obstacles: list[str] = []
        self._learnt = False
        self._made: dict[tuple[object, ...], Taps] = {}

    def __getstate__(self) -> dict[str, Any]:
        """For deepcopy and pickle: without what hangs on identities."""
        return {name: getattr(self, name) for name in ("_allowed", "_alone", "_compiled", "_model")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.forget()

    @property
    def is_compiled(self) -> bool:
        """Whether torch.compile compiled the model, as far as that can be seen."""
        self._compiled = self._compiled or _is_compiled(self._model)
        return self._compiled

    def saved(self, covered: Iterable[str]) -> dict[str, list[list[int | float]]]:
        """What is known of layers, as numbers, so that a resumed run takes the same steps compiled.

        For each use of a layer its turn (0: nothing is known) and the numbers of `sights.to_numbers`.
        """
        order = list(self._sights)
        return {
            name: [to_numbers(order.index(name) + 1, sight) for sight in self._sights[name]]
            if self._may_save(name)
            else [to_numbers(0, None)]
            for name in covered
        }

    def _may_save(self, name: str) -> bool:
        """Obstacles are learnt anew; they may be gone."""
        known = self._sights.get(name, ())
        return bool(known) and not self._obstacles and all(map(may_save, known))

    def restore(self, saved: Mapping[str, Sequence[Sequence[int | float]]]) -> None:
        """Go on from what `saved` gave; where it does not know every layer, learn anew."""
        self.forget()
        found = sorted((uses[0][0], name, uses) for name, uses in saved.items())
        if found and all(is_known(use) for _, _, uses in found for use in uses):
            self.learn({name: tuple(map(from_numbers, uses)) for _, name, uses in found}, ())

    def learn(self, sights: Mapping[str, tuple[Sight, ...]], obstacles: Iterable[str]) -> None:
        """Take note of an uncompiled statistics step.

        Args:
            sights: of the layers that can be tapped, each of their uses; the one that sees the batch first.
            obstacles: why others cannot.
        """
        self._learnt = True
        self._sights = {**sights, **{name: s for name, s in self._sights.items() if name not in sights}}
        self._obstacles = list(obstacles)
        self._made.clear()

    def obstacle(self, covered: Iterable[str]) -> str | None:
        """Why the next statistics step of these layers runs uncompiled; None if it does not."""
        if not self._allowed:
            return "compiled_statistics=False"
        if not self._alone:
            return "there are several processes"
        if not self._learnt:
            return "the first one does"
        if self._obstacles:
            return listed(self._obstacles)
        unseen = [name for name in covered if name not in self._sights]
        return f"layer {listed(unseen)} was not called so far" if unseen else None

    def note(self, covered: Iterable[str]) -> str | None:
        """What to say of the statistics steps of a model; None of one that is not compiled."""
        if not self.is_compiled:
            return None
        reason = self.obstacle(covered)
        return "statistics steps run compiled" if reason is None else f"statistics steps run uncompiled: {reason}"

    def taps(
        self,
        covered: Mapping[str, CoveredLayer],
        candidates: Candidates,
        rows: RowLimit,
        sequence_first: Iterable[str],
        recorder: MakeRecorder,
    ) -> Taps | None:
        """The taps of a statistics step; None where it runs uncompiled.

        Args:
            covered: the layers.
            candidates: descriptions of their positions.
            rows: `KFACConfig.row_limit`.
            sequence_first: names of parameters whose modules say that inputs are (T, N, features).
            recorder: makes that of a layer, with factors of a dtype.
        """
        if not self.is_compiled or self.obstacle(covered) is not None:
            return None
        apart = _apart(candidates)
        if apart is None:
            return None
        forms, masks = apart
        _leave_whole()
        # Models are cast and moved.
        weights = tuple(
            (layer.spec, id(layer.weight), layer.weight.dtype, layer.weight.device) for layer in covered.values()
        )
        made = self._made.get((forms, weights))
        if made is None:
            made = self._make(covered, candidates, rows, set(sequence_first), forms, recorder)
            self._made[forms, weights] = made
        made.clear()
        return dataclasses.replace(made, masks=masks)

    def _make(
        self,
        covered: Mapping[str, CoveredLayer],
        candidates: Candidates,
        rows: RowLimit,
        sequence_first: set[str],
        forms: _Forms,
        recorder: MakeRecorder,
    ) -> Taps:
        taps: list[Tap] = []
        table: Table = {}
        lookups: Table = {}
        for name in (name for name in self._sights if name in covered):
            layer = covered[name]
            spec, weight = layer.spec, layer.weight
            dtype = torch.promote_types(weight.dtype, torch.float32)
            zero = torch.zeros((), dtype=dtype, device=weight.device)
            limit = rows.fitted(spec.block_sizes, candidates_for(name, candidates))
            for use, sight in enumerate(self._sights[name]):

                def make(spec: LayerSpec = spec, dtype: torch.dtype = dtype, use: int = use) -> Recorder:
                    return recorder(spec, dtype).uses[use]

                shapes = [(spec.groups, size, size) for sizes in make().block_sizes for size in sizes]
                zeros = [zero.expand(shape).requires_grad_() for shape in (*shapes, (3,))]
                first = spec.weight in sequence_first
                tap = Tap(spec, make, sight, dtype, limit, forms, first, zeros)
                taps.append(tap)
                (lookups if sight.function in LOOKUPS else table)[id(weight)] = (tap.number, zeros)
        return Taps(taps, table, lookups, [])


def _rule(function: Function) -> Callable[..., Operation]:
    return LOOKUPS[function] if function in LOOKUPS else RULES[function]


def _is_compiled(model: nn.Module) -> bool:
    """Whether a model is in torch.compile's wrapper, or its module or a part of it was compiled in place."""
    if "torch._dynamo" not in sys.modules:
        return False
    return any(
        "_orig_mod" in module._modules or module._compiled_call_impl is not None for module in model.modules()
    )


def _apart(candidates: Candidates) -> tuple[_Forms, list[Tensor]] | None:
    """Descriptions of positions without their masks, and these; None where they have segments, or no tensors."""
    masks: list[Tensor] = []
    by_pattern = candidates if isinstance(candidates, Mapping) else {_WHOLE: candidates}
    forms = []
    for pattern, own in by_pattern.items():
        described: list[_Form] = []
        for one in own:
            mask: int | str | None = one.mask if isinstance(one.mask, str) else None
            if one.segment_ids is not None or (one.array_mask is not None and not isinstance(one.mask, Tensor)):
                return None
            if isinstance(one.mask, Tensor):
                mask = len(masks)
                masks.append(one.mask)
            described.append((mask, one.batch_dim, one.readout))
        forms.append((pattern, tuple(described)))
    return tuple(forms), masks


def _together(forms: _Forms, masks: Sequence[Tensor]) -> Candidates:
    """The inverse of `_apart`."""
    by_pattern: dict[str, list[Positions]] = {}
    for pattern, described in forms:
        by_pattern[pattern] = [
            Positions(mask=masks[mask] if isinstance(mask, int) else mask, batch_dim=batch_dim, readout=readout)
            for mask, batch_dim, readout in described
        ]
    return by_pattern.get(_WHOLE, []) if set(by_pattern) <= {_WHOLE} else by_pattern
