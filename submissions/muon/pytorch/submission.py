"""Muon in PyTorch, from `pytorch_optimizer`.

`torch.optim.Muon` refuses the weights of convolutions, and needs torch 2.9; a test holds this one to it.
"""

from submissions.common.api import Tree
from submissions.common.from_torch import from_torch
from submissions.common.packages import Package
from submissions.common.parameters import Parameters
from submissions.muon import ADAM_BETA1, SAID

__all__ = [
    "DESCRIPTION",
    "data_selection",
    "get_batch_size",
    "init_optimizer_state",
    "prepare_for_eval",
    "update_params",
]


def make(parameters: Parameters, point: Tree) -> Tree:
    """Muon for matrices and AdamW for the others, in one optimizer."""
    from pytorch_optimizer import Muon

    shared = {"lr": point.learning_rate, "weight_decay": point.weight_decay}
    matrices = {"momentum": 1 - point.one_minus_beta1, "nesterov": True, "use_adjusted_lr": True}
    others = {"betas": (ADAM_BETA1, point.beta2), "eps": 1e-8}
    return Muon(
        [
            {"params": parameters.matrices, "use_muon": True, **matrices, **shared},
            {"params": parameters.others, "use_muon": False, **others, **shared},
        ]
    )


DESCRIPTION, init_optimizer_state, update_params, prepare_for_eval, data_selection, get_batch_size = from_torch(
    **SAID,
    make=make,
    packages=[Package("pytorch_optimizer", "4.1.0", "its Muon, which takes convolutions")],
)
