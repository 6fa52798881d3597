"""Schedules of the learning rate in submissions: functions of the step, or of the time spent where a point says so.

Both are the runner's, which keeps them over an interruption: resuming needs no state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from algoperf_kfac.schedule import warmup_decay
from submissions.common.api import Workload
from submissions.common.hyperparameters import TrainingConfig

SELF_TUNING_BUDGET = 1.5  # AlgoPerf's rules: what a self-tuning submission has, in external budgets
LATEST_RESTART = 2 / 3  # of the time: what is left is half of what was spent
SECONDS = "accumulated_submission_time"  # in the runner's train_state: of timed work, the same on all processes


@dataclass(frozen=True)
class Schedule:
    """A learning rate over the steps of a workload.

    Attributes:
        decays: whether it comes down behind the warm-up (`learning_rate_factor`), so that hardly anything can be
            gained behind its horizon, or stays (`constant_after_warmup`).
    """

    decays: bool

    def position(
        self,
        workload: Workload,
        training: TrainingConfig,
        step: int,
        train_state: Mapping[str, Any] | None,
        *,
        self_tuning: bool,
    ) -> int:
        """Where the schedule stands, in its own steps, when `step` updates have been made.

        Args:
            workload: its step_hint and its runtime budget, in seconds.
            training: see `TrainingConfig.schedule_clock`.
            step: the number of updates made so far.
            train_state: the runner's; read only where time counts. Of steps and an unknown time steps are sooner.
            self_tuning: whether the budget is that of the self-tuning ruleset.

        Returns:
            Steps of the schedule; where it may restart, from its length on those of the second one, and at the end
            of both twice its length.

        Raises:
            ValueError: time alone counts, and the runner does not tell it.
        """
        if training.schedule_clock == "steps":
            return step
        total, _ = _lengths(workload.step_hint, training.horizon_factor, training.warmup_factor)
        restarts = training.schedule_clock == "restart"
        seconds = (train_state or {}).get(SECONDS)
        if seconds is None and training.schedule_clock != "time":
            return 2 * total if restarts and step >= total else step
        if seconds is None:
            raise ValueError(
                f"hyperparameter schedule_clock={training.schedule_clock!r} needs the runner's "
                f"train_state[{SECONDS!r}], which it does not pass; take 'steps'"
            )
        budget = workload.max_allowed_runtime_sec * (SELF_TUNING_BUDGET if self_tuning else 1.0)
        spent = float(seconds) / (training.budget_factor * budget)
        by_time = int(total * spent)
        if training.schedule_clock == "time":
            return by_time
        if restarts and max(step, by_time) >= total:
            # What is a whole step but for rounding counts as one.
            return total + int(total * _of_the_rest(total / max(step, total), spent) + 1e-9)
        return max(step, by_time)

    def at(self, step_hint: int, training: TrainingConfig, step: int) -> float:
        """The factor of the update about to be made at a position of the schedule."""
        lengths = (step_hint, training.horizon_factor, training.warmup_factor)
        if not self.decays:
            return constant_after_warmup(*lengths, step)
        total, _ = _lengths(*lengths)
        again = step - total if training.schedule_clock == "restart" and step >= total else step
        return learning_rate_factor(*lengths, again, training.decay_shape)

    def is_over(self, step_hint: int, training: TrainingConfig, step: int) -> bool:
        """Whether training ends here, before the update about to be made at a position of the schedule."""
        if not (self.decays and training.ends_with_schedule):
            return False
        total, _ = _lengths(step_hint, training.horizon_factor, training.warmup_factor)
        return step >= (2 * total if training.schedule_clock == "restart" else total)


def _of_the_rest(first: float, spent: float) -> float:
    """How much of the time behind a first schedule is spent, in [0, 1]; 1 where that is too little for a second.

    When the first one ended is not kept: it is taken to have had its share of the steps in time, too.

    Args:
        first: its share of the steps made so far, in (0, 1].
        spent: the share of the time that is spent.
    """
    ended = first * spent
    return min(1.0, (spent - ended) / (1 - ended)) if ended <= LATEST_RESTART else 1.0


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
