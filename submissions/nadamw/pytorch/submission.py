"""NadamW with warm-up and cosine decay, as AlgoPerf's baseline, in PyTorch."""

from __future__ import annotations

from torch import nn

from algoperf_kfac.pytorch.nadamw import NadamW
from submissions.common.api import Rng, Workload
from submissions.common.batch_sizes import get_batch_size
from submissions.common.pass_through import data_selection, prepare_for_eval
from submissions.common.pytorch_submission import Submission
from submissions.nadamw import DESCRIPTION, EPSILON, NadamWConfig

__all__ = [
    "DESCRIPTION",
    "data_selection",
    "get_batch_size",
    "init_optimizer_state",
    "prepare_for_eval",
    "update_params",
]


def make_optimizer(model: nn.Module, config: NadamWConfig, workload: Workload, rng: Rng) -> NadamW:
    """NadamW for all parameters of the model."""
    del workload, rng
    return NadamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(1.0 - config.one_minus_beta1, config.beta2),
        eps=EPSILON,
        weight_decay=config.weight_decay,
    )


_submission = Submission(DESCRIPTION, make_optimizer)
init_optimizer_state = _submission.init_optimizer_state
update_params = _submission.update_params
