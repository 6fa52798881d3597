"""Adam in the eigenbasis:

D = U_B [ (U_B^T M U_A) / sqrt(v) ] U_A^T,   v the second moment of U_B^T G U_A
"""

from __future__ import annotations

import torch
from torch import Tensor

from algoperf_kfac.cost import ScalingFlops
from algoperf_kfac.layers import LayerSpec
from algoperf_kfac.pytorch.preconditioner import LayerState, multiply
from algoperf_kfac.pytorch.scalings import _base


class Scaling(_base.Scaling):
    """Keeps the second moment of the rotated gradient, and the number of its updates."""

    uses_gradient = True
    keeps_bases = True

    def keeps(self, spec: LayerSpec, like: Tensor) -> dict[str, Tensor | int]:
        moment = like.new_zeros(spec.groups, spec.out_dim, spec.factor_in_dim)
        return {"second_moment": moment, "second_moment_steps": 0}

    def operator_elements(self, spec: LayerSpec) -> int:
        return 0

    def flops(self, spec: LayerSpec) -> ScalingFlops:
        of_base = super().flops(spec)
        return ScalingFlops(of_base.refresh, 3 * of_base.step)  # momentum and gradient into the basis, and back

    def operators(self, state: LayerState) -> _base.Operators:
        return [], []

    def transport(self, state: LayerState, a_basis: list[Tensor], b_basis: list[Tensor]) -> None:
        """The second moment in new bases, its entries taken as uncorrelated in the old ones.

        (Q^T X P)_ij has variance sum_kl Q_ki^2 P_lj^2 var(X_kl) for the rotations Q, P between old and new bases.
        """
        b_squares = [(old.transpose(1, 2) @ new).square() for old, new in zip(state.b_basis, b_basis, strict=True)]
        a_squares = [(old.transpose(1, 2) @ new).square() for old, new in zip(state.a_basis, a_basis, strict=True)]
        moment = state.kept["second_moment"]
        assert isinstance(moment, Tensor)
        state.kept["second_moment"] = multiply(b_squares, moment, a_squares, transpose_left=True)

    def precondition(self, state: LayerState, momentum: Tensor, grad: Tensor, beta2: float) -> Tensor:
        def rotate(m: Tensor) -> Tensor:
            return multiply(state.b_basis, m, state.a_basis, transpose_left=True)

        moment, steps = state.kept["second_moment"], state.kept["second_moment_steps"]
        assert isinstance(moment, Tensor)
        moment.lerp_(rotate(grad).square(), 1 - beta2)
        state.kept["second_moment_steps"] = steps = int(steps) + 1
        v = moment / (1 - beta2**steps)
        # The floor keeps the noise of null-space directions from being scaled up to full steps.
        floor = self.config.damping * v.mean((1, 2), keepdim=True)
        scaled = rotate(momentum) / (v + floor).sqrt().clamp(min=torch.finfo(v.dtype).tiny)
        return multiply(state.b_basis, scaled, state.a_basis, transpose_right=True)
