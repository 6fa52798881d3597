"""The points a tuning study chooses, and at which edges of the search space they lie."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from workloads.runner.outcome import Outcome
from workloads.runner.tuning import Entry

EDGE = 0.1  # the share of a range, at either end, that counts as its edge


@dataclass(frozen=True)
class Tuned:
    """A trial of a tuning study.

    Attributes:
        trial: its number, counted from 1.
    """

    trial: int
    point: Mapping[str, object]
    outcome: Outcome


def ranking(trials: Sequence[Tuned], *, lower_is_better: bool, by_steps: bool = True) -> list[Tuned]:
    """The trials, best first: those that reached the target by their steps, then the rest by their best metric.

    Ties go to the better metric, then to the lower number; a trial without a metric comes last.

    Args:
        trials: in any order.
        lower_is_better: the direction of the metric.
        by_steps: False for the best metric alone, whether or not a target was reached.
    """

    def key(tuned: Tuned) -> tuple[float, float, int]:
        steps, metric = tuned.outcome["steps_to_target"], tuned.outcome["best_metric"]
        reached = math.inf if steps is None or not by_steps else steps
        distance = math.inf if metric is None else metric if lower_is_better else -metric
        return reached, distance, tuned.trial

    return sorted(trials, key=key)


def edges(point: Mapping[str, object], space: Mapping[str, Entry] | Sequence[object]) -> list[str]:
    """The hyperparameters of a point that lie at an edge of the space, such as "learning_rate (high)".

    An edge is a tenth of a range, measured as it is drawn, linearly or by logarithm, or the least or greatest of
    three or more feasible numbers. A list of points has no edges.
    """
    found = []
    for name, entry in space.items() if isinstance(space, Mapping) else ():
        position = _position(entry, point[name])
        if position is not None and not EDGE <= position <= 1 - EDGE:
            found.append(f"{name} ({'low' if position < EDGE else 'high'})")
    return found


def _position(entry: Entry, value: object) -> float | None:
    """Where a value lies in its range, from 0 to 1; None where there is no range."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    if "feasible_points" in entry:
        numbers = sorted({one for one in entry["feasible_points"] if isinstance(one, (int, float))})
        return numbers.index(value) / (len(numbers) - 1) if len(numbers) > 2 else None
    low, high = entry["min"], entry["max"]
    if low == high:
        return None
    if entry["scaling"] == "log":
        return math.log(value / low) / math.log(high / low)
    return (value - low) / (high - low)
