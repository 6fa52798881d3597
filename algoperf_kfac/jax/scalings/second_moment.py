"""Adam in the eigenbasis: the rotated momentum over the root of the second moment of the rotated gradient.

    v <- beta2 v + (1 - beta2) (U_B^T G U_A)^2,      U_B [ (U_B^T M U_A) / sqrt(v / (1 - beta2^t) + floor) ] U_A^T

The floor is the damping times the mean of v: it keeps the noise of null-space directions, which are arbitrary, from
being scaled up to full steps.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from algoperf_kfac.cost import ScalingFlops
from algoperf_kfac.jax.preconditioner import Blocks, LayerState, multiply
from algoperf_kfac.jax.scalings import _base
from algoperf_kfac.jax.scalings._base import Kept
from algoperf_kfac.layers import LayerSpec

MOMENT = "second_moment"  # (groups, P_out, P_in)
STEPS = "second_moment_steps"  # updates of it, ()


class Scaling(_base.Scaling):
    """Keeps the bases, and a second moment in them."""

    keeps_operators = False
    keeps_bases = True

    def keeps(self, spec: LayerSpec, dtype: DTypeLike) -> Kept:
        shape = (spec.groups, spec.out_dim, spec.factor_in_dim)
        return {MOMENT: jnp.zeros(shape, dtype), STEPS: jnp.zeros((), jnp.int32)}

    def precondition(self, state: LayerState, momentum: Array, gradient: Array) -> tuple[Array, Kept]:
        def rotate(m: Array) -> Array:
            return multiply(state.b_basis, m, state.a_basis, transpose_left=True)

        beta2, known, moment = self.config.beta2, state.refreshes > 0, state.kept[MOMENT]
        rotated = jnp.square(rotate(gradient))
        moment = jnp.where(known, beta2 * moment + (1 - beta2) * rotated, moment)
        steps = state.kept[STEPS] + known.astype(jnp.int32)
        v = moment / (1 - beta2 ** jnp.maximum(steps, 1).astype(moment.dtype))
        floor = self.config.damping * v.mean((1, 2), keepdims=True)
        # By one as long as there is none: what overflows is no number after the products.
        root = jnp.where(known, jnp.maximum(jnp.sqrt(v + floor), jnp.finfo(v.dtype).tiny), 1)
        scaled = rotate(momentum) / root
        direction = multiply(state.b_basis, scaled, state.a_basis, transpose_right=True)
        return jnp.where(known, direction, momentum), {MOMENT: moment, STEPS: steps}

    def transport(self, state: LayerState, a_basis: Blocks, b_basis: Blocks) -> Kept:
        """The second moment in new bases, its entries taken as uncorrelated in the old ones.

        (Q^T X P)_ij has variance sum_kl Q_ki^2 P_lj^2 var(X_kl) for the rotations Q, P between old and new bases.
        """

        def rotations(old: Blocks, new: Blocks) -> Blocks:
            return tuple(jnp.square(o.transpose(0, 2, 1) @ n) for o, n in zip(old, new, strict=True))

        left, right = rotations(state.b_basis, b_basis), rotations(state.a_basis, a_basis)
        return state.kept | {MOMENT: multiply(left, state.kept[MOMENT], right, transpose_left=True)}

    def flops(self, spec: LayerSpec) -> ScalingFlops:
        # Momentum and gradient into the basis, the direction back.
        of_base = super().flops(spec)
        return ScalingFlops(of_base.refresh, 3 * of_base.step)
