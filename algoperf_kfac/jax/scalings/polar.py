"""The polar factor of the whitened momentum, tempered by the curvature:

    D = B^-q polar(B^-1/2 M A^-1/2) A^-q,   A and B damped, q = `KFACConfig.polar_exponent`

polar(Z) by Newton-Schulz, see `algoperf_kfac.polar`; each channel group has its own. q = 1/2 is the steepest
direction under the spectral norm of B^1/2 D A^1/2, q = 0 leaves the singular values of Muon. The polar factor of a
rotated matrix is the rotated polar factor, so all of it happens in the eigenbases, where powers are divisions:

    X = U_B^T M U_A,   D = U_B [ b^-q polar(b^-1/2 X a^-1/2) a^-q ] U_A^T
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from algoperf_kfac.config import WHITENING
from algoperf_kfac.cost import ScalingFlops
from algoperf_kfac.jax.preconditioner import LayerState, multiply
from algoperf_kfac.jax.reductions import norms, scales
from algoperf_kfac.jax.scalings import _base
from algoperf_kfac.jax.scalings._base import Kept
from algoperf_kfac.layers import LayerSpec
from algoperf_kfac.polar import COEFFICIENTS, polar_flops


class Scaling(_base.Scaling):
    """Keeps bases and eigenvalues alone: two pairs of operators would take twice as much, and as many products."""

    keeps_operators = False
    keeps_bases = True

    def flops(self, spec: LayerSpec) -> ScalingFlops:
        of_base = super().flops(spec)
        # Into the basis, and back.
        return ScalingFlops(of_base.refresh, 2 * of_base.step + polar_flops(spec, self.config.polar_steps))

    def precondition(self, state: LayerState, momentum: Array, gradient: Array) -> tuple[Array, Kept]:
        rotated = multiply(state.b_basis, momentum, state.a_basis, transpose_left=True)
        factor = polar(_divided(state, rotated, WHITENING), self.config.polar_steps)
        tempered = _divided(state, factor, self.config.polar_exponent)
        direction = multiply(state.b_basis, tempered, state.a_basis, transpose_right=True)
        return jnp.where(state.refreshes > 0, direction, momentum), state.kept


def _divided(state: LayerState, m: Array, power: float) -> Array:
    """b^-power m a^-power in the eigenbases; a side that is taken as the identity stays as it is."""
    if state.b_values:
        m = m * (jnp.concatenate(state.b_values, 1) ** -power)[:, :, None]
    return m * (jnp.concatenate(state.a_values, 1) ** -power)[:, None, :] if state.a_values else m


def polar(z: Array, steps: int) -> Array:
    """The polar factor of matrices by Newton-Schulz; zero stays zero.

    Args:
        z: (groups, P_out, P_in), in the precision to work in.
        steps: of the iteration.

    Returns:
        (groups, P_out, P_in), the singular vectors those of z, singular values as `algoperf_kfac.polar` says.
    """
    if z.shape[1] > z.shape[2]:
        return polar(z.transpose(0, 2, 1), steps).transpose(0, 2, 1)
    a, b, c = COEFFICIENTS
    least = jnp.finfo(z.dtype).tiny
    # Not by the norm alone: whitened by factors that are all but zero, squares of entries may overflow.
    z = z / scales(z)[:, None, None]
    z = z / jnp.maximum(norms(z), least)[:, None, None]

    def step(_: int, z: Array) -> Array:
        gram = z @ z.transpose(0, 2, 1)
        return a * z + (b * gram + c * (gram @ gram)) @ z

    # Not unrolled: each step would be compiled for itself.
    turned: Array = lax.fori_loop(0, steps, step, z)
    return turned
