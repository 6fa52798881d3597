"""`python -m benchmarks.paper size`: measures and trains what is missing, and writes the page."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.kept import Book
from benchmarks.paper.size import ladder, page, tiny
from benchmarks.paper.size.costs import sized
from benchmarks.paper.size.ladder import Training
from benchmarks.paper.size.shapes import SHAPES
from benchmarks.paper.size.tiny import Tiny
from commands import atomic
from commands.errors import UserError, tell
from workloads.runner.jobs import CHECKOUT

RESULTS = CHECKOUT / "docs" / "results"
EXACT, LADDER = "size_exact.jsonl", "size.jsonl"
SECONDS = 4  # CPU time of an exact case, where docs/ were measured


def run(given: argparse.Namespace, output: Path) -> None:
    """Runs the part.

    Args:
        given: `quick`, `again`, `kept`, `results` from the command line; the results are a folder.
        output: the page.

    Raises:
        UserError: the results are a file, or cannot be read.
    """
    folder = Path(given.results) if given.results else RESULTS
    if folder.is_file():
        raise UserError(f"--results={folder}: of size it is a folder, for {EXACT} and {LADDER}")
    exact, trained = Book(Tiny, folder / EXACT), Book(Training, folder / LADDER)
    if not given.kept:
        measure_tiny(tiny.tinies(quick=given.quick), exact, again=given.again)
        train(ladder.trainings(quick=given.quick), trained, again=given.again)
    tell("==> plans of published models, half a minute")
    shapes = SHAPES[:1] if given.quick else SHAPES
    atomic.write_text(output, page.page(exact, [sized(shape) for shape in shapes], trained))


def measure_tiny(
    wanted: Sequence[Tiny],
    book: Book[Tiny],
    *,
    again: bool = False,
    measure: Callable[[Tiny], dict[str, Any]] = tiny.measure,
) -> None:
    """Compares what no result is kept of with the exact curvature, or all again; each is kept as it ends."""
    todo = list(wanted) if again else book.missing(wanted)
    tell(
        f"==> {len(todo)} tiny models, about {SECONDS * len(todo)} s of CPU time; "
        f"{len(wanted) - len(todo)} are kept already"
    )
    for case in todo:
        book.add(case, measure(case))


def train(
    wanted: Sequence[Training],
    book: Book[Training],
    *,
    again: bool = False,
    train_one: Callable[[Training], dict[str, Any]] = ladder.train,
) -> None:
    """Trains those that no result is kept of, or all of them again; each is kept as it ends."""
    todo = list(wanted) if again else book.missing(wanted)
    minutes = ladder.expected_seconds(todo) / 60
    tell(
        f"==> {len(todo)} runs of the ladder, about {minutes:.0f} min of CPU time; "
        f"{len(wanted) - len(todo)} are kept already"
    )
    for number, case in enumerate(todo, 1):
        result = train_one(case)
        book.add(case, result)
        what = f"width {case.width}, {case.optimizer}, {case.rate:g} times its learning rate, seed {case.seed}"
        tell(f"    {number} of {len(todo)}: {what}: validation loss {result['curve'][-1][1]}")
