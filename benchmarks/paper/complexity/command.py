"""`python -m benchmarks.paper complexity`: measures what is missing, and writes page and figure."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.paper.complexity import figure, layers, measure, page, records
from benchmarks.paper.complexity.layers import FRAMEWORKS
from commands import atomic
from commands.errors import UserError, tell
from workloads.runner.jobs import CHECKOUT

FIGURE = CHECKOUT / "docs" / "figures" / "complexity.png"


def run(given: argparse.Namespace, output: Path) -> None:
    """Runs the part.

    Args:
        given: `quick`, `again`, `layers`, `framework`, `results` from the command line.
        output: the page; the figure lies where the page links to it, if the page is the documentation's.

    Raises:
        UserError: a name is unknown, or measuring failed.
    """
    frameworks = given.framework.split(",")
    for name in frameworks:
        if name not in FRAMEWORKS:
            raise UserError(f"There is no framework '{name}' here. Known: {', '.join(FRAMEWORKS)}.")
    sweeps = layers.chosen(given.layers, quick=given.quick)
    kept = Path(given.results) if given.results else records.PATH
    measure.run(sweeps, frameworks, kept, again=given.again)
    results = records.read(kept)
    atomic.write_text(output, page.page(layers.GRID, results))
    known = [name for name in FRAMEWORKS if any(found["framework"] == name for found in results.values())]
    beside = FIGURE if output.parent == CHECKOUT / "docs" / "generated" else output.with_suffix(".png")
    atomic.write_bytes(beside, figure.draw(layers.GRID, known, results))
    tell(f"Written: {beside}")
