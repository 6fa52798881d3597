"""`python -m benchmarks.paper worth`: measures what is missing, and writes page and figure."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.experiments import records
from benchmarks.kept import Book
from benchmarks.paper.worth import figure, measure, page
from benchmarks.paper.worth.measure import Start
from commands import atomic
from commands.errors import tell
from workloads.runner.jobs import CHECKOUT

PATH = CHECKOUT / "docs" / "results" / "worth.jsonl"
SECONDS = 50  # CPU time of a network, where docs/ were measured


def run(given: argparse.Namespace, output: Path) -> None:
    """Runs the part.

    Args:
        given: `quick`, `again`, `results` from the command line.
        output: the page; the figure is written beside its folder, in figures/worth.png.
    """
    book = Book(Start, Path(given.results) if given.results else PATH)
    wanted = page.STARTS[:1] if given.quick else page.STARTS
    _measure(wanted, book, again=given.again)
    atomic.write_text(output, page.page(book))
    picture = output.parent.parent / "figures" / "worth.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_bytes(picture, figure.draw(book, records.read()))
    tell(f"Written: {picture}")


def _measure(wanted: Sequence[Start], book: Book[Start], *, again: bool) -> None:
    todo = list(wanted) if again else book.missing(wanted)
    minutes = SECONDS * len(todo) / 60
    tell(
        f"==> {len(todo)} networks, about {minutes:.0f} min of CPU time; {len(wanted) - len(todo)} are kept already"
    )
    for number, start in enumerate(todo, 1):
        book.add(start, measure.measure(start))
        tell(f"    {number} of {len(todo)}: {start.workload}, seed {start.seed}")
