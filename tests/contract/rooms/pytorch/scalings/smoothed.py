"""A toy: directions as those of `power`, averaged over steps.

S <- decay S + (1 - decay) D,      the direction being S / (1 - decay^t)
"""

from __future__ import annotations

from torch import Tensor

from algoperf_kfac.cost import ScalingFlops
from algoperf_kfac.layers import LayerSpec
from algoperf_kfac.pytorch.preconditioner import LayerState
from algoperf_kfac.pytorch.scalings import power

DECAY = 0.5


class Scaling(power.Scaling):
    """Keeps the average, and the number of its updates."""

    def keeps(self, spec: LayerSpec, like: Tensor) -> dict[str, Tensor | int]:
        return {"average": like.new_zeros(spec.groups, spec.out_dim, spec.factor_in_dim), "steps": 0}

    def flops(self, spec: LayerSpec) -> ScalingFlops:
        of_power = super().flops(spec)
        return ScalingFlops(of_power.refresh, of_power.step + 3 * spec.num_parameters)

    def precondition(self, state: LayerState, momentum: Tensor, grad: Tensor, beta2: float) -> Tensor:
        average, steps = state.kept["average"], int(state.kept["steps"]) + 1
        assert isinstance(average, Tensor)
        average.lerp_(super().precondition(state, momentum, grad, beta2), 1 - DECAY)
        state.kept["steps"] = steps
        return average / (1 - DECAY**steps)
