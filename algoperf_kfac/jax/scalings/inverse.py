"""The paper's own form, damped inverses by Cholesky decomposition: (B + l_B I)^-1 M (A + l_A I)^-1."""

from __future__ import annotations

from algoperf_kfac.cost import INVERSE_FLOPS, ScalingFlops, cubes, product_flops
from algoperf_kfac.jax.preconditioner import Blocks, LayerState
from algoperf_kfac.jax.scalings import _base
from algoperf_kfac.layers import LayerSpec


class Scaling(_base.Scaling):
    """The inverses are the operators."""

    uses_bases = False

    def operators(self, state: LayerState) -> tuple[Blocks, Blocks]:
        return state.a_basis, state.b_basis

    def flops(self, spec: LayerSpec) -> ScalingFlops:
        return ScalingFlops(INVERSE_FLOPS * cubes(spec), product_flops(spec))
