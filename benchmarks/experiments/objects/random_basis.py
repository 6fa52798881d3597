"""K-FAC-expand with the eigenvalues in bases that have nothing to do with the factors."""

import dataclasses

import torch
from torch import Tensor

from algoperf_kfac.pytorch.preconditioner import LayerState
from benchmarks.experiments.objects._kfac import seeing, with_scaling


def random(state: LayerState) -> LayerState:
    """Random orthogonal bases of the same sizes, the same at every step."""
    a, b = ([_orthogonal(u) for u in bases] for bases in (state.a_basis, state.b_basis))
    return dataclasses.replace(state, a_basis=a, b_basis=b)


def _orthogonal(like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(like.shape[-1])
    return torch.linalg.qr(torch.randn(like.shape, generator=generator))[0].to(like)


DESCRIPTION, init_optimizer_state, update_params, prepare_for_eval, data_selection, get_batch_size = with_scaling(
    seeing(random)
)
