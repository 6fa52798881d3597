"""Heavy ball in PyTorch: `torch.optim.SGD`."""

import torch

from submissions.common.api import Tree
from submissions.common.from_torch import from_torch
from submissions.common.parameters import Parameters
from submissions.heavy_ball import SAID

__all__ = [
    "DESCRIPTION",
    "data_selection",
    "get_batch_size",
    "init_optimizer_state",
    "prepare_for_eval",
    "update_params",
]


def make(parameters: Parameters, point: Tree) -> torch.optim.SGD:
    """SGD with momentum for all parameters."""
    return torch.optim.SGD(
        parameters.all,
        lr=point.learning_rate,
        momentum=1 - point.one_minus_beta1,
        weight_decay=point.weight_decay,
        foreach=True,
    )


DESCRIPTION, init_optimizer_state, update_params, prepare_for_eval, data_selection, get_batch_size = from_torch(
    **SAID, make=make
)
