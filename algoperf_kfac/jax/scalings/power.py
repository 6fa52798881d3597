"""A power of the damped eigenvalues: 1 is K-FAC's own, 1/2 Adam's in the eigenbasis.

    U_B [ (U_B^T M U_A) / ((b + l_B)(a + l_A)^T)^p ] U_A^T  =  B_op M A_op,   A_op = U_A (a + l_A)^-p U_A^T

Scaling by a power of eigenvalues is separable, so that the operators are formed once per refresh and a step costs
two products.
"""

from __future__ import annotations

from algoperf_kfac.cost import OPERATOR_FLOPS, ScalingFlops, cubes
from algoperf_kfac.jax.preconditioner import Blocks, LayerState, from_eigenvalues
from algoperf_kfac.jax.scalings import _base
from algoperf_kfac.layers import LayerSpec


class Scaling(_base.Scaling):
    """Both factors to the power -`KFACConfig.exponent`."""

    def operators(self, state: LayerState) -> _base.Operators:
        return self._scaled(state.a_basis, state.a_values), self._scaled(state.b_basis, state.b_values)

    def _scaled(self, bases: Blocks, values: Blocks) -> Blocks:
        return from_eigenvalues(bases, [v**-self.config.exponent for v in values])

    def flops(self, spec: LayerSpec) -> ScalingFlops:
        of_base = super().flops(spec)
        return ScalingFlops(of_base.refresh + OPERATOR_FLOPS * cubes(spec), of_base.step)
