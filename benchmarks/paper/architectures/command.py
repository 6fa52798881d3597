"""`python -m benchmarks.paper architectures`: trains what is missing, and writes the page."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.kept import Book
from benchmarks.paper.architectures import hybrid, page
from benchmarks.paper.architectures.hybrid import Training
from commands import atomic
from commands.errors import tell
from workloads.runner.jobs import CHECKOUT

PATH = CHECKOUT / "docs" / "results" / "architectures.jsonl"
SECONDS = 18  # CPU time of a run, where docs/ were measured


def run(given: argparse.Namespace, output: Path) -> None:
    """Runs the part.

    Args:
        given: `quick`, `again`, `results` from the command line.
        output: the page.
    """
    book = Book(Training, Path(given.results) if given.results else PATH)
    wanted = trainings(seeds=page.SEEDS[:1] if given.quick else page.SEEDS)
    measure(wanted, book, again=given.again)
    atomic.write_text(output, page.page(book))


def trainings(seeds: Sequence[int]) -> list[Training]:
    """All runs; seed by seed, so that an interrupted sweep is paired."""
    return [
        Training(optimizer, rate, seed) for seed in seeds for optimizer in page.OPTIMIZERS for rate in page.RATES
    ]


def measure(
    wanted: Sequence[Training],
    book: Book[Training],
    *,
    again: bool = False,
    train: Callable[[Training], dict[str, Any]] = hybrid.train,
) -> None:
    """Trains those that no result is kept of, or all of them again; each is kept as it ends."""
    todo = list(wanted) if again else book.missing(wanted)
    minutes = SECONDS * len(todo) / 60
    tell(f"==> {len(todo)} runs, about {minutes:.0f} min of CPU time; {len(wanted) - len(todo)} are kept already")
    for number, case in enumerate(todo, 1):
        result = train(case)
        book.add(case, result)
        what = f"{case.optimizer}, {case.rate:g} times its learning rate, seed {case.seed}"
        tell(f"    {number} of {len(todo)}: {what}: validation loss {result['loss']}")
