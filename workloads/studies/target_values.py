"""Targets from the runs at each submission's best point, and whether they are any good."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from commands.errors import UserError
from workloads.runner import experiment

REFERENCE = "nadamw"  # whose share of the horizon says whether a target is any good
# A target is good if the reference needs this share of the horizon, and its seeds agree so well on the steps.
GOOD_SHARE, GOOD_SPREAD = (0.60, 0.95), 0.20
DIGITS = 6


@dataclass(frozen=True)
class Repeat:
    """A run at a submission's best point.

    Attributes:
        evaluations: step, validation and test metric of each; NaN where there was none.
        seconds: of training and evaluations.
        ms_per_step: of training.
    """

    evaluations: tuple[tuple[int, float, float], ...]
    seconds: float
    ms_per_step: float

    def best(self, split: int, *, lower_is_better: bool) -> float:
        """The best metric achieved on validation (1) or test (2); the worst there is where none is a number."""
        known = [row[split] for row in self.evaluations if not math.isnan(row[split])]
        if not known:
            return math.inf if lower_is_better else -math.inf
        return min(known) if lower_is_better else max(known)

    def steps_to(self, target: float, *, lower_is_better: bool) -> float:
        """The first step at which an evaluation meets a validation target; infinite without one."""
        steps = (step for step, value, _ in self.evaluations if _meets(value, target, lower_is_better))
        return next(steps, math.inf)


@dataclass(frozen=True)
class Targets:
    """What the runs of all submissions give.

    Attributes:
        submission: whose median is the best.
        medians: submission -> median over seeds of its best validation metric.
    """

    validation: float
    test: float
    submission: str
    medians: Mapping[str, float]


def settle(repeats: Mapping[str, Sequence[Repeat]], *, lower_is_better: bool) -> Targets:
    """Targets from the repeats of each submission's best point; see `workloads.targets`.

    Both are rounded to six digits, to the easier side, so that the run they come from meets them.

    Raises:
        UserError: no submission has a finite median.
    """
    best = {name: [one.best(1, lower_is_better=lower_is_better) for one in runs] for name, runs in repeats.items()}
    medians = {name: statistics.median(values) for name, values in best.items()}
    winner = (min if lower_is_better else max)(medians, key=lambda name: medians[name])
    if not math.isfinite(medians[winner]):
        raise UserError("no submission has a median that is a number: all runs diverged.")
    validation = _rounded(medians[winner], lower_is_better)
    achieved = [
        one.best(2, lower_is_better=lower_is_better)
        for one, value in zip(repeats[winner], best[winner], strict=True)
        if _meets(value, validation, lower_is_better)
    ]
    worst = max(achieved) if lower_is_better else min(achieved)
    return Targets(validation, _rounded(worst, lower_is_better), winner, medians)


def _meets(value: float, target: float, lower_is_better: bool) -> bool:
    """Whether a metric reaches a target; NaN does not."""
    return value <= target if lower_is_better else value >= target


def _rounded(value: float, lower_is_better: bool) -> float:
    """Six significant digits, away from the hard side."""
    if value == 0 or not math.isfinite(value):
        return value
    digits = DIGITS - 1 - math.floor(math.log10(abs(value)))
    near = round(value, digits)
    if _meets(value, near, lower_is_better):
        return near
    return round(near + (1 if lower_is_better else -1) * 10.0**-digits, digits)


def repeat_in(trial: Path, metric: str) -> Repeat:
    """A finished trial."""
    outcome = experiment.outcome(trial)
    if outcome is None:
        raise UserError(f"{trial} has not finished; run the command again.")
    with open(trial / "eval_measurements.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    evaluations = tuple(
        (int(row["global_step"]), float(row[f"validation/{metric}"]), float(row[f"test/{metric}"])) for row in rows
    )
    seconds = outcome["accumulated_submission_time"] + outcome["accumulated_eval_time"]
    return Repeat(evaluations, seconds, outcome["ms_per_step"])


def verdict(found: Mapping[str, object]) -> str:
    """What is wrong with a target, or "good"."""
    share, spread = found["share_of_horizon"], found["spread_of_steps"]
    low, high = GOOD_SHARE
    if not isinstance(share, float):
        return f"{REFERENCE} misses it in most seeds"
    if not low <= share <= high:
        return f"{REFERENCE} needs {100 * share:.0f} % of the horizon, not {100 * low:.0f} to {100 * high:.0f}"
    if not isinstance(spread, float):
        return f"{REFERENCE} misses it in a seed"
    if spread > GOOD_SPREAD:
        return f"steps of {REFERENCE} spread by {100 * spread:.0f} % over seeds"
    return "good"
