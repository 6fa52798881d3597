"""NadamW with warm-up and cosine decay, as AlgoPerf's baseline, in PyTorch."""

from __future__ import annotations

from typing import Any

from torch import nn

from algoperf_kfac.pytorch.nadamw import NadamW
from submissions.nadamw.defaults import DEFAULTS, EPSILON
from submissions.training_step.batch_sizes import get_batch_size
from submissions.training_step.hyperparameters import resolve
from submissions.training_step.pass_through import data_selection, prepare_for_eval
from submissions.training_step.pytorch import clip_gradient, compute_gradient, log_step
from submissions.training_step.schedule import learning_rate_factor

__all__ = ["data_selection", "get_batch_size", "init_optimizer_state", "prepare_for_eval", "update_params"]


def init_optimizer_state(
    workload: Any, model_params: nn.Module, model_state: Any, hyperparameters: Any, rng: Any
) -> dict[str, Any]:
    """The optimizer.

    Raises:
      ValueError: a hyperparameter is unknown or out of range.
    """
    del workload, model_state, rng
    point = resolve(hyperparameters, DEFAULTS)
    optimizer = NadamW(
        model_params.parameters(),
        lr=point.learning_rate,
        betas=(1.0 - point.one_minus_beta1, point.beta2),
        eps=EPSILON,
        weight_decay=point.weight_decay,
    )
    return {"optimizer": optimizer}


def update_params(
    workload: Any,
    current_param_container: nn.Module,
    current_params_types: Any,
    model_state: Any,
    hyperparameters: Any,
    batch: dict[str, Any],
    loss_type: Any,
    optimizer_state: dict[str, Any],
    eval_results: list[tuple[int, dict[str, float]]],
    global_step: int,
    rng: Any,
    train_state: Any = None,
) -> tuple[dict[str, Any], nn.Module, Any]:
    """One step."""
    del current_params_types, loss_type, eval_results, train_state
    point = resolve(hyperparameters, DEFAULTS)
    model, optimizer = current_param_container, optimizer_state["optimizer"]
    result = compute_gradient(workload, model, batch, model_state, rng, point.dropout_rate, point.label_smoothing)
    log_step(workload, model, result.loss, global_step)
    clip_gradient(model.parameters(), point.grad_clip)
    factor = learning_rate_factor(workload.step_hint, point.horizon_factor, point.warmup_factor, global_step)
    for group in optimizer.param_groups:
        group["lr"] = point.learning_rate * factor
    optimizer.step()
    return optimizer_state, model, result.new_model_state
