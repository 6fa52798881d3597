"""A toy: directions as those of `power`, averaged over steps.

S <- decay S + (1 - decay) D,      the direction being S / (1 - decay^t)
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from algoperf_kfac.cost import ScalingFlops
from algoperf_kfac.jax.preconditioner import LayerState
from algoperf_kfac.jax.scalings import Kept, power
from algoperf_kfac.layers import LayerSpec

DECAY = 0.5


class Scaling(power.Scaling):
    """Keeps the average, and the number of its updates."""

    def keeps(self, spec: LayerSpec, dtype: DTypeLike) -> Kept:
        shape = (spec.groups, spec.out_dim, spec.factor_in_dim)
        return {"average": jnp.zeros(shape, dtype), "steps": jnp.zeros((), jnp.int32)}

    def flops(self, spec: LayerSpec) -> ScalingFlops:
        of_power = super().flops(spec)
        return ScalingFlops(of_power.refresh, of_power.step + 3 * spec.num_parameters)

    def precondition(self, state: LayerState, momentum: Array, gradient: Array) -> tuple[Array, Kept]:
        direction, _ = super().precondition(state, momentum, gradient)
        known = state.refreshes > 0
        average = DECAY * state.kept["average"] + (1 - DECAY) * direction
        average = jnp.where(known, average, state.kept["average"])
        steps = state.kept["steps"] + known.astype(jnp.int32)
        corrected = average / (1 - DECAY ** jnp.maximum(steps, 1).astype(average.dtype))
        return jnp.where(known, corrected, momentum), {"average": average, "steps": steps}
