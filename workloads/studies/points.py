"""The points a suite tunes a submission over: the first of its search space, and some at shorter horizons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from workloads.runner import tuning
from workloads.runner.tuning import Entry

HORIZON = "horizon_factor"


@dataclass(frozen=True)
class Further:
    """Points behind the first: the sequence goes on, with the horizon among shorter ones.

    Attributes:
        count: how many.
        horizons: shares of the step hint.
    """

    count: int
    horizons: tuple[float, ...]


def of(path: Path, first: int, further: Further | None) -> list[dict[str, object]]:
    """The first points of a search space and the further ones.

    Point i is point i of the Halton sequence in either part. A list of points gives what it has; a space that does
    not choose between horizons goes on as it is.

    Raises:
        UserError: as `tuning.read_space`.
    """
    space = tuning.read_space(str(path))
    count = first + (further.count if further else 0)
    if isinstance(space, list):
        return space[:count]
    points = tuning.draw(space, count)
    if further and _chooses(space):
        shorter = {**space, HORIZON: {"feasible_points": list(further.horizons)}}
        points[first:] = tuning.draw(shorter, count)[first:]
    return points


def space_of(path: Path, further: Further | None) -> dict[str, Entry] | list[dict[str, object]]:
    """The search space that all of these points lie in."""
    space = tuning.read_space(str(path))
    if further and isinstance(space, dict) and _chooses(space):
        horizons = sorted({*space[HORIZON]["feasible_points"], *further.horizons})
        return {**space, HORIZON: {"feasible_points": horizons}}
    return space


def _chooses(space: Mapping[str, Entry]) -> bool:
    return len(space.get(HORIZON, {}).get("feasible_points", ())) > 1
