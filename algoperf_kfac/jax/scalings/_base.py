"""The interface of a scaling, and what most of them share. Everything works on one layer, under `jax.vmap`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from algoperf_kfac.assignment import runs
from algoperf_kfac.config import KFACConfig
from algoperf_kfac.cost import ScalingFlops, StateBytes, cubes, decomposition_flops, product_flops, squares, widths
from algoperf_kfac.jax.preconditioner import NUM_COUNTERS, NUM_NUMBERS, Blocks, LayerState, multiply
from algoperf_kfac.layers import LayerSpec

Kept: TypeAlias = dict[str, Array]
"""What a scaling keeps of a layer beside operators and bases, by name."""


Operators: TypeAlias = tuple[Blocks, Blocks]
"""Of A, and of B."""


class Scaling:
    """Operators that are recomputed at every refresh multiply the momentum: B_op M A_op.

    Args:
        config: the configuration.

    Attributes:
        uses_bases: whether it takes eigenbases and damped eigenvalues; else damped inverses.
        keeps_operators: whether a layer keeps operators.
    """

    uses_bases = True
    keeps_operators = True

    def __init__(self, config: KFACConfig) -> None:
        self.config = config

    @property
    def keeps_bases(self) -> bool:
        """Whether a layer keeps its bases: by default where the next refresh asks for them.

        To see whether the factors have drifted away from them, or to follow the factors from them.
        """
        return self.uses_bases and (self.config.drift_tolerance > 0 or self.config.decomposition == "qr")

    def keeps(self, spec: LayerSpec, dtype: DTypeLike) -> Kept:
        """What a layer keeps beside operators and bases, before the first step.

        Args:
            spec: the layer.
            dtype: of its factors.
        """
        return {}

    def operators(self, state: LayerState) -> Operators:
        """What the momentum is multiplied by on the side of A, and of B; empty blocks for none.

        Args:
            state: with the new bases and eigenvalues; where the scaling uses none, `a_basis` and `b_basis` are
                the damped inverses.
        """
        return (), ()

    def precondition(self, state: LayerState, momentum: Array, gradient: Array) -> tuple[Array, Kept]:
        """The direction of one step.

        Args:
            state: of the layer.
            momentum: (groups, P_out, P_in), what is preconditioned.
            gradient: (groups, P_out, P_in), of this step.

        Returns:
            (groups, P_out, P_in), `momentum` itself before the first successful refresh; and what is kept from
            now on.
        """
        return multiply(state.b_operator, momentum, state.a_operator), state.kept

    def transport(self, state: LayerState, a_basis: Blocks, b_basis: Blocks) -> Kept:
        """What is kept, in new bases; asked where bases are kept.

        Args:
            state: with the old bases.
            a_basis, b_basis: the new ones.
        """
        return state.kept

    def num_bytes(self, spec: LayerSpec, itemsize: int) -> StateBytes:
        """What a layer keeps beside its factors; see `cost.Scaling`."""
        kept = jax.tree.leaves(jax.eval_shape(lambda: self.keeps(spec, jnp.float32)))
        arrays = sum(leaf.size for leaf in kept if leaf.ndim)
        scalars = sum(leaf.dtype.itemsize for leaf in kept if not leaf.ndim)
        return StateBytes(
            bases=itemsize * (squares(spec) + widths(spec)) if self.keeps_bases else 0,
            operators=itemsize * (arrays + (squares(spec) if self.keeps_operators else 0)),
            counts=itemsize * NUM_NUMBERS + 4 * NUM_COUNTERS + scalars,
        )

    def flops(self, spec: LayerSpec) -> ScalingFlops:
        """What a layer's refresh and its direction at every step take; see `cost.Scaling`."""
        each = decomposition_flops(self.config, uses_bases=self.uses_bases)
        return ScalingFlops(each * cubes(spec), product_flops(spec))

    def dealt(self, specs: Sequence[LayerSpec], workers: int) -> list[list[int]]:
        """The numbers of the layers whose directions each device makes; see `sharding.by_layers`."""
        alike: dict[tuple[object, ...], list[int]] = {}
        for number, spec in enumerate(specs):  # as in stacks
            shape = spec.groups, spec.out_dim, spec.factor_in_dim, spec.in_blocks, spec.out_blocks
            alike.setdefault(shape, []).append(number)
        devices: list[list[int]] = [[] for _ in range(workers)]
        for stack in alike.values():
            parts = runs(len(stack), workers) if len(stack) >= workers else [range(len(stack))] * workers
            for device, part in zip(devices, parts, strict=True):
                device += [stack[i] for i in part]
        return devices
