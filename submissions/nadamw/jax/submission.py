"""NadamW with warm-up and cosine decay, as AlgoPerf's baseline, in JAX."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import optax

from algoperf_kfac.jax.nadamw import scale_by_nadamw
from submissions.nadamw.defaults import DEFAULTS, EPSILON
from submissions.training_step.batch_sizes import get_batch_size
from submissions.training_step.hyperparameters import resolve
from submissions.training_step.jax import (
    apply_directions,
    clip_gradient,
    compile_step,
    compute_gradient,
    log_step,
    replicate,
)
from submissions.training_step.pass_through import data_selection, prepare_for_eval
from submissions.training_step.schedule import learning_rate_factor

__all__ = ["data_selection", "get_batch_size", "init_optimizer_state", "prepare_for_eval", "update_params"]

# The state that a checkpoint holds, and the compiled step, which is made anew when a run is resumed.
OptimizerState = tuple[Any, Callable[..., Any]]


def init_optimizer_state(
    workload: Any, model_params: Any, model_state: Any, hyperparameters: Any, rng: Any
) -> OptimizerState:
    """The moments, and the compiled step.

    Raises:
      ValueError: a hyperparameter is unknown or out of range.
    """
    del model_state, rng
    point = resolve(hyperparameters, DEFAULTS)
    optimizer = scale_by_nadamw(point.one_minus_beta1, point.beta2, EPSILON)
    return replicate(optimizer.init(model_params)), compile_step(partial(_step, workload, optimizer, point))


def update_params(
    workload: Any,
    current_param_container: Any,
    current_params_types: Any,
    model_state: Any,
    hyperparameters: Any,
    batch: dict[str, Any],
    loss_type: Any,
    optimizer_state: OptimizerState,
    eval_results: list[tuple[int, dict[str, float]]],
    global_step: int,
    rng: Any,
    train_state: Any = None,
) -> tuple[OptimizerState, Any, Any]:
    """One step."""
    del current_params_types, loss_type, eval_results, train_state
    point = resolve(hyperparameters, DEFAULTS)
    opt_state, step = optimizer_state
    factor = learning_rate_factor(workload.step_hint, point.horizon_factor, point.warmup_factor, global_step)
    learning_rate = np.float32(point.learning_rate * factor)
    params, opt_state, model_state = replicate((current_param_container, opt_state, model_state))
    params, opt_state, model_state, metrics = step(params, opt_state, model_state, batch, rng, learning_rate)
    log_step(workload, global_step=global_step, **metrics)
    return (opt_state, step), params, model_state


def _step(
    workload: Any,
    optimizer: optax.GradientTransformation,
    point: SimpleNamespace,
    params: Any,
    opt_state: Any,
    model_state: Any,
    batch: dict[str, Any],
    rng: jax.Array,
    learning_rate: jax.Array,
) -> tuple[Any, Any, Any, dict[str, jax.Array]]:
    """The traced part of a step: new parameters, optimizer state and model state, and what may be logged."""
    gradient, result = compute_gradient(
        workload, params, batch, model_state, rng, point.dropout_rate, point.label_smoothing
    )
    gradient, grad_norm = clip_gradient(gradient, point.grad_clip)
    directions, opt_state = optimizer.update(gradient, opt_state)
    params = apply_directions(params, directions, learning_rate, point.weight_decay)
    return params, opt_state, result.new_model_state, {"loss": result.loss, "grad_norm": grad_norm}
