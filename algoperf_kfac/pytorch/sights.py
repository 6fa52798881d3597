"""What compiled graphs have to know of a model's layers, as a statistics step that runs uncompiled sees them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from algoperf_kfac.config import TABLE
from algoperf_kfac.layers import LayerSpec
from algoperf_kfac.positions import Rows
from algoperf_kfac.pytorch.covered_layer import CoveredLayer
from algoperf_kfac.pytorch.hooks import in_backward
from algoperf_kfac.pytorch.kinds import AnyRecorder
from algoperf_kfac.pytorch.operations import FUNCTIONS, Called, Function, Operation
from algoperf_kfac.pytorch.recorder import Recorder

# Products with the transpose of a table.
TURNED: tuple[Function, ...] = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
# Functions that compiled graphs can take. Saved states know them by their number in this order, from 1 on: further
# ones come last.
TAPPED = (*FUNCTIONS, F.embedding, *TURNED)
MOST_DIMENSIONS = 7  # of the rows of a layer whose sight is saved


@dataclasses.dataclass(frozen=True)
class Sight:
    """A covered layer, or one of its uses (`AnyRecorder.uses`), as an uncompiled statistics step saw it.

    Attributes:
        function: what it calls.
        rows: of the call.
        examples: that it was taken to see.
        rounding: the coarsest eps of its input and output gradient.
        readers: what other operations made of the layer's parameters (penalties), in number of results.
        calls: of this use; more than one of lookups alone.
    """

    function: Function
    rows: Rows
    examples: int
    rounding: float
    readers: int = 0
    calls: int = 1

    def times(self, parts: int) -> Sight:
        """The same of a batch that has this one `parts` times."""
        if parts == 1:
            return self
        leading = list(self.rows.leading)
        dim = leading.index(self.examples) if self.examples in leading else 0
        leading[dim] *= parts
        rows = dataclasses.replace(self.rows, leading=tuple(leading))
        return dataclasses.replace(self, rows=rows, examples=self.examples * parts)


@dataclasses.dataclass(frozen=True)
class Applied:
    """A call of a layer that compiled graphs could take.

    Attributes:
        use: which of its recorder's `uses`.
        function: that was called.
        rows: of the call.
    """

    use: int
    function: Function
    rows: Rows


class Sights:
    """Gathers, over one statistics step, how layers are applied, and why compiled graphs could not take it."""

    def __init__(self) -> None:
        self._applied: dict[str, list[Applied | str]] = {}  # by layer: its calls, or why one cannot be taken
        self._obstacles: list[str] = []

    def obstruct(self, obstacle: str) -> None:
        """Remember why compiled graphs could not take all of the step."""
        self._obstacles.append(obstacle)

    def note(
        self, called: Called, operation: Operation, spec: LayerSpec, use: int, rows: Rows, *, fused: bool
    ) -> None:
        """Remember how a layer, or what may prove to be one, is applied.

        Args:
            called: the function that applies it.
            operation: what it does.
            spec: the layer.
            use: which of its recorder's `uses` it is.
            rows: of the call.
            fused: whether it is a part of another function.
        """
        obstacle = obstacle_of(called, operation, spec)
        if fused:
            obstacle = f"layer {spec.name} is part of a fused operation"
        elif in_backward():
            obstacle = f"layer {spec.name} is run again in the backward pass"
        self._applied.setdefault(spec.name, []).append(obstacle or Applied(use, called.func, rows))

    def of(
        self,
        recorders: Mapping[str, AnyRecorder],
        layers: Mapping[str, CoveredLayer],
        readers: Mapping[int, int],
    ) -> tuple[dict[str, tuple[Sight, ...]], list[str]]:
        """What compiled graphs have to know of layers, by use, in the order of `recorders`; and what forbids them.

        Args:
            recorders: closed, by layer, the one that sees the batch first.
            layers: the covered layers.
            readers: by identity of a parameter, results of operations that read it and do not apply its layer.
        """
        sights, obstacles = {}, list(self._obstacles)
        for name, recorder in recorders.items():
            calls = self._applied.get(name, [])
            found = [call for call in calls if isinstance(call, str)]
            applied: dict[int, list[Applied]] = {}
            for call in calls:
                if isinstance(call, Applied):
                    applied.setdefault(call.use, []).append(call)
            kind = layers[name].spec.kind
            repeated = [use for use, own in applied.items() if len(own) > 1]
            if not calls and not obstacles:
                found = [f"layer {name} is applied by a fused operation"]
            elif not found and not recorder.uses:
                found = [f"layer {name} is a {kind}"]
            elif not found and not all(_add_up(applied[use], recorder.uses[use]) for use in repeated):
                found = [f"layer {name} is called {len(calls)} times"]
            elif not found and calls and len(applied) < len(recorder.uses):
                found = [f"layer {name} is not used in all the ways of a {kind}"]
            obstacles += found
            if applied and not found:
                others = sum(readers.get(id(param), 0) for param in layers[name].params)
                sights[name] = tuple(
                    Sight(own[0].function, own[0].rows, one.rows, one.rounding, others, len(own))
                    for own, one in ((applied[use], one) for use, one in enumerate(recorder.uses))
                )
        return sights, list(dict.fromkeys(obstacles))


def _add_up(calls: list[Applied], use: Recorder) -> bool:
    """Whether what graphs hand out of several calls adds up: lookups of the same examples (see `joining`)."""
    alike = {call.function for call in calls} == {F.embedding} and not use.spec.watches_sums
    return alike and all(use.rows in call.rows.leading for call in calls)


def may_save(sight: Sight) -> bool:
    """Whether `to_numbers` has room for it."""
    return len(sight.rows.leading) <= MOST_DIMENSIONS


def to_numbers(turn: int, sight: Sight | None) -> list[int | float]:
    """A sight for a saved state: as many numbers whatever is known, see `checkpoint.to_tensors`.

    Args:
        turn: the layer's among those with sights, from 1 on; what else is to be said of it, up to 0.
        sight: None if nothing is known.

    Returns:
        Turn, function, examples, whether these come first, the dimensions of the rows, their sizes, readers, calls;
        and rounding.
    """
    if sight is None:
        return [turn] + [0] * (6 + MOST_DIMENSIONS) + [0.0]
    rows = sight.rows
    sizes = [*rows.leading, *[0] * (MOST_DIMENSIONS - len(rows.leading))]
    numbers = [turn, TAPPED.index(sight.function) + 1, sight.examples, rows.batch_first, len(rows.leading), *sizes]
    return [*map(int, numbers), sight.readers, sight.calls, float(sight.rounding)]


def is_known(numbers: Sequence[int | float]) -> bool:
    """Whether numbers from `to_numbers` stand for a sight."""
    return 0 < numbers[1] <= len(TAPPED)


def from_numbers(numbers: Sequence[int | float]) -> Sight:
    """The sight that numbers from `to_numbers` stand for."""
    _, function, examples, batch_first, dimensions, *sizes = (int(n) for n in numbers[:-1])
    rows = Rows(tuple(sizes[:dimensions]), bool(batch_first))
    readers, *calls = sizes[MOST_DIMENSIONS:]  # earlier states say nothing of calls
    return Sight(TAPPED[function - 1], rows, examples, float(numbers[-1]), readers, *calls)


def obstacle_of(called: Called, operation: Operation, spec: LayerSpec) -> str | None:
    """Why a call of a layer cannot be tapped; None if it can."""
    turned = called.func in TURNED and spec.kind == TABLE and len(called.args) == 2 and not called.kwargs
    plain = called.func in TAPPED and operation.weight is _weight_of(called)
    if not (plain or turned) or operation.arrange is not None or operation.mask is not None or spec.layout:
        return f"layer {spec.name} is applied by {called.name} to a part or a view of its weight"
    return None


def _weight_of(called: Called) -> object:
    return called.args[1] if len(called.args) > 1 else called.kwargs.get("weight")
