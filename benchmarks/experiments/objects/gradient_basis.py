"""K-FAC-expand with Shampoo's factors: averages of GᵀG for A and of GGᵀ for B, all else through the same pipeline.

Both are moved at every step, of which there are at least as many as K-FAC's statistics steps, and are decomposed as
often as K-FAC's.
"""

import dataclasses

import torch
from torch import Tensor

from algoperf_kfac.layers import LayerSpec
from algoperf_kfac.pytorch.preconditioner import LayerState, damping_terms
from algoperf_kfac.pytorch.scalings import polar
from benchmarks.experiments.objects._kfac import with_scaling

DOUBLING = (1, 2, 4, 8)  # the steps at which K-FAC refreshes early


class GradientBasis(polar.Scaling):
    """Keeps both averages with their eigenvectors and damped eigenvalues, and the number of steps."""

    uses_gradient = True

    def keeps(self, spec: LayerSpec, like: Tensor) -> dict[str, Tensor | int]:
        kept: dict[str, Tensor | int] = {"steps": 0}
        for side, size in (("a", spec.factor_in_dim), ("b", spec.out_dim)):
            kept[side] = like.new_zeros(spec.groups, size, size)
            kept[f"{side}_basis"] = like.new_zeros(spec.groups, size, size)
            kept[f"{side}_values"] = like.new_zeros(spec.groups, size)
        return kept

    def precondition(self, state: LayerState, momentum: Tensor, grad: Tensor, beta2: float) -> Tensor:
        config, kept = self.config, state.kept
        a, b = _kept(state, "a"), _kept(state, "b")
        a.lerp_(grad.transpose(1, 2) @ grad, 1 - config.factor_decay)
        b.lerp_(grad @ grad.transpose(1, 2), 1 - config.factor_decay)
        kept["steps"] = steps = int(kept["steps"]) + 1
        if steps % config.refresh_interval == 0 or steps in DOUBLING:
            weight = 1 - config.factor_decay**steps
            damping = damping_terms([a / weight], [b / weight], config, state.noise_level(config))
            for side, average, term in (("a", a, damping[0]), ("b", b, damping[1])):
                damped = average / weight + torch.diag_embed(term[:, None].expand(average.shape[:2]))
                values, kept[f"{side}_basis"] = torch.linalg.eigh(damped)
                kept[f"{side}_values"] = values.clamp(min=term[:, None])
        shown = dataclasses.replace(
            state,
            a_basis=[_kept(state, "a_basis")],
            b_basis=[_kept(state, "b_basis")],
            a_values=[_kept(state, "a_values")],
            b_values=[_kept(state, "b_values")],
        )
        return super().precondition(shown, momentum, grad, beta2)


def _kept(state: LayerState, name: str) -> Tensor:
    value = state.kept[name]
    assert isinstance(value, Tensor)
    return value


DESCRIPTION, init_optimizer_state, update_params, prepare_for_eval, data_selection, get_batch_size = with_scaling(
    GradientBasis
)
