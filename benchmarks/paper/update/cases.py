"""What is run, and the results that are kept of it. No framework."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from benchmarks.kept import Book
from workloads.runner.jobs import CHECKOUT

PATH = CHECKOUT / "docs" / "results" / "update.jsonl"
OPTIMIZERS = ("nadamw", "expand", "part", "reduce")
BATCHES = (128, 512, 2048)
QUICK = (128,)


@dataclasses.dataclass(frozen=True)
class Case:
    """Updates by one optimizer.

    Attributes:
        optimizer: "nadamw", or an approximation: "expand", "reduce", "part" (expand from a part of the rows).
        batch: examples.
        memory_gb: what the process may take beyond what it has before the first update; None for no limit.
    """

    optimizer: str
    batch: int
    memory_gb: float | None = None


def cases(memory_gb: float, *, quick: bool) -> list[Case]:
    """All: each without a limit, which is timed, and with it."""
    return [
        Case(optimizer, batch, limit)
        for batch in (QUICK if quick else BATCHES)
        for optimizer in OPTIMIZERS
        for limit in (None, memory_gb)
    ]


def book(path: Path = PATH) -> Book[Case]:
    """What is kept of them.

    Raises:
        UserError: a line cannot be read.
    """
    return Book(Case, path)
