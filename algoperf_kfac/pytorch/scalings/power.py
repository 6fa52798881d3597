"""Scaling by a power of the eigenvalues:

    D = U_B [ (U_B^T M U_A) / ((b + l_B)(a + l_A)^T)^p ] U_A^T

with B = U_B diag(b) U_B^T and A = U_A diag(a) U_A^T; p = 1 is K-FAC's own, 1/2 Adam's in the eigenbasis.
"""

from __future__ import annotations

from torch import Tensor

from algoperf_kfac.cost import OPERATOR_FLOPS, ScalingFlops, cubes
from algoperf_kfac.layers import LayerSpec
from algoperf_kfac.pytorch.preconditioner import LayerState
from algoperf_kfac.pytorch.scalings import _base


class Scaling(_base.Scaling):
    """The scaling is separable, so that U f(b) U^T is formed once per refresh and a step costs two products."""

    def operators(self, state: LayerState) -> _base.Operators:
        return self.powers(state.a_basis, state.a_values), self.powers(state.b_basis, state.b_values)

    def powers(self, bases: list[Tensor], values: list[Tensor]) -> list[Tensor]:
        """U diag(v)^-p U^T of each block."""
        exponent = -self.config.exponent
        return [(u * v.pow(exponent).unsqueeze(1)) @ u.transpose(1, 2) for u, v in zip(bases, values, strict=True)]

    def flops(self, spec: LayerSpec) -> ScalingFlops:
        of_base = super().flops(spec)
        return ScalingFlops(of_base.refresh + OPERATOR_FLOPS * cubes(spec), of_base.step)
