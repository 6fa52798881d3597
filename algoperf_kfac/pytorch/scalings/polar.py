"""The polar factor of the whitened momentum, tempered by the curvature:

    D = B^-q polar(B^-1/2 M A^-1/2) A^-q,   A and B damped, q = `KFACConfig.polar_exponent`

polar(Z) by Newton-Schulz, see `algoperf_kfac.polar`; each channel group has its own. q = 1/2 is the steepest
direction under the spectral norm of B^1/2 D A^1/2, q = 0 leaves the singular values of Muon. The polar factor of a
rotated matrix is the rotated polar factor, so all of it happens in the eigenbases, where powers are divisions:

    X = U_B^T M U_A,   D = U_B [ b^-q polar(b^-1/2 X a^-1/2) a^-q ] U_A^T
"""

from __future__ import annotations

import torch
from torch import Tensor

from algoperf_kfac.config import WHITENING
from algoperf_kfac.cost import ScalingFlops
from algoperf_kfac.layers import LayerSpec
from algoperf_kfac.polar import COEFFICIENTS, polar_flops
from algoperf_kfac.pytorch.preconditioner import LayerState, multiply
from algoperf_kfac.pytorch.scalings import _base


class Scaling(_base.Scaling):
    """Keeps bases and eigenvalues alone: two pairs of operators would come on top, and take as many products."""

    keeps_bases = True

    def operator_elements(self, spec: LayerSpec) -> int:
        return 0

    def flops(self, spec: LayerSpec) -> ScalingFlops:
        of_base = super().flops(spec)
        # Into the basis, and back.
        return ScalingFlops(of_base.refresh, 2 * of_base.step + polar_flops(spec, self.config.polar_steps))

    def operators(self, state: LayerState) -> _base.Operators:
        return [], []

    @_base.by_group("a_basis", "b_basis", "a_values", "b_values")
    def precondition(self, state: LayerState, momentum: Tensor, grad: Tensor, beta2: float) -> Tensor:
        rotated = multiply(state.b_basis, momentum, state.a_basis, transpose_left=True)
        factor = polar(_divided(state, rotated, WHITENING), self.config.polar_steps)
        tempered = _divided(state, factor, self.config.polar_exponent)
        return multiply(state.b_basis, tempered, state.a_basis, transpose_right=True)


def _divided(state: LayerState, m: Tensor, power: float) -> Tensor:
    """b^-power m a^-power in the eigenbases; a side that is taken as the identity stays as it is."""
    if state.b_values:
        m = m * torch.cat(state.b_values, 1).pow(-power).unsqueeze(2)
    return m * torch.cat(state.a_values, 1).pow(-power).unsqueeze(1) if state.a_values else m


def polar(z: Tensor, steps: int) -> Tensor:
    """The polar factor of matrices by Newton-Schulz; zero stays zero.

    Args:
        z: (groups, P_out, P_in), in the precision to work in.
        steps: of the iteration.

    Returns:
        (groups, P_out, P_in), the singular vectors those of z, singular values as `algoperf_kfac.polar` says.
    """
    if z.shape[1] > z.shape[2]:
        return polar(z.transpose(1, 2), steps).transpose(1, 2)
    a, b, c = COEFFICIENTS
    least = torch.finfo(z.dtype).tiny
    # Not by the norm alone: whitened by factors that are all but zero, squares of entries may overflow.
    z = z / z.abs().amax((1, 2), keepdim=True).clamp(min=least)
    z = z / torch.linalg.matrix_norm(z, keepdim=True).clamp(min=least)
    for _ in range(steps):
        gram = z @ z.transpose(1, 2)
        z = torch.baddbmm(z, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), z, beta=a)
    return z
