"""What the figure shows: read from the kept results, but for the exactness cases, which take seconds to run."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks.experiments import records as experiment_records
from benchmarks.experiments import runs
from benchmarks.experiments.notebook import EXPERIMENTS
from benchmarks.paper.complexity import records, slopes
from benchmarks.paper.complexity.layers import GRID, Sweep
from benchmarks.paper.damping import command as damping
from benchmarks.paper.damping import grid, page, reading
from benchmarks.paper.damping.reading import Width
from benchmarks.paper.exactness_cases import TABLE, errors
from benchmarks.paper.update import cases as update
from benchmarks.paper.worth import figure as worth
from commands.errors import UserError

REFERENCE = "nadamw"
SUBMISSIONS = {"expand": "kfac_expand", "reduce": "kfac_reduce"}
# Of the truth table, in the words of the figure.
EXACT = {
    "expand-setting-gaussian": "loss per position,\nsquared error",
    "mean-over-positions": "mean of positions,\nsquared error",
    "graph-mean-readout": "mean of a graph's nodes,\nsquared error",
    "weighted-sum": "weighted sum,\nsquared error",
    "cross-entropy-expand-setting": "loss per position,\nsoftmax",
    "cross-entropy-reduce-setting": "mean of positions,\nsoftmax",
}
# What brings a file back.
MADE_BY = {
    "suite/table.csv": "make suite results",
    "complexity.jsonl": "python -m benchmarks.paper complexity",
    "update.jsonl": "python -m benchmarks.paper update",
    "experiments.jsonl": "python -m benchmarks.experiments run polar mixed",
    "damping.jsonl": "python -m benchmarks.paper damping",
}


@dataclasses.dataclass(frozen=True)
class Share:
    """Steps to the target over NadamW's median.

    Attributes:
        middle: of the median study.
        low: of the fastest.
        high: of the slowest; infinite where a study missed.
        reached: studies that reached the target.
        studies: how many there were.
    """

    middle: float
    low: float
    high: float
    reached: int
    studies: int


@dataclasses.dataclass(frozen=True)
class Glance:
    """All panels.

    Attributes:
        steps: approximation -> workload -> share; None where NadamW's median study missed the target.
        exact: case in words -> layer's errors, the largest: expand, reduce.
        cost: approximation -> positions -> CPU seconds of A.
        slopes: approximation -> slope over the largest sizes: measured, by the paper.
        update: curve -> batch -> CPU time of an update over NadamW's.
        ends: approximation -> final losses of a residual network by seed.
        damping: workload, form, approximation -> the best damping and the range around it.
        seeds: of damping, the fewest on a workload.
    """

    steps: dict[str, dict[str, Share | None]]
    exact: dict[str, tuple[float, float]]
    cost: dict[str, dict[float, float]]
    slopes: dict[str, tuple[float, float]]
    update: dict[str, dict[int, float]]
    ends: dict[str, list[float]]
    damping: dict[tuple[str, str, str], Width]
    seeds: int


def read(folder: Path) -> Glance:
    """Everything.

    Args:
        folder: docs/results, or one like it.

    Raises:
        UserError: a file is missing, or lacks what a panel shows; the message has the command that makes it.
    """
    for name in MADE_BY:
        if not (folder / name).is_file():
            raise _lacking(folder, name, "is missing")
    costs, fits = _cost(folder)
    damped, seeds = _damping(folder)
    return Glance(_steps(folder), exactness(), costs, fits, _update(folder), _ends(folder), damped, seeds)


def exactness() -> dict[str, tuple[float, float]]:
    """The largest error over a case's layers, of expand and of reduce."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        found = {}
        for name, words in EXACT.items():
            worst = []
            for approximation in ("expand", "reduce"):
                torch.manual_seed(0)
                worst.append(max(errors(TABLE[name].make(), approximation).values()))
            found[words] = (worst[0], worst[1])
        return found
    finally:
        torch.set_default_dtype(dtype)


def _steps(folder: Path) -> dict[str, dict[str, Share | None]]:
    name = "suite/table.csv"
    table = pd.read_csv(folder / name)
    table = table[table["framework"] == "pytorch"].set_index(["workload", "submission"])
    found: dict[str, dict[str, Share | None]] = {}
    for approximation, submission in SUBMISSIONS.items():
        found[approximation] = {}
        for workload in dict.fromkeys(table.index.get_level_values("workload")):
            if not {(workload, submission), (workload, REFERENCE)} <= set(table.index):
                raise _lacking(folder, name, f"has no {submission} and {REFERENCE} on {workload}")
            mine, base = (_row(table, workload, one) for one in (submission, REFERENCE))
            share = None
            if math.isfinite(base["steps"]):
                ratios = [mine[key] / base["steps"] for key in ("steps", "steps_low", "steps_high")]
                share = Share(ratios[0], ratios[1], ratios[2], int(mine["reached"]), int(mine["studies"]))
            found[approximation][workload] = share
    if not any(found["expand"].values()):
        raise _lacking(folder, name, f"has no workload on which {REFERENCE} reaches the target")
    return found


def _row(table: pd.DataFrame, workload: str, submission: str) -> dict[str, float]:
    row = table.loc[[(workload, submission)]].iloc[0]
    return {key: float(row[key]) for key in ("steps", "steps_low", "steps_high", "reached", "studies")}


def _cost(folder: Path) -> tuple[dict[str, dict[float, float]], dict[str, tuple[float, float]]]:
    name = "complexity.jsonl"
    results = records.read(folder / name)
    sweep = shown_sweep()
    found, fits = {}, {}
    for approximation in grid.APPROXIMATIONS:
        seconds = slopes.measured(sweep, "pytorch", results, "seconds", approximation, "A")
        measured = slopes.slope(slopes.tail(seconds))
        said = slopes.slope(slopes.tail(slopes.theory(sweep, approximation, "A", 1)))
        if measured is None or said is None:
            raise _lacking(folder, name, f"has no linear layers over R in PyTorch for {approximation}")
        found[approximation], fits[approximation] = seconds, (measured, said)
    return found, fits


def shown_sweep() -> Sweep:
    """Linear layers over R."""
    return next(sweep for sweep in GRID if sweep.name == "linear" and sweep.axis == "R")


def _update(folder: Path) -> dict[str, dict[int, float]]:
    name = "update.jsonl"
    book = update.book(folder / name)

    def seconds(optimizer: str, batch: int) -> float:
        result = book.of(update.Case(optimizer, batch))
        if result is None:
            raise _lacking(folder, name, f"has no {optimizer} at batch {batch}")
        return float(sum(result["seconds"].values()))

    return {
        curve: {batch: seconds(curve, batch) / seconds(REFERENCE, batch) for batch in update.BATCHES}
        for curve in update.OPTIMIZERS
        if curve != REFERENCE
    }


def _ends(folder: Path) -> dict[str, list[float]]:
    name = "experiments.jsonl"
    kept: Mapping[str, dict[str, Any]] = experiment_records.read(folder / name)
    by_name = {one.name: one for one in EXPERIMENTS}
    found = {}
    for approximation, (experiment, variant) in worth.TRAINED.items():
        wanted = runs.runs_of(by_name[experiment])
        results = [
            kept.get(runs.key(runs.identity(wanted[variant, worth.NETWORK, seed])))
            for seed in by_name[experiment].seeds
        ]
        losses = [one["loss"] for one in results if one is not None and one["loss"] is not None]
        if not losses:
            raise _lacking(folder, name, f"has no run of '{variant}' of the experiment '{experiment}'")
        found[approximation] = losses
    return found


def _damping(folder: Path) -> tuple[dict[tuple[str, str, str], Width], int]:
    book, gains = damping.books(folder)
    found, seeds = {}, []
    for workload, one in page.read(book, gains).items():
        for form, approximation, outcomes in page.shown(one):
            middle = {value: statistics.median(point.steps) for value, point in outcomes.items()}
            width = reading.width(middle)
            if width is not None and len(outcomes) > 1:
                found[workload, form.title, approximation] = width
                seeds.append(len(one.seeds))
    if not found:
        raise _lacking(folder, "damping.jsonl", "has no whole curve")
    return found, min(seeds)


def _lacking(folder: Path, name: str, what: str) -> UserError:
    return UserError(f"{folder / name} {what}: {MADE_BY[name]}")
