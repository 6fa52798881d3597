"""`python -m benchmarks.paper frequency`: the page, of the experiment's kept runs and the cost model."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.experiments import records
from benchmarks.paper.frequency import costs, page
from commands import atomic
from commands.errors import UserError, tell
from workloads.runner.jobs import CHECKOUT

RESULTS = CHECKOUT / "docs" / "results"
SPEED = "frequency_speed.json"


def run(given: argparse.Namespace, output: Path) -> None:
    """Writes the page.

    Args:
        given: `results` from the command line, a folder.
        output: the page.

    Raises:
        UserError: no run of the experiment is kept.
    """
    folder = Path(given.results) if given.results else RESULTS
    kept = records.read(folder / "experiments.jsonl")
    tell("==> the speed of matrices, seconds of CPU time, where it is not kept")
    rates, speed = costs.rates(folder), costs.speed(folder / SPEED)
    text = page.page(kept, costs.plan_of, lambda plan: costs.costs_of(plan, rates, speed))
    if "| base |" not in text:
        raise UserError(f"{folder} has no run of the experiment: python -m benchmarks.experiments run frequency")
    atomic.write_text(output, text)
