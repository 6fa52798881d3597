"""K-FAC-expand with the diagonals of both factors alone."""

import dataclasses

import torch
from torch import Tensor

from algoperf_kfac.pytorch.preconditioner import LayerState
from benchmarks.experiments.objects._kfac import seeing, with_scaling


def diagonal(state: LayerState) -> LayerState:
    """The unit vectors for the bases, and what the damped factors have on their diagonals for the values."""
    return dataclasses.replace(
        state,
        a_basis=_units(state.a_basis),
        b_basis=_units(state.b_basis),
        a_values=_diagonals(state.a_basis, state.a_values),
        b_values=_diagonals(state.b_basis, state.b_values),
    )


def _units(bases: list[Tensor]) -> list[Tensor]:
    return [torch.eye(u.shape[-1]).to(u).expand_as(u) for u in bases]


def _diagonals(bases: list[Tensor], values: list[Tensor]) -> list[Tensor]:
    return [(u.square() * v[:, None]).sum(2) for u, v in zip(bases, values, strict=True)]


DESCRIPTION, init_optimizer_state, update_params, prepare_for_eval, data_selection, get_batch_size = with_scaling(
    seeing(diagonal)
)
