"""Schedule-free AdamW in PyTorch, from its authors' package `schedulefree`."""

from submissions.common.api import Tree
from submissions.common.from_torch import from_torch
from submissions.common.packages import Package
from submissions.common.parameters import Parameters
from submissions.common.schedule import CONSTANT_AFTER_WARMUP
from submissions.schedule_free_adamw import EPSILON, SAID

__all__ = [
    "DESCRIPTION",
    "data_selection",
    "get_batch_size",
    "init_optimizer_state",
    "prepare_for_eval",
    "update_params",
]


def make(parameters: Parameters, point: Tree) -> Tree:
    """Schedule-free AdamW for all parameters; the warm-up is the submission's schedule."""
    from schedulefree import AdamWScheduleFree

    return AdamWScheduleFree(
        parameters.all,
        lr=point.learning_rate,
        betas=(1 - point.one_minus_beta1, point.beta2),
        eps=EPSILON,
        weight_decay=point.weight_decay,
    )


DESCRIPTION, init_optimizer_state, update_params, prepare_for_eval, data_selection, get_batch_size = from_torch(
    **SAID,
    make=make,
    schedule=CONSTANT_AFTER_WARMUP,
    packages=[Package("schedulefree", "1.4.1", "the authors' implementation")],
)
