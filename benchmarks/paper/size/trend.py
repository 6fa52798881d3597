"""What the ladder comes to: steps and cost by rung, and their trend over the size. Arithmetic on kept runs."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.kept import Book
from benchmarks.paper.size.ladder import RATES, SEEDS, Training

DRAWS = 2000
Curve = Sequence[Sequence[float]]
Rung = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """An optimizer on a rung, at its best learning rate.

    Attributes:
        rate: over the submission's own.
        steps: to the target by seed; infinite where it was missed.
        loss: at the end, by seed.
        cost: CPU seconds of a step, by seed.
    """

    rate: float
    steps: tuple[float, ...]
    loss: tuple[float, ...]
    cost: tuple[float, ...]


def target(book: Book[Training], rung: Rung) -> float | None:
    """NadamW's median loss at the end of its horizon, at its best rate; None where a run is missing."""
    medians = []
    for rate in RATES:
        runs = _runs(book, rung, "nadamw", rate)
        if runs is None:
            return None
        medians.append(_median([_last(run) for run in runs]))
    best = min(medians)
    return best if math.isfinite(best) else None


def outcome(book: Book[Training], rung: Rung, optimizer: str) -> Outcome | None:
    """At the rate that takes the fewest steps to the target, then ends lowest; None where a run is missing."""
    wanted = target(book, rung)
    if wanted is None:
        return None
    found = []
    for rate in RATES:
        runs = _runs(book, rung, optimizer, rate)
        if runs is None:
            return None
        found.append(
            Outcome(
                rate,
                tuple(reached(run["curve"], wanted) for run in runs),
                tuple(_last(run) for run in runs),
                tuple(run["seconds"] for run in runs),
            )
        )
    return min(found, key=lambda one: (statistics.median(one.steps), _median(one.loss)))


def reached(curve: Curve, wanted: float) -> float:
    """The first evaluated step at the target; infinite if there is none."""
    return next((step for step, loss in curve if loss <= wanted), math.inf)


def slope(by_parameters: Mapping[int, Sequence[float]]) -> tuple[float, float, float] | None:
    """By what a ratio is multiplied where a model has ten times the parameters, with a 95 % bootstrap interval.

    Least squares of the ratios' logarithms over that of the parameters; seeds are drawn within each rung.

    Args:
        by_parameters: a rung's parameters -> ratios by seed, all finite.

    Returns:
        None for fewer than two rungs.
    """
    if len(by_parameters) < 2:
        return None
    sizes = np.log10(np.array(list(by_parameters), dtype=float))
    logs = [np.log(np.array(ratios)) for ratios in by_parameters.values()]
    centred = sizes - sizes.mean()

    def fitted(means: np.ndarray) -> np.ndarray:
        result: np.ndarray = np.exp(means @ centred / (centred @ centred))
        return result

    rng = np.random.default_rng(0)
    drawn = np.stack([rng.choice(log, (DRAWS, len(log))).mean(1) for log in logs], 1)
    low, high = np.quantile(fitted(drawn), (0.025, 0.975))
    return float(fitted(np.array([log.mean() for log in logs]))), float(low), float(high)


def _runs(book: Book[Training], rung: Rung, optimizer: str, rate: float) -> list[dict[str, Any]] | None:
    found = [book.of(Training(*rung, optimizer, rate, seed)) for seed in SEEDS]
    return [run for run in found if run is not None] if all(found) else None


def _last(run: Mapping[str, Any]) -> float:
    return float(run["curve"][-1][1])


def _median(losses: Sequence[float]) -> float:
    """NaN counts as the worst."""
    return statistics.median(loss if math.isfinite(loss) else math.inf for loss in losses)
