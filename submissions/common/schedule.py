"""The learning-rate schedules of the submissions: functions of the step alone, so resuming needs no state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from algoperf_kfac.schedule import warmup_cosine
from submissions.common.hyperparameters import TrainingConfig


@dataclass(frozen=True)
class Schedule:
    """A learning rate over the steps of a workload.

    Attributes:
        factor: for the learning rate, of the arguments of `learning_rate_factor`.
        decays: whether it comes down, so that hardly anything can be gained behind its horizon.
    """

    factor: Callable[[int, float, float, int], float]
    decays: bool

    def at(self, step_hint: int, training: TrainingConfig, step: int) -> float:
        """The factor of the update about to be made, after `step` of them."""
        return self.factor(step_hint, training.horizon_factor, training.warmup_factor, step)

    def is_over(self, step_hint: int, training: TrainingConfig, step: int) -> bool:
        """Whether training ends here, before the update about to be made."""
        if not (self.decays and training.ends_with_schedule):
            return False
        return step >= _lengths(step_hint, training.horizon_factor, training.warmup_factor)[0]


def learning_rate_factor(step_hint: int, horizon_factor: float, warmup_factor: float, step: int) -> float:
    """Warm-up and cosine decay over `horizon_factor * step_hint` steps, as a factor in [0, 1].

    Args:
        step_hint: the workload's.
        horizon_factor: length of the whole schedule, relative to `step_hint`.
        warmup_factor: length of the warm-up, relative to the whole.
        step: the number of updates made so far.
    """
    total, warmup = _lengths(step_hint, horizon_factor, warmup_factor)
    return warmup_cosine(step, total, warmup)


def constant_after_warmup(step_hint: int, horizon_factor: float, warmup_factor: float, step: int) -> float:
    """The same warm-up, and no decay: for optimizers that average instead. The horizon sets the warm-up alone."""
    _, warmup = _lengths(step_hint, horizon_factor, warmup_factor)
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def _lengths(step_hint: int, horizon_factor: float, warmup_factor: float) -> tuple[int, int]:
    """Steps of the whole schedule and of its warm-up."""
    total = max(1, round(horizon_factor * step_hint))
    return total, min(round(warmup_factor * total), total - 1)


WARMUP_COSINE = Schedule(learning_rate_factor, decays=True)
CONSTANT_AFTER_WARMUP = Schedule(constant_after_warmup, decays=False)
