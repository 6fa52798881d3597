"""`python -m benchmarks.paper evidence`: trains what is missing, and writes the page."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.kept import Book
from benchmarks.paper.complexity.worker import ONE_THREAD
from benchmarks.paper.evidence import cases, page, training
from benchmarks.paper.evidence.cost import Cost
from benchmarks.paper.evidence.training import EVIDENCE, Case
from commands import atomic
from commands.errors import UserError, tell
from workloads.runner.jobs import CHECKOUT

# CPU seconds of a run, where docs/ were measured.
WITH_EVIDENCE, WITHOUT = 32, 12


def run(given: argparse.Namespace, output: Path) -> None:
    """Runs the part.

    Args:
        given: `quick`, `again`, `results` (here a folder) from the command line.
        output: the page.
    """
    runs, costs = cases.books(Path(given.results)) if given.results else cases.books()
    measure_costs(costs, again=given.again)
    seeds = cases.SEEDS[:1] if given.quick else cases.SEEDS
    train(cases.runs(seeds), runs, again=given.again)
    train(cases.retrained(runs, seeds), runs, again=given.again)
    atomic.write_text(output, page.page(runs, costs))


def train(
    wanted: Sequence[Case],
    book: Book[Case],
    *,
    again: bool = False,
    runs: Callable[[Case], dict[str, Any]] = training.run,
) -> None:
    """Trains those that no result is kept of, or all of them again; each is kept as it ends."""
    todo = list(wanted) if again else book.missing(wanted)
    seconds = sum(WITH_EVIDENCE if case.method in EVIDENCE else WITHOUT for case in todo)
    kept = len(wanted) - len(todo)
    tell(f"==> {len(todo)} runs, about {seconds / 60:.0f} min of CPU time; {kept} are kept already")
    for number, case in enumerate(todo, 1):
        result = runs(case)
        book.add(case, result)
        how = case.method if case.method in EVIDENCE else f"{case.method}, weight decay {case.decay:g}"
        what = f"{how}, width {case.width}, {'shifted' if case.augment else 'as they are'}, seed {case.seed}"
        tell(f"    {number} of {len(todo)}: {what}: log-likelihood {result['log_likelihood']}")


def measure_costs(book: Book[Cost], *, again: bool = False) -> None:
    """What evidence steps take, each in a process of its own.

    Raises:
        UserError: a process failed.
    """
    for cost in cases.costs() if again else book.missing(cases.costs()):
        asked = json.dumps(dataclasses.asdict(cost))
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.paper.evidence.cost", asked],
            capture_output=True,
            text=True,
            cwd=CHECKOUT,
            env={**os.environ, **ONE_THREAD},
            check=False,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise UserError(f"{cost} failed ({last})")
        book.add(cost, json.loads(done.stdout.strip().splitlines()[-1]))
