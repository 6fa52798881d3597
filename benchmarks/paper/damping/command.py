"""`python -m benchmarks.paper damping`: trains what is missing, and writes the page and its figure."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.kept import Book
from benchmarks.paper.damping import figure, grid, page, training
from benchmarks.paper.damping.grid import Case
from benchmarks.paper.damping.training import Gained
from commands import atomic
from commands.errors import UserError
from workloads.runner.jobs import CHECKOUT

RESULTS = CHECKOUT / "docs" / "results"
RUNS, GAINS = "damping.jsonl", "damping_gains.jsonl"


def books(folder: Path = RESULTS) -> tuple[Book[Case], Book[Gained]]:
    """The kept runs and gains."""
    return Book(Case, folder / RUNS), Book(Gained, folder / GAINS)


def run(given: argparse.Namespace, output: Path) -> None:
    """Runs the part.

    Args:
        given: `quick`, `whole`, `again`, `results` (here a folder) from the command line.
        output: the page; the figure goes to ../figures beside it.

    Raises:
        UserError: the results are a file, or cannot be read.
    """
    folder = Path(given.results) if given.results else RESULTS
    if folder.is_file():
        raise UserError(f"--results={folder}: of damping it is a folder, for {RUNS} and {GAINS}")
    runs, gains = books(folder)
    parts = grid.QUICK if given.quick else grid.WHOLE if given.whole else grid.DEFAULT
    training.train_parts(parts, runs, gains, again=given.again)
    picture = output.parent.parent / "figures" / "damping.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_bytes(picture, figure.draw(runs, gains))
    atomic.write_text(output, page.page(runs, gains))
