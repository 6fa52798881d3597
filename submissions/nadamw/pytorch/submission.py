"""NadamW with warm-up and cosine decay, as AlgoPerf's baseline, in PyTorch."""

from __future__ import annotations

from typing import TypedDict

from torch import nn

from algoperf_kfac.pytorch.nadamw import NadamW
from submissions.common.api import Batch, EvalResults, Hyperparameters, Rng, Tree, Workload
from submissions.common.batch_sizes import get_batch_size
from submissions.common.pass_through import data_selection, prepare_for_eval
from submissions.common.pytorch import clip_gradient, compute_gradient, log_step
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


class OptimizerState(TypedDict):
    """What AlgoPerf's runner keeps in its checkpoints, by `state_dict`."""

    optimizer: NadamW


def init_optimizer_state(
    workload: Workload, model_params: nn.Module, model_state: Tree, hyperparameters: Hyperparameters, rng: Rng
) -> OptimizerState:
    """The optimizer.

    Raises:
        ValueError: a hyperparameter is unknown or out of range.
    """
    del workload, model_state, rng
    _, config = DESCRIPTION.configure(hyperparameters)
    optimizer = NadamW(
        model_params.parameters(),
        lr=config.learning_rate,
        betas=(1.0 - config.one_minus_beta1, config.beta2),
        eps=EPSILON,
        weight_decay=config.weight_decay,
    )
    return {"optimizer": optimizer}


def update_params(
    workload: Workload,
    current_param_container: nn.Module,
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
) -> tuple[OptimizerState, nn.Module, Tree]:
    """One step."""
    del current_params_types, loss_type, eval_results, train_state
    training, config = DESCRIPTION.configure(hyperparameters)
    model, optimizer = current_param_container, optimizer_state["optimizer"]
    result = compute_gradient(
        workload, model, batch, model_state, rng, training.dropout_rate, training.label_smoothing
    )
    log_step(workload, model, result.loss, global_step)
    clip_gradient(model.parameters(), training.grad_clip)
    factor = learning_rate_factor(workload.step_hint, training.horizon_factor, training.warmup_factor, global_step)
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * factor
    optimizer.step()
    return optimizer_state, model, result.new_model_state
