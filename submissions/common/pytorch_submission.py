"""AlgoPerf's functions around any PyTorch optimizer; a submission says which, and what it captures."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Generic, NotRequired, Protocol, TypedDict, TypeVar, runtime_checkable

import torch
from torch import nn

from submissions.common.api import Batch, EvalResults, Hyperparameters, Rng, Tree, Workload
from submissions.common.description import Config, Description
from submissions.common.pytorch import Capture, clip_gradient, compute_gradient, log_step, rehearse
from submissions.common.schedule import WARMUP_DECAY, Schedule
from submissions.common.spec import ForwardPassMode, LossType, TrainingCompleteError


class Steps(Protocol):
    """What is asked of an optimizer: a `torch.optim.Optimizer`, or several as one."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    def step(self) -> object: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None: ...


@runtime_checkable
class Averages(Protocol):
    """An optimizer that evaluates at other parameters than it trains at, as those of `schedulefree` do."""

    def train(self) -> object:
        """Puts the parameters to train at into the model, unless they are there."""

    def eval(self) -> object:
        """Puts the parameters to evaluate at into the model, unless they are there."""


Optimizer = TypeVar("Optimizer", bound=Steps)


class RecentBatches:
    """The batches since the last evaluation, for statistics of batch norm; a checkpoint, made there, has none."""

    KEPT = 10

    def __init__(self) -> None:
        self.batches: deque[Batch] = deque(maxlen=self.KEPT)

    def state_dict(self) -> dict[str, Tree]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Tree]) -> None:
        self.batches.clear()


class OptimizerState(TypedDict, Generic[Optimizer]):
    """What AlgoPerf's runner keeps in its checkpoints, by `state_dict`."""

    optimizer: Optimizer
    recent: NotRequired[RecentBatches]  # of averages over models with batch norm


class Submission(Generic[Config, Optimizer]):
    """The submission API; `submission.py` of each algorithm exports its methods.

    Args:
        description: what the submission says of itself.
        make_optimizer: function of the model, the optimizer's hyperparameters, the workload and an rng; the
            learning rate of its groups is set before every step, to the schedule's share of the hyperparameter,
            or of a group's own "initial_lr".
        capture: function of the optimizer and a batch: a context for the forward and backward pass.
        rehearsal: function of the same: a part of the batch and a context for a pass ahead of the step, or None.
        schedule: of the learning rate.
        logged: function of the optimizer: what is logged beside loss and gradient norm, on the host already.
    """

    def __init__(
        self,
        description: Description[Config],
        make_optimizer: Callable[[nn.Module, Config, Workload, Rng], Optimizer],
        capture: Callable[[Optimizer, Batch], AbstractContextManager[Capture]] | None = None,
        rehearsal: Callable[[Optimizer, Batch], tuple[Batch, AbstractContextManager[Capture]] | None] | None = None,
        schedule: Schedule = WARMUP_DECAY,
        logged: Callable[[Optimizer], dict[str, float]] = lambda optimizer: {},
    ) -> None:
        self._description = description
        self._make_optimizer = make_optimizer
        self._capture = capture
        self._rehearsal = rehearsal
        self._schedule = schedule
        self._logged = logged

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
        optimizer = self._make_optimizer(model_params, config, workload, rng)
        if isinstance(optimizer, Averages) and _has_batch_norm(model_params):
            return {"optimizer": optimizer, "recent": RecentBatches()}
        return {"optimizer": optimizer}

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
        """One step; forward and backward pass run inside the capture, if there is one.

        Raises:
            TrainingCompleteError: the schedule is over, and the point says that training ends with it.
        """
        del current_params_types, eval_results
        model, optimizer = current_param_container, optimizer_state["optimizer"]
        training, config = self._description.configure(hyperparameters)
        position = self._schedule.position(
            workload, training, global_step, train_state, self_tuning=hyperparameters is None
        )
        if self._schedule.is_over(workload.step_hint, training, position):
            raise TrainingCompleteError
        if isinstance(optimizer, Averages):
            optimizer.train()
        if "recent" in optimizer_state:
            optimizer_state["recent"].batches.append(batch)
        ahead = None if self._rehearsal is None else self._rehearsal(optimizer, batch)
        if ahead is not None:
            part, context = ahead
            rehearse(workload, model, part, model_state, rng, training.dropout_rate, context)
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
        log_step(workload, model, result.loss, global_step, **self._logged(optimizer))
        clip_gradient(model.parameters(), training.grad_clip)
        factor = self._schedule.at(workload.step_hint, training, position)
        for group in optimizer.param_groups:
            group["lr"] = group.get("initial_lr", config.learning_rate) * factor
        optimizer.step()
        return optimizer_state, model, result.new_model_state

    def prepare_for_eval(
        self,
        workload: Workload,
        current_param_container: nn.Module,
        current_params_types: Tree,
        model_state: Tree,
        hyperparameters: Hyperparameters,
        loss_type: LossType,
        optimizer_state: OptimizerState[Optimizer],
        eval_results: EvalResults,
        global_step: int,
        rng: Rng,
    ) -> tuple[OptimizerState[Optimizer], nn.Module, Tree]:
        """Puts an average into the model, where the optimizer has one, until the next step.

        Batch norm then takes in the batches since the last evaluation once more, at the average: its statistics
        are of the parameters trained at. So recommend the authors of schedule-free optimizers (README of
        facebookresearch/schedule_free), with fresh batches, which AlgoPerf's API does not give here.
        """
        del current_params_types, hyperparameters, loss_type, eval_results, global_step
        model, optimizer = current_param_container, optimizer_state["optimizer"]
        if isinstance(optimizer, Averages):
            optimizer.eval()
        recent = optimizer_state["recent"].batches if "recent" in optimizer_state else deque()
        with torch.no_grad():
            while recent:
                model.train()
                _, model_state = workload.model_fn(
                    model,
                    recent.popleft(),
                    model_state=model_state,
                    mode=ForwardPassMode.TRAIN,
                    rng=rng,
                    update_batch_norm=True,
                )
        return optimizer_state, model, model_state


def _has_batch_norm(model: nn.Module) -> bool:
    """Whether statistics of its inputs are among a model's buffers, by torch's name for them."""
    return any(name.rpartition(".")[2] == "running_mean" for name, _ in model.named_buffers())
