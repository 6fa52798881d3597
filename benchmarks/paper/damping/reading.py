"""What the runs come to: steps to a common loss, the best damping, and how wide the range around it is."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.kept import Book
from benchmarks.paper.damping.grid import RATES, SEEDS, WHOLE, Case, Form, Point, case_of
from benchmarks.paper.damping.training import Gained, best_rate, gain_of, last_loss

MARGIN = 1.25  # times the least loss at the end: what all are to reach
NEAR = 1.1  # of the best steps: within it, a damping counts to the width
Curve = Sequence[Sequence[float | None]]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A point over the seeds.

    Attributes:
        rate: the multiple of the learning rate that tuning chose.
        steps: to the target, by seed; infinite where it was missed.
        losses: at the end, by seed; infinite where it diverged.
    """

    rate: float
    steps: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def at_an_edge(self) -> bool:
        """Whether a better rate may lie beyond those tried."""
        return self.rate in (RATES[0], RATES[-1])


@dataclasses.dataclass(frozen=True)
class Width:
    """A range of dampings within 10 % of the best steps.

    Attributes:
        best: the damping of the fewest steps.
        low: lower end, along straight lines of steps over log damping.
        high: upper end.
        open_below: whether it reaches the least damping that was run.
        open_above: whether it reaches the greatest.
    """

    best: float
    low: float
    high: float
    open_below: bool
    open_above: bool

    @property
    def decades(self) -> float:
        """Powers of ten from end to end."""
        return math.log10(self.high / self.low)


def nadamw(book: Book[Case], workload: str) -> float | None:
    """Its median loss at the end of the horizon; None where a run is missing."""
    found = [book.of(case_of(None, workload, 1.0, 1.0, seed)) for seed in SEEDS]
    losses = [last_loss(one) for one in found if one is not None]
    return statistics.median(losses) if len(losses) == len(SEEDS) else None


def target(workload: str, book: Book[Case], gains: Book[Gained]) -> float | None:
    """The loss to be reached: the least mean at the end among all points that were run, and a margin."""
    means = []
    for point in (point for part in WHOLE if part.workload == workload for point in part.points()):
        found = paired(point, book, gains)
        if found:
            means.append(statistics.fmean(map(last_loss, found)))
    return MARGIN * min(means) if means and math.isfinite(min(means)) else None


def paired(point: Point, book: Book[Case], gains: Book[Gained]) -> list[dict[str, Any]]:
    """The runs of a point at its curve's rate, by seed; empty where one is missing."""
    rate = best_rate(point, book, gains)
    if rate is None or (point.form.length == "none" and gains.of(Gained.of(point)) is None):
        return []
    gain = gain_of(point, gains)
    found = [book.of(case_of(point, point.workload, gain, rate, seed)) for seed in SEEDS]
    kept = [one for one in found if one is not None]
    return kept if len(kept) == len(SEEDS) else []


def outcome(point: Point, wanted: float, book: Book[Case], gains: Book[Gained]) -> Outcome | None:
    """A point at its curve's rate; None where a run is missing.

    Args:
        point: the point.
        wanted: the loss to be reached.
        book: of the runs.
        gains: of the gains.
    """
    kept, rate = paired(point, book, gains), best_rate(point, book, gains)
    if not kept or rate is None:
        return None
    return Outcome(
        rate,
        tuple(reached(one["curve"], wanted) for one in kept),
        tuple(map(last_loss, kept)),
    )


def curve(
    workload: str, form: Form, approximation: str, dampings: Sequence[float], book: Book[Case], gains: Book[Gained]
) -> dict[float, Outcome]:
    """The points of a curve of which all runs are kept, by damping."""
    wanted = target(workload, book, gains)
    if wanted is None:
        return {}
    found = {value: outcome(Point(workload, form, approximation, value), wanted, book, gains) for value in dampings}
    return {value: one for value, one in found.items() if one is not None}


def reached(evaluations: Curve, wanted: float) -> float:
    """Steps until the loss is `wanted`, along a straight line between evaluations; infinite if it never is."""
    before: tuple[float, float] | None = None
    for step, loss in evaluations:
        assert step is not None
        here = _loss(loss)
        if here <= wanted:
            if before is None or not math.isfinite(before[1]):
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - wanted) / (before[1] - here)
        before = (step, here)
    return math.inf


def width(steps: Mapping[float, float]) -> Width | None:
    """Of one curve, steps by damping; None where no damping reaches the target.

    Beside a damping that misses, the range ends at the last that does not.
    """
    dampings = sorted(steps)
    finite = [value for value in dampings if math.isfinite(steps[value])]
    if not finite:
        return None
    best = min(finite, key=lambda value: steps[value])
    limit = NEAR * steps[best]
    place = dampings.index(best)
    low, open_below = _end(dampings[place::-1], steps, limit)
    high, open_above = _end(dampings[place:], steps, limit)
    return Width(best, low, high, open_below, open_above)


def _end(dampings: Sequence[float], steps: Mapping[float, float], limit: float) -> tuple[float, bool]:
    """Where steps exceed the limit on the way along the dampings, and whether they do not."""
    for here, there in itertools.pairwise(dampings):
        if steps[there] > limit:
            if not math.isfinite(steps[there]):
                return here, False
            share = (limit - steps[here]) / (steps[there] - steps[here])
            return 10 ** (math.log10(here) + share * math.log10(there / here)), False
    return dampings[-1], True


def widths(outcomes: Mapping[float, Outcome]) -> list[Width]:
    """Of each seed's own curve; fewer than there are seeds where one reaches the target nowhere."""
    found = [width({value: one.steps[seed] for value, one in outcomes.items()}) for seed in range(len(SEEDS))]
    return [one for one in found if one is not None]


def _loss(value: object) -> float:
    return math.inf if value is None else float(str(value))
