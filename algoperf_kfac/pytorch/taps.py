"""Taps: what takes a layer's sums within a compiled graph, and counts how the graph reads its parameters.

The output of a layer passes through an identity, the tap. Its backward pass sees input and output gradient, forms
the layer's sums as uncompiled code does (`Recorder`), and hands them out as gradients of zeros of their shapes.
Nothing is written to while the graph runs, so that the graph does not break.

Graphs show nothing but sums: of two calls those of both together, which are not what K-FAC takes of them. So what
is handed out has counts beside it, of the layer's calls and of other operations that read its parameters. Where
there were more than a statistics step that ran uncompiled saw, the sums are turned into what is not a number, and
left out of the averages as such; the host, which does not wait for the device, hears of it later (`Arrival`).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algoperf_kfac.layers import LayerSpec
from algoperf_kfac.positions import Candidates, Positions, choose
from algoperf_kfac.pytorch import joining
from algoperf_kfac.pytorch.calls import Call
from algoperf_kfac.pytorch.forms import Forms, together
from algoperf_kfac.pytorch.operations import LOOKUPS, RULES, Function, Operation
from algoperf_kfac.pytorch.recorder import Recorder
from algoperf_kfac.pytorch.sights import TURNED, Sight
from algoperf_kfac.pytorch.statistics import Scalar

# What stands in for tensors of an operation that its sums do not read.
_NONE = torch.empty(0, device="meta")
# What graphs know taps by: a number is the only handle that a graph can hold.
_TAPS: weakref.WeakValueDictionary[int, Tap] = weakref.WeakValueDictionary()
_numbers = itertools.count()
# Weights by the number of a tap. Dynamo asks for the identity of what it meets where it met it first, and cannot in
# a mode: those that it may meet through a step's taps before it does through their modules have to stand here.
_WEIGHTS: dict[int, Tensor] = {}
# What comes with a tap's blocks: a_count, examples, vanished (where calls add up, in place of the latter two: how
# many examples fewer than were seen, and the square of it); calls of the layer; and what else reads its parameters,
# less what was seen to do so uncompiled.
COUNTS = 5
_HALF = 0.5  # what is counted comes in shares where there are several calls
# Functions that may transpose a weight, where dynamo sees them.
_TRANSPOSES: tuple[Function, ...] = (
    Tensor.t, torch.t, Tensor.transpose, torch.transpose, Tensor.permute, torch.permute, Tensor.swapaxes,
    torch.swapaxes, Tensor.swapdims, torch.swapdims, Tensor.adjoint, torch.adjoint,
)  # fmt: skip
# What taps take of torch's compiler, by module: older versions lack some of it, newer ones promise little of it.
_NEEDED = (
    ("torch.compiler", "allow_in_graph"),
    ("torch.compiler", "disable"),
    ("torch.compiler", "is_dynamo_compiling"),
    ("torch._dynamo.eval_frame", "skip_code"),
    ("torch._dynamo.variables.torch_function", "SymbolicTorchFunctionState"),  # modes entered outside are traced
)
_LISTS = (list, tuple)  # torch 2.9 does not trace `list | tuple`


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
        zeros: whose gradients the sums are: the blocks of A, those of B, and the numbers of `COUNTS`; of a layer
            that is called several times, what `joining.parts` gives, and the numbers. They take no memory.
        shown: calls whose sums were formed while the tap's graph ran as Python, where an observer sees them, too.
        number: what graphs know it by.
    """

    spec: LayerSpec
    recorder: Callable[[], Recorder]
    sight: Sight
    dtype: torch.dtype
    limit: int | None
    forms: Forms
    sequence_first: bool
    zeros: list[Tensor]
    shown: int = 0
    number: int = dataclasses.field(default_factory=lambda: next(_numbers))

    def __post_init__(self) -> None:
        _TAPS[self.number] = self

    def keep(self, weight: Tensor) -> None:
        """Have graphs find the layer's weight, as long as there is the tap."""
        _WEIGHTS[self.number] = weight
        weakref.finalize(self, _WEIGHTS.pop, self.number, None)

    def sums(self, operation: Operation, masks: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
        """The gradients of `zeros`.

        Args:
            operation: with its input; weight and bias do not matter.
            masks: of the positions.
            grad: of the operation's output.
        """
        self.shown += type(grad) is Tensor  # while a graph is traced it is of another type
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            operation = operation.as_computed(grad.dtype)
            candidates = together(self.forms, masks)
            positions = operation.positions(self.spec.name, grad, candidates, sequence_first=self.sequence_first)
            recorder = self.recorder()
            call = recorder.input(operation, operation.geometry(grad), operation.rows(grad), positions, self.limit)
            recorder.output_gradient(call, grad)
            known = -float(self.sight.readers) / self.sight.calls
            counts: tuple[Scalar, ...]
            if self.sight.calls > 1:
                blocks, counts = self._parts(recorder, [call], candidates)
                if not blocks:
                    blocks = [grad.new_zeros(zero.shape, dtype=self.dtype) for zero in self.zeros[:-1]]
                    counts = 0.0, 0.0, 0.0, self.sight.calls + 1.0
            else:
                recorder.end_group()
                sums = recorder.sums
                blocks = [*(sums.a or ()), *(sums.b or ())]
                counts = sums.a_count, sums.examples, sums.vanished, 1.0
            counts = *counts, known
            numbers = torch.stack([torch.as_tensor(n, dtype=self.dtype, device=grad.device) for n in counts])
            return [*blocks, numbers]

    def _parts(
        self, recorder: Recorder, calls: list[Call], candidates: Candidates
    ) -> tuple[list[Tensor], tuple[Scalar, ...]]:
        """What all calls of a recorder add to the blocks, and to the numbers but the last; no blocks where that
        does not add up with other calls.

        Where a batch has fewer examples than were seen, rows of zeros stand for the others.
        """
        examples, seen = calls[0].layout.num_examples, self.sight.examples
        fewer, number = seen - examples, len(calls)
        if fewer < 0 or any(call.layout.num_examples != examples for call in calls):
            return [], ()
        if fewer and (
            not joining.takes_all(seen, self.limit) or calls[0].layout.readout != self._readout(candidates)
        ):
            return [], ()
        blocks, rows = joining.parts(recorder, calls)
        if fewer:
            blocks = joining.filled(blocks, self.zeros[:-1])
        return blocks, (rows, float(number * fewer), float(number * fewer**2), float(number))

    def _readout(self, candidates: Candidates) -> str:
        """See `Positions`; of all calls together."""
        return (choose(self.spec.name, candidates, self.sight.rows) or Positions()).readout

    @property
    def fired(self) -> bool:
        """Whether graphs handed out sums: not if they read the layer's parameters in other operations alone."""
        return all(zero.grad is not None for zero in self.zeros)

    def clear(self) -> None:
        """Forget what graphs handed out."""
        self.shown = 0
        for zero in self.zeros:
            zero.grad = None

    def join(self, other: Recorder, masks: Sequence[Tensor]) -> bool:
        """Add calls that ran outside of graphs to what these handed out; whether that can be done.

        Args:
            other: saw these calls, and no others.
            masks: of the positions.
        """
        calls = [call for call in other.calls if call.seen]
        if self.sight.calls == 1 or not self.fired or self.shown or other.rows or not calls:
            return False
        blocks, counts = self._parts(other, calls, together(self.forms, masks))
        if not blocks:
            return False
        numbers = torch.stack([torch.as_tensor(n).to(blocks[0]) for n in (*counts, 0.0)])
        for zero, more in zip(self.zeros, [*blocks, numbers], strict=True):
            assert zero.grad is not None
            zero.grad = zero.grad + more
        return True

    def take(self, recorder: Recorder, numbers: Tensor, masks: Sequence[Tensor]) -> None:
        """Hand on what graphs handed out.

        Args:
            recorder: what it is given to.
            numbers: from `Taps.judged`.
            masks: of the positions.
        """
        blocks = [zero.grad for zero in self.zeros[:-1] if zero.grad is not None]
        self.clear()
        split = len(recorder.block_sizes[0])
        a_count, examples, vanished = numbers.unbind()
        if self.sight.calls > 1:
            of_all = self.recorder()
            joining.close(of_all, blocks, a_count, self._readout(together(self.forms, masks)), self.limit)
            sums = of_all.sums
            blocks, nothing = [*(sums.a or ()), *(sums.b or ())], 0 * a_count  # or not a number
            a_count, examples, vanished = sums.a_count + nothing, sums.examples + nothing, sums.vanished + nothing
        recorder.sums.add(blocks[:split], blocks[split:], a_count, examples, vanished, self.sight.examples)
        recorder.rounding = max(recorder.rounding, self.sight.rounding)


class _Identity(torch.autograd.Function):
    """A layer's output; its backward pass takes the sums."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, input: Tensor, tap: Tap, operation: Operation, masks: int, *tensors: Tensor
    ) -> Tensor:
        ctx.tap, ctx.operation = tap, operation
        ctx.save_for_backward(input, *tensors[:masks])
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        input, *masks = ctx.saved_tensors
        sums = ctx.tap.sums(dataclasses.replace(ctx.operation, input=input), masks, grad)
        return grad, None, None, None, None, *[None] * len(masks), *sums


class _Reading(torch.autograd.Function):
    """What an operation makes of a layer's parameter that is not the layer; its backward pass counts it."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, zero: Tensor) -> Tensor:
        ctx.like = zero.dtype, zero.device
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        dtype, device = ctx.like
        ones = torch.ones(1, dtype=dtype, device=device)
        return grads[0], F.pad(ones, (COUNTS - 1, 0))


def _record(
    output: Tensor, number: int, masks: list[Tensor], zeros: list[Tensor], args: Any, kwargs: Mapping[str, Any]
) -> Tensor:
    """The output of a call to hand on in its place; in the graph one operation, which dynamo does not look into."""
    if not output.requires_grad or not output.numel():
        return output
    tap = _TAPS[number]
    return _tap(output, tap, _rule(tap.sight.function)(*args, **kwargs), masks, zeros)


def _tap(output: Tensor, tap: Tap, operation: Operation, masks: list[Tensor], zeros: list[Tensor]) -> Tensor:
    bare = dataclasses.replace(operation, input=_NONE, weight=_NONE, bias=None)
    return _Identity.apply(output, operation.input.detach(), tap, bare, len(masks), *masks, *zeros)


def _record_turned(
    output: Tensor,
    input: Tensor,
    part: Tensor,
    number: int,
    weight: Tensor,
    masks: list[Tensor],
    zeros: list[Tensor],
) -> Tensor:
    """The same of a product with what may be the transpose of a layer's weight."""
    if part._base is not weight:
        return output
    if part.stride() != weight.stride()[::-1]:
        return _read(output, zeros[-1])
    if not output.requires_grad or not output.numel():
        return output
    return _tap(output, _TAPS[number], Operation("linear", input, weight, None), masks, zeros)


def _read(output: Tensor, zero: Tensor) -> Tensor:
    """The same of what another operation makes of a layer's parameter.

    Where a graph runs as Python, an observer sees that by itself.
    """
    return output if type(output) is Tensor or not output.requires_grad else _Reading.apply(output, zero)


def _read_turned(output: Tensor, part: Tensor, weights: list[Tensor], zeros: list[Tensor]) -> Tensor:
    """The same where an operation has a matrix that may be the transpose of a layer's weight.

    Dynamo asks no mode for attributes of tensors, such as `weight.T`.
    """
    for weight, zero in zip(weights, zeros, strict=True):
        if part._base is weight and part.requires_grad:
            return _read(output, zero)
    return output


def _rule(function: Function) -> Callable[..., Operation]:
    return LOOKUPS[function] if function in LOOKUPS else RULES[function]


# By identity of a weight: the number of its tap, its zeros, the function that applies the layer, and the identity
# of the layer's bias, None without one.
Table = dict[int, tuple[int, list[Tensor], Function, int | None]]
# Of weights that are matrices, by the sizes of their transposes: both, the numbers of taps, and their zeros.
Turned = list[tuple[int, int, list[int], list[Tensor]]]
# Of weights whose layers are products with the transpose: its sizes, the number of the tap, and its zeros.
Products = dict[int, tuple[int, int, int, list[Tensor]]]


def tapped(
    table: Table,
    lookups: Table,
    readers: dict[int, Tensor],
    turned: Turned,
    products: Products,
    masks: list[Tensor],
    func: Function,
    args: Any,
    kwargs: Mapping[str, Any],
) -> Any:
    """Run a function of torch, with a tap where it applies a layer; traced by dynamo.

    Args:
        table, lookups, readers, turned, products, masks: of the step's `Taps`.
        func, args, kwargs: the call.
    """
    # Written in Python, with a call of its super's that torch 2.9 does not trace.
    func = torch.unflatten if func is Tensor.unflatten else func
    output = func(*args, **kwargs)
    weight = args[1] if len(args) > 1 else kwargs.get("weight")
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    leaves = [*args, *kwargs.values()]
    # The identity of anything that is made within the graph is not known to dynamo.
    if isinstance(weight, nn.Parameter):
        found = (lookups if func is F.embedding else table).get(id(weight))
        if found is not None and func is found[2]:
            own = None if found[3] is None else (id(bias) if isinstance(bias, nn.Parameter) else 0)
            if own == found[3]:
                output = _record(output, found[0], masks, found[1], args, kwargs)
                leaves = [args[0] if args else kwargs.get("input")]
    taken: list[int] = []  # numbers of taps that take the call if it is one of their layers
    if products and _multiplies(func) and len(args) == 2 and isinstance(weight, Tensor) and weight.dim() == 2:
        for rows, columns, number, zeros in products.values():
            if weight.shape[0] == rows and weight.shape[1] == columns and isinstance(args[0], Tensor):
                taken.append(number)
                output = _record_turned(output, args[0], weight, number, _WEIGHTS[number], masks, zeros)
    turns = len(products) > 0 and _transposes(func)
    for leaf in leaves:
        for part in leaf if isinstance(leaf, _LISTS) else (leaf,):
            if isinstance(part, nn.Parameter):
                zero = readers.get(id(part))
                # Who reads the transpose of a layer's weight is seen where they do.
                if zero is not None and not (turns and id(part) in products):
                    output = _noted(output, zero)
            elif isinstance(part, Tensor) and isinstance(output, Tensor) and part.dim() == 2:
                for rows, columns, numbers, counts in turned:
                    if part.shape[0] == rows and part.shape[1] == columns:
                        others = [k for k, number in enumerate(numbers) if number not in taken]
                        weights = [_WEIGHTS[numbers[k]] for k in others]
                        output = _read_turned(output, part, weights, [counts[k] for k in others])
    return output


def _multiplies(func: Function) -> bool:
    return any(func is product for product in TURNED)


def _transposes(func: Function) -> bool:
    return any(func is transposes for transposes in _TRANSPOSES)


def _noted(output: Any, zero: Tensor) -> Any:
    """The output of an operation to hand on where it is none of a layer, and reads the layer's parameters."""
    if isinstance(output, Tensor):
        return _read(output, zero)
    if type(output) is tuple:
        return tuple([_noted(item, zero) for item in output])
    return output


def lacking() -> str | None:
    """The first part of torch's compiler without which there are no taps, if this torch lacks one."""
    for module, name in _NEEDED:
        try:
            found = hasattr(importlib.import_module(module), name)
        except ImportError:
            found = False
        if not found:
            return f"{module}.{name}"
    return None


@functools.cache
def leave_whole() -> None:
    """Have dynamo take `_record` as one operation; it is loaded when a model that it compiled is seen."""
    torch.compiler.allow_in_graph(_record)
    torch.compiler.allow_in_graph(_record_turned)
    torch.compiler.allow_in_graph(_read)
    torch.compiler.allow_in_graph(_read_turned)


@functools.cache
def leave_uncompiled(function: Callable[..., Any]) -> None:
    """Have dynamo leave out the frames of a function, which it still traces within the graphs of others.

    Where a graph breaks, it would compile a mode's handler by itself, and torch 2.9 then takes the getter of one
    property for that of another.
    """
    from torch._dynamo import eval_frame

    eval_frame.skip_code(function.__code__)


class Arrival:
    """The counts of some taps, on their way to the host, which does not wait for the device meanwhile.

    Args:
        taps: the taps.
        counts: (taps, 2), of calls, and of what else read the layer's parameters, less what is known to where there
            were calls.
    """

    def __init__(self, taps: list[Tap], counts: Tensor) -> None:
        self._taps = [(tap.spec.name, tap.sight.calls, 0 if tap.fired else tap.sight.readers) for tap in taps]
        self._counts = counts.to("cpu", non_blocking=counts.is_cuda)
        self._copied: torch.cuda.Event | None = None
        if counts.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(counts.device))

    def unlike(self) -> Iterator[tuple[str, str]]:
        """Layers that were used in another way than was known: name, and how."""
        if self._copied is not None:
            self._copied.synchronize()
        for (name, known, readers), (calls, others) in zip(self._taps, self._counts.tolist(), strict=True):
            if calls > known:
                yield (
                    name,
                    f"called {int(calls)} times" if known == 1 else "called more often or with another batch",
                )
            elif others > readers + _HALF:
                yield name, "read by further operations"


@dataclasses.dataclass(frozen=True)
class Incomplete:
    """A layer of which some uses handed out sums, and others, which it cannot do without, none.

    A product may read a view of the weight that was made in another graph, and cannot be told there.
    """

    name: str

    def unlike(self) -> Iterator[tuple[str, str]]:
        yield self.name, "not seen in all of its uses"


@dataclasses.dataclass(frozen=True)
class Taps:
    """The taps of one statistics step.

    Attributes:
        taps: of all covered layers, in the order of their uses.
        table: those of layers that multiply by their weight.
        lookups: those of weights whose rows are looked up.
        readers: by identity of a weight or bias, the zeros of the numbers beside a layer's sums.
        turned: the same of weights whose transposes are not seen to be made.
        products: layers that are products with the transpose, by identity of the weight.
        masks: of the positions given for this step.
        arrivals: where captures leave what the host is to hear of.
    """

    taps: list[Tap]
    table: Table
    lookups: Table
    readers: dict[int, Tensor]
    turned: Turned
    products: Products
    masks: list[Tensor]
    arrivals: list[Arrival | Incomplete]

    def clear(self) -> None:
        """Forget what graphs handed out."""
        for tap in self.taps:
            tap.clear()

    def judged(self, beside: Mapping[int, int]) -> dict[int, Tensor]:
        """Of the taps that fired, by number: a_count, examples, vanished; not numbers where the layer was used in
        another way than is known.

        Args:
            beside: by number of a tap, calls of its layer that ran outside of graphs.
        """
        alike: dict[Hashable, list[Tap]] = {}
        for tap in self.taps:
            if tap.zeros[-1].grad is not None:
                alike.setdefault((tap.dtype, tap.zeros[-1].device, tap.sight.calls), []).append(tap)
        judged: dict[int, Tensor] = {}
        for group in alike.values():
            numbers = torch.stack([tap.zeros[-1].grad for tap in group if tap.zeros[-1].grad is not None])
            for row, tap in enumerate(group):
                if beside.get(tap.number):
                    numbers[row, 3] += beside[tap.number]
            if (most := group[0].sight.calls) > 1:
                fewer, squares = numbers[:, 1], numbers[:, 2]  # by these calls of unlike batches show
                numbers[:, 3] += (most + 1) * (numbers[:, 3] * squares - fewer**2 > _HALF)
            unlike = (numbers[:, 3:4] > group[0].sight.calls) | (numbers[:, 4:] > _HALF)
            rows = torch.where(unlike, torch.nan, numbers[:, :3]).unbind()
            judged |= {tap.number: row for tap, row in zip(group, rows, strict=True) if tap.fired}
            self.arrivals.append(Arrival(group, numbers[:, 3:]))
        return judged
