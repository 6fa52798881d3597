"""All runs of the experiment, and what is kept of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.kept import Book
from benchmarks.paper.evidence.cost import EXAMPLES, Cost
from benchmarks.paper.evidence.training import EVIDENCE, WIDTH, Case
from workloads.runner.jobs import CHECKOUT

RESULTS = CHECKOUT / "docs" / "results"
RUNS, COSTS = "evidence.jsonl", "evidence_costs.jsonl"
SEEDS = (3301, 3302, 3303)  # used for nothing else
GRID = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
EQUAL_COST = GRID[1:4]  # together they take about what one run with evidence does
WIDTHS = (4, WIDTH, 16)
SHIFTS = (False, True)


def runs(seeds: Sequence[int] = SEEDS) -> list[Case]:
    """Seed by seed, so that an interrupted experiment is paired."""
    found = []
    for seed in seeds:
        for augment in SHIFTS:
            found += [Case(method, augment, WIDTH, 0.0, seed) for method in EVIDENCE]
            found += [Case("grid", augment, WIDTH, decay, seed) for decay in GRID]
        found += [Case("reduce", False, width, 0.0, seed) for width in WIDTHS if width != WIDTH]
    return found


def retrained(book: Book[Case], seeds: Sequence[int] = SEEDS) -> list[Case]:
    """What the grid of equal cost chooses, on all images; of grids that are complete."""
    chosen = {(augment, seed): by_grid(book, augment, EQUAL_COST, seed) for augment in SHIFTS for seed in seeds}
    return [
        Case("retrained", augment, WIDTH, best["decay"], seed)
        for (augment, seed), best in chosen.items()
        if best is not None
    ]


def by_grid(
    book: Book[Case], augment: bool, grid: Sequence[float], seed: int, by: str = "held_out"
) -> dict[str, Any] | None:
    """The run of the grid that is best by held-out images, with the seconds of all; None where one is missing."""
    found = [book.of(Case("grid", augment, WIDTH, decay, seed)) for decay in grid]
    kept = [one for one in found if one is not None]
    if len(kept) < len(grid):
        return None
    best = max(kept, key=lambda one: float(one[by]))
    return {**best, "seconds": sum(one["seconds"] for one in kept)}


def costs() -> list[Cost]:
    """Of an evidence step, on both networks."""
    return [Cost(approximation, network) for network in EXAMPLES for approximation in EVIDENCE]


def books(folder: Path = RESULTS) -> tuple[Book[Case], Book[Cost]]:
    """What is kept of runs and of costs.

    Raises:
        UserError: a line cannot be read.
    """
    return Book(Case, folder / RUNS), Book(Cost, folder / COSTS)
