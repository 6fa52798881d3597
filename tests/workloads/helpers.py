"""Runs the runner in a process of its own, and reads what it leaves."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.workloads.fake_training import Ended
from workloads import run
from workloads.bible_lm.task import BibleLmTask
from workloads.data import bible
from workloads.runner import jobs

CHECKOUT = Path(__file__).resolve().parents[2]
NADAMW = str(CHECKOUT / "submissions/nadamw/pytorch/submission.py")
TIMES = {
    "accumulated_eval_time",
    "accumulated_logging_time",
    "accumulated_submission_time",
    "score",
    "total_duration",
    "preemption_count",
}


def arguments(folder: Path, **changes: Any) -> list[str]:
    """The flags of a short run of NadamW; a value of None leaves a flag out."""
    values: dict[str, Any] = {
        "workload": "bible_lm",
        "framework": "pytorch",
        "submission_path": NADAMW,
        "tuning_ruleset": "self",
        "experiment_dir": folder,
        "experiment_name": "e",
        "rng_seed": 3,
        "max_global_steps": 4,
        **changes,
    }
    return [f"--{name}={value}" for name, value in values.items() if value is not None]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def start(flags: list[str], module: str = "workloads.run", **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", module, *flags],
        cwd=CHECKOUT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def copied_checkout(root: Path) -> Path:
    """A copy of the repository's packages, to add to."""
    for name in ("algoperf_kfac", "commands", "submissions", "tuning_search_spaces", "workloads"):
        shutil.copytree(CHECKOUT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(CHECKOUT / "LICENSE", root)
    return root


# Reads [[module, argument, ...], ...] and writes [[exit code, what it printed, its errors], ...].
_COMMANDS = """
import contextlib, io, json, runpy, sys
done = []
for sys.argv in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as end:
            code = end.code or 0
    done.append([code, out.getvalue(), err.getvalue()])
json.dump(done, sys.stdout)
"""


def run_in(checkout: Path, *commands: Sequence[str | Path]) -> list[subprocess.CompletedProcess[str]]:
    """Runs commands, `python -m` with their arguments, in a checkout.

    One after the other in one process, because importing a framework takes longer than most of them.
    """
    given = [[str(part) for part in command] for command in commands]
    finished = subprocess.run(
        [sys.executable, "-c", _COMMANDS],
        input=json.dumps(given),
        cwd=checkout,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    done = json.loads(finished.stdout)
    return [subprocess.CompletedProcess(command, *ended) for command, ended in zip(given, done, strict=True)]


def start_here(job: jobs.Job) -> Ended:
    """Takes the place of `jobs._start`: trains in this process, where a framework is imported already."""
    assert job.command[:3] == (sys.executable, "-m", "workloads.run")
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        return Ended(run.main(job.command[3:]))


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def metrics(trial: Path) -> list[dict[str, str]]:
    """The rows of eval_measurements.csv without what depends on the clock or on interruptions."""
    rows = table(trial / "eval_measurements.csv")
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def shrink(set_attribute: Callable[[Any, str, Any], None]) -> None:
    """Makes bible_lm cheap to build, train and evaluate, and evaluates it every two steps."""
    for name, value in {"width": 16, "depth": 1, "heads": 2, "mlp_width": 32}.items():
        set_attribute(BibleLmTask, name, value)
    set_attribute(BibleLmTask, "batch_size", 8)
    set_attribute(BibleLmTask, "eval_period_steps", 2)
    set_attribute(BibleLmTask, "eval_batch_size", 16)
    for split in ("eval_train", "validation", "test"):
        set_attribute(BibleLmTask, f"num_{split}_examples", 16)
    set_attribute(bible, "NUM_WINDOWS", dict.fromkeys(bible.NUM_WINDOWS, 16))
