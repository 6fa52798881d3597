"""Runs the runner in a process of its own, and reads what it leaves."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workloads.bible_lm.task import BibleLmTask
from workloads.data import bible

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


def run_in(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a command, `python -m`, in a checkout."""
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=checkout,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def metrics(trial: Path) -> list[dict[str, str]]:
    """The rows of eval_measurements.csv without what depends on the clock or on interruptions."""
    rows = table(trial / "eval_measurements.csv")
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def shrink(set_attribute: Callable[[Any, str, Any], None]) -> None:
    """Makes bible_lm cheap to train and evaluate, and evaluates it every two steps."""
    set_attribute(BibleLmTask, "batch_size", 8)
    set_attribute(BibleLmTask, "eval_period_steps", 2)
    set_attribute(BibleLmTask, "eval_batch_size", 16)
    for split in ("eval_train", "validation", "test"):
        set_attribute(BibleLmTask, f"num_{split}_examples", 16)
    set_attribute(bible, "NUM_WINDOWS", dict.fromkeys(bible.NUM_WINDOWS, 16))
