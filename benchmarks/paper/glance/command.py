"""`python -m benchmarks.paper glance`: the one figure, from what is kept."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.paper.glance import figure, sources
from commands import atomic
from workloads.runner.jobs import CHECKOUT

RESULTS = CHECKOUT / "docs" / "results"


def run(given: argparse.Namespace, output: Path) -> None:
    """Draws it.

    Args:
        given: `results` from the command line, a folder like docs/results.
        output: the PNG file.

    Raises:
        UserError: results are missing; the message has the command that makes them.
    """
    atomic.write_bytes(output, figure.draw(sources.read(Path(given.results) if given.results else RESULTS)))
