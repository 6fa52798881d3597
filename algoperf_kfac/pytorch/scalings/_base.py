"""What a scaling is: the step from decomposed factors to a layer's direction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from algoperf_kfac.assignment import deal
from algoperf_kfac.config import KFACConfig
from algoperf_kfac.cost import ScalingFlops, StateBytes, cubes, decomposition_flops, product_flops, squares, widths
from algoperf_kfac.layers import LayerSpec
from algoperf_kfac.pytorch.preconditioner import LayerState, multiply

COUNTS_PER_LAYER = 4  # tensors of one number: weight of the averages, examples, dropped and vanished statistics

Operators = tuple[list[Tensor], list[Tensor]]
Function = TypeVar("Function", bound=Callable[..., Any])


def by_group(*reads: str) -> Callable[[Function], Function]:
    """Say of a `precondition` that it treats each channel group by itself.

    Layers of equal shape then come to it at once, as the groups of one state (`pytorch/stacks.py`). One that
    does not say so, like an override of a user's, is called layer by layer.

    Args:
        reads: the lists of tensors (groups, ...) of a `LayerState` that it reads; it is given no others, nor what
            is kept.
    """

    def mark(function: Function) -> Function:
        function.__dict__["reads"] = reads
        return function

    return mark


class Scaling:
    """A way to scale a layer's momentum by its curvature; one object for all layers of an optimizer.

    This base multiplies by two operators, which subclasses make from the bases. A scaling that does something else
    overrides `precondition`, and says in `keeps` what it remembers for it.

    Args:
        config: the configuration.

    Attributes:
        uses_bases: whether a refresh gives eigenbases and damped eigenvalues; damped inverses if not.
        uses_gradient: whether `precondition` reads the step's gradient, which costs a copy.
    """

    uses_bases: bool = True
    uses_gradient: bool = False

    def __init__(self, config: KFACConfig) -> None:
        self.config = config

    # What it keeps, and what it costs.

    @property
    def keeps_bases(self) -> bool:
        """Whether a layer keeps its bases: by default where the next refresh asks for them.

        To see whether the factors have drifted away from them, or to follow the factors from them. A scaling that
        reads them at every step says so; `operators` has them in any case.
        """
        return self.uses_bases and (self.config.drift_tolerance > 0 or self.config.decomposition == "qr")

    def keeps(self, spec: LayerSpec, like: Tensor) -> dict[str, Tensor | int]:
        """What a layer keeps for the scaling in `LayerState.kept`, as it is at the beginning.

        Args:
            spec: the layer.
            like: dtype and device of the layer's factors.
        """
        return {}

    def num_bytes(self, spec: LayerSpec, itemsize: int) -> StateBytes:
        """Bytes that a layer keeps beside its factors after its first refresh; see `cost.Scaling`."""
        bases = (squares(spec) if self.keeps_bases else 0) + (widths(spec) if self.uses_bases else 0)
        kept = self.keeps(spec, torch.empty(0, device="meta")).values()
        operators = self.operator_elements(spec) + sum(t.numel() for t in kept if isinstance(t, Tensor))
        return StateBytes(itemsize * bases, itemsize * operators, itemsize * COUNTS_PER_LAYER)

    def operator_elements(self, spec: LayerSpec) -> int:
        """Entries of a layer's operators."""
        return squares(spec)

    def flops(self, spec: LayerSpec) -> ScalingFlops:
        """Of a refresh, and of the direction at every step; see `cost.Scaling`."""
        each = decomposition_flops(self.config, uses_bases=self.uses_bases)
        return ScalingFlops(each * cubes(spec), product_flops(spec))

    # Who does it.

    def owners(self, specs: Sequence[LayerSpec], workers: int) -> list[int]:
        """Which of several data-parallel workers makes each layer's direction, by flops; empty if all make all.

        All do where `precondition` is not marked by `by_group`, as that of "second_moment": it may change what is
        kept at every step, which would have to be sent on top. They do as well where one would have all the work,
        as of a single layer: the others would wait for it no shorter.
        """
        if workers == 1 or not hasattr(self.precondition, "reads"):
            return []
        owners = deal([self.flops(spec).step for spec in specs], workers)
        return owners if len(set(owners)) > 1 else []

    def dealt(self, specs: Sequence[LayerSpec], workers: int) -> list[list[int]]:
        """The numbers of the layers whose directions each worker makes; see `cost.Scaling`."""
        owners = self.owners(specs, workers)
        if not owners:
            return [list(range(len(specs)))] * workers
        return [[i for i, owner in enumerate(owners) if owner == worker] for worker in range(workers)]

    # At a refresh.

    def operators(self, state: LayerState) -> Operators:
        """What a step multiplies the momentum by on the side of A, and of B."""
        raise NotImplementedError

    def transport(self, state: LayerState, a_basis: list[Tensor], b_basis: list[Tensor]) -> None:
        """Carry what is kept over to new bases; `state` still has the old ones."""

    # At every step.

    @by_group("a_operator", "b_operator")
    def precondition(self, state: LayerState, momentum: Tensor, grad: Tensor, beta2: float) -> Tensor:
        """The direction of one layer after its first refresh.

        Args:
            state: the layer's; what is kept may be updated.
            momentum: (groups, P_out, P_in), what is preconditioned.
            grad: (groups, P_out, P_in), the step's gradient; the momentum again unless `uses_gradient`.
            beta2: decay of second moments.

        Returns:
            (groups, P_out, P_in).
        """
        return multiply(state.b_operator, momentum, state.a_operator)
