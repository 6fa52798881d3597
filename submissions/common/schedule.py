"""The learning-rate schedules of the submissions: functions of the step alone, so resuming needs no state."""

from __future__ import annotations

from dataclasses import dataclass

from algoperf_kfac.schedule import warmup_decay
from submissions.common.hyperparameters import TrainingConfig


@dataclass(frozen=True)
class Schedule:
    """A learning rate over the steps of a workload.

    Attributes:
        decays: whether it comes down behind the warm-up (`learning_rate_factor`), so that hardly anything can be
            gained behind its horizon, or stays (`constant_after_warmup`).
    """

    decays: bool

    def at(self, step_hint: int, training: TrainingConfig, step: int) -> float:
        """The factor of the update about to be made, after `step` of them."""
        lengths = (step_hint, training.horizon_factor, training.warmup_factor)
        if not self.decays:
            return constant_after_warmup(*lengths, step)
        return learning_rate_factor(*lengths, step, training.decay_shape)

    def is_over(self, step_hint: int, training: TrainingConfig, step: int) -> bool:
        """Whether training ends here, before the update about to be made."""
        if not (self.decays and training.ends_with_schedule):
            return False
        return step >= _lengths(step_hint, training.horizon_factor, training.warmup_factor)[0]


def learning_rate_factor(
    step_hint: int, horizon_factor: float, warmup_factor: float, step: int, decay_shape: str = "cosine"
) -> float:
    """Warm-up and decay over `horizon_factor * step_hint` steps, as a factor in (0, 1].

    Args:
        step_hint: the workload's.
        horizon_factor: length of the whole schedule, relative to `step_hint`.
        warmup_factor: length of the warm-up, relative to the whole.
        step: the number of updates made so far.
        decay_shape: see `TrainingConfig.decay_shape`.
    """
    total, warmup = _lengths(step_hint, horizon_factor, warmup_factor)
    return warmup_decay(step, total, warmup, decay_shape)


def constant_after_warmup(step_hint: int, horizon_factor: float, warmup_factor: float, step: int) -> float:
    """The same warm-up, and no decay: for optimizers that average instead. The horizon sets the warm-up alone."""
    _, warmup = _lengths(step_hint, horizon_factor, warmup_factor)
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def _lengths(step_hint: int, horizon_factor: float, warmup_factor: float) -> tuple[int, int]:
    """Steps of the whole schedule and of its warm-up."""
    total = max(1, round(horizon_factor * step_hint))
    return total, min(round(warmup_factor * total), total - 1)


WARMUP_DECAY = Schedule(decays=True)
CONSTANT_AFTER_WARMUP = Schedule(decays=False)
