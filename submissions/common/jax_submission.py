"""AlgoPerf's functions around any optimizer in JAX; a submission says what a run of it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeAlias

import numpy as np

from submissions.common.api import Batch, EvalResults, Hyperparameters, Rng, Tree, Workload
from submissions.common.description import Config, Description
from submissions.common.hyperparameters import TrainingConfig
from submissions.common.jax import Step, log_step, replicate
from submissions.common.schedule import WARMUP_DECAY, Schedule
from submissions.common.spec import LossType, TrainingCompleteError


class Run(Protocol):
    """What a run needs beside arrays; it follows from the hyperparameters and the workload."""

    def initial_state(self, params: Tree, rng: Rng, /) -> Tree:
        """The optimizer state before the first step."""

    def prepare(self, params: Tree, opt_state: Tree, model_state: Tree, batch: Batch, rng: Rng, /) -> Tree:
        """The optimizer state to go on with, before every step."""

    def step(self, global_step: int, /, *args: Tree) -> Step:
        """The compiled step: of parameters, optimizer state, model state, batch, rng and learning rate."""


OptimizerState: TypeAlias = tuple[Tree, Run]
"""The state that a checkpoint holds, and what is made anew when a run is resumed."""


class Submission(Generic[Config]):
    """The submission API; `submission.py` of each algorithm exports its methods.

    Args:
        description: what the submission says of itself.
        make_run: function of what the training reads, the optimizer's hyperparameters, and the workload.
        schedule: of the learning rate.
    """

    def __init__(
        self,
        description: Description[Config],
        make_run: Callable[[TrainingConfig, Config, Workload], Run],
        schedule: Schedule = WARMUP_DECAY,
    ) -> None:
        self._description = description
        self._make_run = make_run
        self._schedule = schedule

    def init_optimizer_state(
        self,
        workload: Workload,
        model_params: Tree,
        model_state: Tree,
        hyperparameters: Hyperparameters,
        rng: Rng,
    ) -> OptimizerState:
        """The optimizer's state at its start.

        Raises:
            ValueError: a hyperparameter is unknown or out of range.
        """
        del model_state
        run = self._make_run(*self._description.configure(hyperparameters), workload)
        return replicate(run.initial_state(model_params, rng)), run

    def update_params(
        self,
        workload: Workload,
        current_param_container: Tree,
        current_params_types: Tree,
        model_state: Tree,
        hyperparameters: Hyperparameters,
        batch: Batch,
        loss_type: LossType,
        optimizer_state: OptimizerState,
        eval_results: EvalResults,
        global_step: int,
        rng: Rng,
        train_state: Tree = None,
    ) -> tuple[OptimizerState, Tree, Tree]:
        """One step, compiled.

        Raises:
            TrainingCompleteError: the schedule is over, and the point says that training ends with it.
        """
        del current_params_types, loss_type, eval_results
        training, config = self._description.configure(hyperparameters)
        position = self._schedule.position(
            workload, training, global_step, train_state, self_tuning=hyperparameters is None
        )
        if self._schedule.is_over(workload.step_hint, training, position):
            raise TrainingCompleteError
        opt_state, run = optimizer_state
        opt_state = run.prepare(current_param_container, opt_state, model_state, batch, rng)
        factor = self._schedule.at(workload.step_hint, training, position)
        learning_rate = np.float32(config.learning_rate * factor)
        params, opt_state, model_state = replicate((current_param_container, opt_state, model_state))
        params, opt_state, model_state, metrics = run.step(
            global_step, params, opt_state, model_state, batch, rng, learning_rate
        )
        log_step(workload, global_step=global_step, **metrics)
        return (opt_state, run), params, model_state
