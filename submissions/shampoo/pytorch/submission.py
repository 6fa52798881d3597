"""Distributed Shampoo in PyTorch, as it won AlgoPerf 0.5.

The authors' code (facebookresearch/optimizers) is on no package index, and what is there grafts no Adam and keeps
its state in objects that no checkpoint loads: `optimizer.py` is ours, held to its formulas by a test. Configured
as the winning submission: betas shared by factors and Adam grafting, blocks of 1024, all parameters, those of one
dimension too. It renewed its roots every 100 of some 10^5 steps; here it is every 5, since the authors start
from 1 and raise it as far as time demands.
"""

from submissions.common.api import Tree
from submissions.common.from_torch import from_torch
from submissions.common.hyperparameters import COUNT, FRACTION, NON_NEGATIVE, POSITIVE, UNIT
from submissions.common.parameters import Parameters
from submissions.shampoo.pytorch.optimizer import Shampoo

__all__ = [
    "DESCRIPTION",
    "data_selection",
    "get_batch_size",
    "init_optimizer_state",
    "prepare_for_eval",
    "update_params",
]


def make(parameters: Parameters, point: Tree) -> Shampoo:
    """Shampoo for all parameters."""
    return Shampoo(
        parameters.all,
        lr=point.learning_rate,
        betas=(1 - point.one_minus_beta1, point.beta2),
        weight_decay=point.weight_decay,
        precondition_frequency=point.precondition_frequency,
    )


DESCRIPTION, init_optimizer_state, update_params, prepare_for_eval, data_selection, get_batch_size = from_torch(
    title="Distributed Shampoo",
    text=(
        "Distributed Shampoo (Anil et al., 2020, https://arxiv.org/abs/2002.09018; Shi et al., 2023, "
        "https://arxiv.org/abs/2309.06497) with Adam grafting for all parameters, in blocks of at most 1024, with "
        "new roots every 5 steps. Linear warm-up, then cosine decay."
    ),
    hyperparameters={
        "learning_rate": (1e-2, POSITIVE),
        "one_minus_beta1": (0.1, UNIT),
        "beta2": (0.99, FRACTION),
        "weight_decay": (0.05, NON_NEGATIVE),
        "precondition_frequency": (5, COUNT),
    },
    training={"warmup_factor": 0.1, "grad_clip": 0.5},
    make=make,
)
