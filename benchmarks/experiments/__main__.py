"""Experiments on the algorithm.

    python -m benchmarks.experiments list
    python -m benchmarks.experiments run polar --jobs=2 --experiment_dir=runs/experiments
    python -m benchmarks.experiments table

`run` trains what is missing of the named experiments of `notebook.py`, base and variants on paired seeds, a process
a core, goes on after an interruption, and keeps each result in docs/results/experiments.jsonl. `table` writes
docs/experiments.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.experiments import page, records, runs
from benchmarks.experiments.experiment import Experiment
from benchmarks.experiments.notebook import EXPERIMENTS
from commands import atomic, errors
from commands.arguments import Parser
from commands.errors import UserError, tell
from workloads.runner import experiment as folders
from workloads.runner import jobs
from workloads.runner.jobs import CHECKOUT


def main() -> int:
    """Runs with the command line's arguments; returns the exit code."""
    parser = Parser("python -m benchmarks.experiments", __doc__)
    parser.add_argument("command", choices=("list", "run", "table"))
    parser.add_argument("names", nargs="*", help="experiments; default: all")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--experiment_dir", default="runs/experiments")
    parser.add_argument("--results", default=str(records.PATH), help="where results are kept")
    parser.add_argument("--page", default=str(CHECKOUT / "docs" / "experiments.md"))
    return errors.run(lambda: _command(parser.parse_args()), interrupted="interrupted; the same command goes on")


def _command(given: argparse.Namespace) -> int:
    chosen = _chosen(given.names)
    kept = Path(given.results)
    if given.command == "run":
        return _run(chosen, Path(given.experiment_dir).expanduser().resolve(), kept, given.jobs)
    results = records.read(kept)
    if given.command == "table":
        atomic.write_text(Path(given.page), page.page(EXPERIMENTS, results))
        tell(f"Written: {given.page}")
        return 0
    for one in chosen:
        wanted = list(runs.runs_of(one).values())
        left = len(runs.missing(wanted, results))
        tell(f"{one.name}: {one.change} ({len(wanted) - left} of {len(wanted)} runs)")
    return 0


def _chosen(names: Sequence[str]) -> list[Experiment]:
    known = {one.name: one for one in EXPERIMENTS}
    for name in names:
        if name not in known:
            raise UserError(f"There is no experiment '{name}'. Known: {', '.join(known)}.")
    return [known[name] for name in names or known]


def _run(chosen: Sequence[Experiment], directory: Path, kept: Path, parallel: int) -> int:
    folders.check_writable(directory)
    wanted = [run for one in chosen for run in runs.runs_of(one).values()]
    left = runs.missing(wanted, records.read(kept))
    todo = [runs.job_of(run, directory) for run in left]
    tell(f"==> {len(left)} runs, {parallel} at a time; {len(set(wanted)) - len(left)} are kept already")
    try:
        failed = jobs.run(todo, parallel, say_kept=False)
    finally:
        found = (runs.result(run, directory) for run in left)
        records.add([one for one in found if one is not None], kept)
    for name in failed:
        tell(f"error: {name} failed", sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
