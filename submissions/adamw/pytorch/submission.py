"""AdamW in PyTorch: `torch.optim.AdamW`."""

import torch

from submissions.adamw import EPSILON, SAID
from submissions.common.api import Tree
from submissions.common.from_torch import from_torch
from submissions.common.parameters import Parameters

__all__ = [
    "DESCRIPTION",
    "data_selection",
    "get_batch_size",
    "init_optimizer_state",
    "prepare_for_eval",
    "update_params",
]


def make(parameters: Parameters, point: Tree) -> torch.optim.AdamW:
    """AdamW for all parameters."""
    return torch.optim.AdamW(
        parameters.all,
        lr=point.learning_rate,
        betas=(1 - point.one_minus_beta1, point.beta2),
        eps=EPSILON,
        weight_decay=point.weight_decay,
        foreach=True,
    )


DESCRIPTION, init_optimizer_state, update_params, prepare_for_eval, data_selection, get_batch_size = from_torch(
    **SAID, make=make
)
