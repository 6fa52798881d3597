"""AlgoPerf's API around `algoperf_kfac.pytorch.KFAC`, for one approximation."""

from __future__ import annotations

from typing import Any

from torch import nn

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.pytorch import KFAC
from submissions.kfac.defaults import DEFAULTS
from submissions.training_step.pytorch import clip_gradient, compute_gradient, log_step
from submissions.training_step.schedule import learning_rate_factor


class KFACSubmission:
    """The submission API for one approximation; `submission.py` of each algorithm exports its methods.

    Args:
        approximation: "expand" or "reduce".
    """

    def __init__(self, approximation: str) -> None:
        self._approximation = approximation

    def _config(self, hyperparameters: Any) -> KFACConfig:
        defaults = DEFAULTS[self._approximation]
        return KFACConfig.from_hyperparameters(hyperparameters, **defaults, approximation=self._approximation)

    def init_optimizer_state(
        self, workload: Any, model_params: nn.Module, model_state: Any, hyperparameters: Any, rng: Any
    ) -> dict[str, Any]:
        """The optimizer.

        Raises:
            ValueError: a hyperparameter is unknown or out of range.
        """
        del workload, model_state
        config = self._config(hyperparameters)
        # abs: AlgoPerf's seeds are int32 and may be negative.
        return {"optimizer": KFAC(model_params, config=config, seed=abs(int(rng[0])))}

    def update_params(
        self,
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
        """One step; forward and backward pass run inside the capture of curvature statistics."""
        del hyperparameters, current_params_types, eval_results, train_state
        model, optimizer = current_param_container, optimizer_state["optimizer"]
        config = optimizer.config
        result = compute_gradient(
            workload,
            model,
            batch,
            model_state,
            rng,
            config.dropout_rate,
            config.label_smoothing,
            context=optimizer.capture(positions=batch.get("weights")),
            loss_type=loss_type,
        )
        log_step(workload, model, result.loss, global_step)
        clip_gradient(model.parameters(), config.grad_clip)
        factor = learning_rate_factor(workload.step_hint, config.horizon_factor, config.warmup_factor, global_step)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * factor
        optimizer.step()
        return optimizer_state, model, result.new_model_state
