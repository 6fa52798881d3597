"""AlgoPerf's functions around any PyTorch optimizer; a submission says which, and what it captures."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Generic, TypedDict, TypeVar

import torch
from torch import nn

from submissions.common.api import Batch, EvalResults, Hyperparameters, Rng, Tree, Workload
from submissions.common.description import Config, Description
from submissions.common.pytorch import Capture, clip_gradient, compute_gradient, log_step
from submissions.common.schedule import learning_rate_factor
from submissions.common.spec import LossType

Optimizer = TypeVar("Optimizer", bound=torch.optim.Optimizer)


class OptimizerState(TypedDict, Generic[Optimizer]):
    """What AlgoPerf's runner keeps in its checkpoints, by `state_dict`."""

    optimizer: Optimizer


class Submission(Generic[Config, Optimizer]):
    """The submission API; `submission.py` of each algorithm exports its methods.

    Args:
        description: what the submission says of itself.
        make_optimizer: function of the model, the optimizer's hyperparameters, the workload and an rng; the
            learning rate of its groups is set before every step.
        capture: function of the optimizer and a batch: a context for the forward and backward pass.
    """

    def __init__(
        self,
        description: Description[Config],
        make_optimizer: Callable[[nn.Module, Config, Workload, Rng], Optimizer],
        capture: Callable[[Optimizer, Batch], AbstractContextManager[Capture]] | None = None,
    ) -> None:
        self._description = description
        self._make_optimizer = make_optimizer
        self._capture = capture

    def init_optimizer_state(
        self,
        workload: Workload,
        model_params: nn.Module,
        model_state: Tree,
        hyperparameters: Hyperparameters,
        rng: Rng,
    ) -> OptimizerState[Optimizer]:
        """The optimizer.

        Raises:
            ValueError: a hyperparameter is unknown or out of range.
        """
        del model_state
        _, config = self._description.configure(hyperparameters)
        return {"optimizer": self._make_optimizer(model_params, config, workload, rng)}

    def update_params(
        self,
        workload: Workload,
        current_param_container: nn.Module,
        current_params_types: Tree,
        model_state: Tree,
        hyperparameters: Hyperparameters,
        batch: Batch,
        loss_type: LossType,
        optimizer_state: OptimizerState[Optimizer],
        eval_results: EvalResults,
        global_step: int,
        rng: Rng,
        train_state: Tree = None,
    ) -> tuple[OptimizerState[Optimizer], nn.Module, Tree]:
        """One step; forward and backward pass run inside the capture, if there is one."""
        del current_params_types, eval_results, train_state
        model, optimizer = current_param_container, optimizer_state["optimizer"]
        training, config = self._description.configure(hyperparameters)
        result = compute_gradient(
            workload,
            model,
            batch,
            model_state,
            rng,
            training.dropout_rate,
            training.label_smoothing,
            context=None if self._capture is None else self._capture(optimizer, batch),
            loss_type=loss_type,
        )
        log_step(workload, model, result.loss, global_step)
        clip_gradient(model.parameters(), training.grad_clip)
        factor = learning_rate_factor(
            workload.step_hint, training.horizon_factor, training.warmup_factor, global_step
        )
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * factor
        optimizer.step()
        return optimizer_state, model, result.new_model_state
