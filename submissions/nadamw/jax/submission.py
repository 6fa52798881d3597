"""NadamW with warm-up and cosine decay, as AlgoPerf's baseline, in JAX."""

from __future__ import annotations

import jax

from algoperf_kfac.jax.nadamw import scale_by_nadamw
from submissions.common.api import Tree, Workload
from submissions.common.batch_sizes import get_batch_size
from submissions.common.from_optax import FirstOrderRun
from submissions.common.hyperparameters import TrainingConfig
from submissions.common.jax import apply_directions
from submissions.common.jax_submission import Submission
from submissions.common.pass_through import data_selection, prepare_for_eval
from submissions.nadamw import DESCRIPTION, EPSILON, NadamWConfig

__all__ = [
    "DESCRIPTION",
    "data_selection",
    "get_batch_size",
    "init_optimizer_state",
    "prepare_for_eval",
    "update_params",
]


def make_run(training: TrainingConfig, config: NadamWConfig, workload: Workload) -> FirstOrderRun:
    """NadamW on a workload."""
    optimizer = scale_by_nadamw(config.one_minus_beta1, config.beta2, EPSILON)

    def update(gradient: Tree, state: Tree, params: Tree, learning_rate: jax.Array) -> tuple[Tree, Tree]:
        directions, state = optimizer.update(gradient, state)
        return apply_directions(params, directions, learning_rate, config.weight_decay), state

    return FirstOrderRun(training, workload, optimizer.init, update)


_submission = Submission(DESCRIPTION, make_run)
init_optimizer_state = _submission.init_optimizer_state
update_params = _submission.update_params
