"""NadamW with warm-up and cosine decay, as AlgoPerf's baseline, in JAX."""

from __future__ import annotations

import jax

from algoperf_kfac.jax.nadamw import scale_by_nadamw
from submissions.common.api import Batch, Rng, Tree, Workload
from submissions.common.batch_sizes import get_batch_size
from submissions.common.hyperparameters import TrainingConfig
from submissions.common.jax import Step, apply_directions, clip_gradient, compile_step, compute_gradient
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


class Run:
    """NadamW on a workload.

    Args:
        training: what the step around the optimizer reads.
        config: what the optimizer reads.
        workload: the workload.

    Attributes:
        compiled: the step.
    """

    def __init__(self, training: TrainingConfig, config: NadamWConfig, workload: Workload) -> None:
        self._training, self._config, self._workload = training, config, workload
        self._optimizer = scale_by_nadamw(config.one_minus_beta1, config.beta2, EPSILON)
        self.compiled = compile_step(self._step)

    def initial_state(self, params: Tree, rng: Rng) -> Tree:
        """The moments."""
        del rng
        return self._optimizer.init(params)

    def prepare(self, params: Tree, opt_state: Tree, model_state: Tree, batch: Batch, rng: Rng) -> Tree:
        """Nothing to prepare."""
        return opt_state

    def step(self, global_step: int, *args: Tree) -> Step:
        """The same step always."""
        return self.compiled(*args)

    def _step(
        self,
        params: Tree,
        opt_state: Tree,
        model_state: Tree,
        batch: Batch,
        rng: jax.Array,
        learning_rate: jax.Array,
    ) -> Step:
        """The traced part of a step."""
        training = self._training
        gradient, result = compute_gradient(
            self._workload, params, batch, model_state, rng, training.dropout_rate, training.label_smoothing
        )
        gradient, grad_norm = clip_gradient(gradient, training.grad_clip)
        directions, opt_state = self._optimizer.update(gradient, opt_state)
        params = apply_directions(params, directions, learning_rate, self._config.weight_decay)
        return params, opt_state, result.new_model_state, {"loss": result.loss, "grad_norm": grad_norm}


_submission = Submission(DESCRIPTION, Run)
init_optimizer_state = _submission.init_optimizer_state
update_params = _submission.update_params
