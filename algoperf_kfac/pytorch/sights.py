"""What compiled graphs have to know of a model's layers, as a statistics step that runs uncompiled sees them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from algoperf_kfac.layers import LayerSpec
from algoperf_kfac.positions import Rows
from algoperf_kfac.pytorch.covered_layer import CoveredLayer
from algoperf_kfac.pytorch.hooks import in_backward
from algoperf_kfac.pytorch.kinds import AnyRecorder
from algoperf_kfac.pytorch.operations import RULES, Called, Function, Operation
from algoperf_kfac.pytorch.recorder import Recorder


@dataclasses.dataclass(frozen=True)
class Sight:
    """A covered layer as an uncompiled statistics step saw it.

    Attributes:
        function: what it calls.
        rows: of the call.
        examples: that it was taken to see.
        rounding: the coarsest eps of its input and output gradient.
    """

    function: Function
    rows: Rows
    examples: int
    rounding: float


class Sights:
    """Gathers, over one statistics step, how layers are applied, and why compiled graphs could not take it."""

    def __init__(self) -> None:
        self._functions: dict[str, list[Function]] = {}  # that apply layers, and could be tapped
        self._obstacles: list[str] = []

    def obstruct(self, obstacle: str) -> None:
        """Remember why compiled graphs could not take all of the step."""
        self._obstacles.append(obstacle)

    def note(self, called: Called, operation: Operation, spec: LayerSpec, *, fused: bool) -> None:
        """Remember how a layer is applied.

        Args:
            called: the function that applies it.
            operation: what it does.
            spec: the layer.
            fused: whether it is a part of another function.
        """
        obstacle = obstacle_of(called, operation, spec)
        if fused:
            obstacle = f"layer {spec.name} is part of a fused operation"
        elif in_backward():
            obstacle = f"layer {spec.name} is run again in the backward pass"
        if obstacle is not None:
            self._obstacles.append(obstacle)
            return
        self._functions.setdefault(spec.name, []).append(called.func)

    def of(
        self,
        recorders: Mapping[str, AnyRecorder],
        calls: Mapping[str, Sequence[Rows]],
        layers: Mapping[str, CoveredLayer],
    ) -> tuple[dict[str, Sight], list[str]]:
        """What compiled graphs have to know of layers, in the order of `recorders`; and what forbids them.

        Args:
            recorders: closed, by layer, the one that sees the batch first.
            calls: by layer, the rows of its calls.
            layers: the covered layers.
        """
        sights, obstacles = {}, list(dict.fromkeys(self._obstacles))
        for name, recorder in recorders.items():
            functions = self._functions.get(name, [])
            if not functions and not obstacles:
                obstacles.append(f"layer {name} is applied by a fused operation")
            if len(functions) > 1:
                obstacles.append(f"layer {name} is called {len(functions)} times")
            elif functions and type(recorder) is Recorder:
                sights[name] = Sight(functions[0], calls[name][0], recorder.rows, recorder.rounding)
            elif functions:
                obstacles.append(f"layer {name} is a {layers[name].spec.kind}")
        return sights, obstacles


def obstacle_of(called: Called, operation: Operation, spec: LayerSpec) -> str | None:
    """Why a call of a layer cannot be tapped; None if it can."""
    plain = called.func in RULES and operation.weight is _weight_of(called)
    if not plain or operation.arrange is not None or operation.mask is not None or spec.layout:
        return f"layer {spec.name} is applied by {called.name} to a part or a view of its weight"
    return None


def _weight_of(called: Called) -> object:
    return called.args[1] if len(called.args) > 1 else called.kwargs.get("weight")
