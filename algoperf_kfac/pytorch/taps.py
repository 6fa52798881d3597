"""Taps: what takes a layer's sums within a compiled graph, and what becomes of these.

Graphs (`tapped.py`) have a tap form the sums of input and output gradient, and hand them out as gradients of zeros.
They show nothing but sums: of two calls those of both together, which are not what K-FAC takes of them. So what
is handed out has counts beside it, of the layer's calls and of other operations that read its parameters. Where
there were more than a statistics step that ran uncompiled saw, the sums are turned into what is not a number, and
left out of the averages as such; the host, which does not wait for the device, hears of it later (`Arrival`).
"""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from algoperf_kfac.layers import LayerSpec
from algoperf_kfac.positions import Candidates, Positions, choose
from algoperf_kfac.pytorch import joining
from algoperf_kfac.pytorch.calls import Call
from algoperf_kfac.pytorch.forms import Forms, together
from algoperf_kfac.pytorch.operations import Function, Operation
from algoperf_kfac.pytorch.recorder import Recorder
from algoperf_kfac.pytorch.sights import Sight
from algoperf_kfac.pytorch.statistics import Scalar

# What graphs know taps by: a number is the only handle that a graph can hold.
TAPS: weakref.WeakValueDictionary[int, Tap] = weakref.WeakValueDictionary()
_numbers = itertools.count()
# Weights by the number of a tap. Dynamo asks for the identity of what it meets where it met it first, and cannot in
# a mode: those that it may meet through a step's taps before it does through their modules have to stand here.
WEIGHTS: dict[int, Tensor] = {}
# What comes with a tap's blocks: a_count, examples, vanished (where calls add up, in place of the latter two: how
# many examples fewer than were seen, and the square of it); calls of the layer; and what else reads its parameters,
# less what was seen to do so uncompiled.
COUNTS = 5
_HALF = 0.5  # what is counted comes in shares where there are several calls
# By identity of a weight: the number of its tap, its zeros, the function that applies the layer, and the identity
# of the layer's bias, None without one.
Table = dict[int, tuple[int, list[Tensor], Function, int | None]]
# Of weights that are matrices, by the sizes of their transposes: both, the numbers of taps, and their zeros.
Turned = list[tuple[int, int, list[int], list[Tensor]]]
# Of weights whose layers are products with the transpose: its sizes, the number of the tap, and its zeros.
Products = dict[int, tuple[int, int, int, list[Tensor]]]


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
        TAPS[self.number] = self

    def keep(self, weight: Tensor) -> None:
        """Have graphs find the layer's weight, as long as there is the tap."""
        WEIGHTS[self.number] = weight
        weakref.finalize(self, WEIGHTS.pop, self.number, None)

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
        like = blocks[0]
        numbers = torch.stack([torch.as_tensor(n, dtype=like.dtype, device=like.device) for n in (*counts, 0.0)])
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
