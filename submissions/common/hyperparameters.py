"""Hyperparameters as dataclasses that check themselves, read from a point of the search space before training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TypeAlias

from algoperf_kfac.schedule import DECAYS

Check: TypeAlias = tuple[Callable[[float], bool], str]

POSITIVE: Check = (lambda value: value > 0, "a number > 0")
NON_NEGATIVE: Check = (lambda value: value >= 0, "a number >= 0")
FRACTION: Check = (lambda value: 0 <= value < 1, "a number in [0, 1)")
UNIT: Check = (lambda value: 0 < value <= 1, "a number in (0, 1]")
OPEN_UNIT: Check = (lambda value: 0 < value < 1, "a number in (0, 1)")
COUNT: Check = (lambda value: isinstance(value, int) and value >= 1, "a whole number >= 1")

SCHEDULE_CLOCKS = ("steps", "time", "sooner", "restart")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """What the training around an optimizer reads, named as in AlgoPerf.

    Attributes:
        warmup_factor: length of the warm-up as a share of the horizon.
        horizon_factor: horizon of the schedule as a share of the workload's step_hint.
        decay_shape: how the learning rate comes down behind the warm-up, with t from 0 to 1: "cosine"
            ((1 + cos(pi t)) / 2), "linear" (1 - t) or "one_minus_sqrt" (1 - sqrt(t)). A schedule that does not
            decay takes no notice of it.
        schedule_clock: what brings the schedule to its end: "steps"; "time", the share of the runtime budget that
            has been used, whether steps are slow or fast; "sooner", whichever of the two is further; or "restart",
            the same and, where steps came first and half as much time as they took is left, the whole schedule once
            more, which ends with the time (warm restarts, Loshchilov and Hutter 2017, arXiv 1608.03983).
        budget_factor: where it ends by time, as a share of the runtime budget, which is 1.5 times the workload's in
            the self-tuning ruleset.
        label_smoothing: as AlgoPerf's loss_fn takes it.
        dropout_rate: as AlgoPerf's model_fn takes it.
        grad_clip: global norm the gradient is clipped to, None for no clipping.
        ends_with_schedule: whether the submission ends training behind the horizon, where the learning rate has
            decayed. A schedule that does not decay goes on.

    Raises:
        ValueError: naming the hyperparameter, its value and what is allowed.
    """

    warmup_factor: float = 0.05
    horizon_factor: float = 1.0
    decay_shape: str = "cosine"
    schedule_clock: str = "steps"
    budget_factor: float = 1.0
    label_smoothing: float = 0.0
    dropout_rate: float = 0.0
    grad_clip: float | None = None
    ends_with_schedule: bool = False

    def __post_init__(self) -> None:
        check("warmup_factor", self.warmup_factor, FRACTION)
        check("horizon_factor", self.horizon_factor, POSITIVE)
        if self.decay_shape not in tuple(DECAYS):  # whatever it is
            raise ValueError(f"hyperparameter decay_shape={self.decay_shape!r}: allowed is one of {tuple(DECAYS)}")
        if self.schedule_clock not in SCHEDULE_CLOCKS:
            raise ValueError(
                f"hyperparameter schedule_clock={self.schedule_clock!r}: allowed is one of {SCHEDULE_CLOCKS}"
            )
        check("budget_factor", self.budget_factor, POSITIVE)
        check("label_smoothing", self.label_smoothing, FRACTION)
        check("dropout_rate", self.dropout_rate, FRACTION)
        check("grad_clip", self.grad_clip, POSITIVE, optional=True)
        if not isinstance(self.ends_with_schedule, bool):
            raise ValueError(
                f"hyperparameter ends_with_schedule={self.ends_with_schedule!r}: allowed is True or False"
            )


def check(name: str, value: object, allowed: Check, *, optional: bool = False) -> None:
    """Raises ValueError unless a value is a finite number in the allowed range, or None if it is optional."""
    if optional and value is None:
        return
    in_range, text = allowed
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not (number and in_range(value)):  # type: ignore[arg-type]  # a number
        raise ValueError(f"hyperparameter {name}={value!r}: allowed is {text}{', or None' * optional}")


def names_of(config: type) -> set[str]:
    """The hyperparameters of a dataclass."""
    return {field.name for field in dataclasses.fields(config)}
