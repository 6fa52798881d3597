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


@dataclasses.dataclass(frozen=True)
class Found:
    """What is kept of a workload.

    Attributes:
        seeds: on which every point was run that was run at all, so that all are compared on the same.
        target: the loss to be reached, the least mean at the end among all points with a margin; None without any.
        nadamw: the median loss at NadamW's end; None where a run is missing.
        outcomes: of the points that were run, in the order of the grid.
    """

    seeds: tuple[int, ...]
    target: float | None
    nadamw: float | None
    outcomes: Mapping[Point, Outcome]

    def curve(self, form: Form, approximation: str) -> dict[float, Outcome]:
        """The points of a curve by damping."""
        return {
            point.damping: one
            for point, one in self.outcomes.items()
            if (point.form, point.approximation) == (form, approximation)
        }


def found_of(workload: str, book: Book[Case], gains: Book[Gained]) -> Found:
    """Reads a workload's runs."""
    points = [point for part in WHOLE if part.workload == workload for point in part.points()]
    rates = {point: best_rate(point, book, gains) for point in points}
    kept = {point: runs for point in points if (runs := _runs(point, rates[point], book, gains))}
    seeds = tuple(seed for seed in SEEDS if kept and all(seed in runs for runs in kept.values()))
    losses = {point: [last_loss(runs[seed]) for seed in seeds] for point, runs in kept.items() if seeds}
    least = min(map(statistics.fmean, losses.values()), default=math.inf)
    wanted = MARGIN * least if math.isfinite(least) else None
    outcomes = {}
    for point, runs in kept.items():
        rate = rates[point]
        if wanted is not None and rate is not None:
            steps = tuple(reached(runs[seed]["curve"], wanted) for seed in seeds)
            outcomes[point] = Outcome(rate, steps, tuple(losses[point]))
    return Found(seeds, wanted, _nadamw(workload, seeds, book), outcomes)


def _runs(point: Point, rate: float | None, book: Book[Case], gains: Book[Gained]) -> dict[int, dict[str, Any]]:
    """Of a point at its curve's rate, by seed."""
    if rate is None or (point.form.length == "none" and gains.of(Gained.of(point)) is None):
        return {}
    gain = gain_of(point, gains)
    found = {seed: book.of(case_of(point, point.workload, gain, rate, seed)) for seed in SEEDS}
    return {seed: one for seed, one in found.items() if one is not None}


def _nadamw(workload: str, seeds: Sequence[int], book: Book[Case]) -> float | None:
    found = [book.of(case_of(None, workload, 1.0, 1.0, seed)) for seed in seeds]
    losses = [last_loss(one) for one in found if one is not None]
    return statistics.median(losses) if losses and len(losses) == len(seeds) else None


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
    count = min((len(one.steps) for one in outcomes.values()), default=0)
    found = [width({value: one.steps[seed] for value, one in outcomes.items()}) for seed in range(count)]
    return [one for one in found if one is not None]


def _loss(value: object) -> float:
    return math.inf if value is None else float(str(value))
