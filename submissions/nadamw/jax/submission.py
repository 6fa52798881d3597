"""NadamW with warm-up and cosine decay, as AlgoPerf's baseline, in JAX."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import jax
import numpy as np
import optax

from algoperf_kfac.jax.nadamw import scale_by_nadamw
from submissions.common.api import Batch, EvalResults, Hyperparameters, Rng, Tree, Workload
from submissions.common.batch_sizes import get_batch_size
from submissions.common.hyperparameters import TrainingConfig
from submissions.common.jax import (
    Step,
    apply_directions,
    clip_gradient,
    compile_step,
    compute_gradient,
    log_step,
    replicate,
)
from submissions.common.pass_through import data_selection, prepare_for_eval
from submissions.common.schedule import learning_rate_factor
from submissions.common.spec import LossType
from submissions.nadamw import DESCRIPTION, EPSILON

__all__ = [
    "DESCRIPTION",
    "data_selection",
    "get_batch_size",
    "init_optimizer_state",
    "prepare_for_eval",
    "update_params",
]

OptimizerState: TypeAlias = tuple[Tree, Callable[..., Step]]
"""The state that a checkpoint holds, and the compiled step, which is made anew when a run is resumed."""


def init_optimizer_state(
    workload: Workload, model_params: Tree, model_state: Tree, hyperparameters: Hyperparameters, rng: Rng
) -> OptimizerState:
    """The moments, and the compiled step.

    Raises:
        ValueError: a hyperparameter is unknown or out of range.
    """
    del model_state, rng
    training, config = DESCRIPTION.configure(hyperparameters)
    optimizer = scale_by_nadamw(config.one_minus_beta1, config.beta2, EPSILON)
    step = compile_step(partial(_step, workload, optimizer, training, config.weight_decay))
    return replicate(optimizer.init(model_params)), step


def update_params(
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
    """One step."""
    del current_params_types, loss_type, eval_results, train_state
    training, config = DESCRIPTION.configure(hyperparameters)
    opt_state, step = optimizer_state
    factor = learning_rate_factor(workload.step_hint, training.horizon_factor, training.warmup_factor, global_step)
    learning_rate = np.float32(config.learning_rate * factor)
    params, opt_state, model_state = replicate((current_param_container, opt_state, model_state))
    params, opt_state, model_state, metrics = step(params, opt_state, model_state, batch, rng, learning_rate)
    log_step(workload, global_step=global_step, **metrics)
    return (opt_state, step), params, model_state


def _step(
    workload: Workload,
    optimizer: optax.GradientTransformation,
    training: TrainingConfig,
    weight_decay: float,
    params: Tree,
    opt_state: Tree,
    model_state: Tree,
    batch: Batch,
    rng: jax.Array,
    learning_rate: jax.Array,
) -> Step:
    """The traced part of a step."""
    gradient, result = compute_gradient(
        workload, params, batch, model_state, rng, training.dropout_rate, training.label_smoothing
    )
    gradient, grad_norm = clip_gradient(gradient, training.grad_clip)
    directions, opt_state = optimizer.update(gradient, opt_state)
    params = apply_directions(params, directions, learning_rate, weight_decay)
    return params, opt_state, result.new_model_state, {"loss": result.loss, "grad_norm": grad_norm}
