"""`python -m benchmarks.paper update`: runs what is missing, and writes the page."""

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
from benchmarks.paper.update import cases, page
from benchmarks.paper.update.cases import Case
from commands import atomic
from commands.errors import UserError, tell
from workloads.runner.jobs import CHECKOUT

# CPU seconds of a process, and of an example (measured where docs/ were).
STARTING, EXAMPLE = 3.0, 0.008
Run = Callable[[Case], dict[str, Any]]


def run(given: argparse.Namespace, output: Path) -> None:
    """Runs the part.

    Args:
        given: `quick`, `again`, `memory_gb`, `results` from the command line.
        output: the page.

    Raises:
        UserError: a value does not fit, or a process failed.
    """
    if not given.memory_gb > 0:
        raise UserError(f"--memory_gb={given.memory_gb:g}: must be positive")
    book = cases.book(Path(given.results) if given.results else cases.PATH)
    wanted = cases.cases(given.memory_gb, quick=given.quick)
    measure(wanted, book, again=given.again)
    atomic.write_text(output, page.page(book, given.memory_gb))


def measure(wanted: Sequence[Case], book: Book[Case], *, again: bool = False, runs: Run | None = None) -> None:
    """Runs the cases that no result is kept of, or all of them again.

    Args:
        wanted: the cases.
        book: what is kept of them.
        again: whether to run also those of which there is one.
        runs: runs one; default: in a process.

    Raises:
        UserError: a process failed; what was measured before is kept.
    """
    todo = list(wanted) if again else book.missing(wanted)
    seconds = sum(STARTING + EXAMPLE * case.batch for case in todo)
    tell(f"==> {len(todo)} runs, about {seconds:.0f} s of CPU time; {len(wanted) - len(todo)} are kept already")
    for number, case in enumerate(todo, 1):
        result = (runs or in_process)(case)
        book.add(case, result)
        limit = "" if case.memory_gb is None else f" within {case.memory_gb:g} GB"
        tell(f"    {number} of {len(todo)}: {case.optimizer}, batch {case.batch:,}{limit}: {result['outcome']}")


def in_process(case: Case) -> dict[str, Any]:
    """The result of a case, from a process of its own.

    Raises:
        UserError: it failed for another reason than its limit.
    """
    asked = json.dumps(dataclasses.asdict(case))
    command = [sys.executable, "-m", "benchmarks.paper.update.worker", asked]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=CHECKOUT, env={**os.environ, **ONE_THREAD}, check=False
    )
    if done.returncode < 0 and case.memory_gb is not None:
        return {**dataclasses.asdict(case), "outcome": "out"}  # a library that does not look dies of it
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"{case} failed ({last}); what was measured is kept")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result
