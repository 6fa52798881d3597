"""The runs of experiments, as trials of the runner; what several experiments share is run once."""

from __future__ import annotations

import csv
import functools
import hashlib
import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.experiments.experiment import Experiment, Variant
from commands import atomic
from commands.errors import UserError
from submissions import registry as submissions
from workloads import registry
from workloads.runner import experiment as folders
from workloads.runner import jobs
from workloads.studies import facts

OBJECTS = Path(__file__).parent / "objects"
# Hyperparameters that are younger than kept results, with what a point without them means.
YOUNGER: Mapping[str, object] = {"statistics_rows_by_side": False}
# Step hints that have changed since results were kept: experiments go on at the horizons they were planned with.
HINTS: Mapping[str, int] = {"flights_dlrm": 400}
CURVE_FROM = 0.6  # share of the horizon from which on evaluations are kept


@dataclass(frozen=True)
class Run:
    """One training run, up to the end of its schedule.

    Attributes:
        submission: a name, or that of a file in `objects/`.
        point: all its hyperparameters, so that a result is not taken for one of later defaults.
        steps: how many.
    """

    submission: str
    point: tuple[tuple[str, str], ...]  # values as JSON, so that equal points are equal
    workload: str
    framework: str
    steps: int
    seed: int

    @property
    def hyperparameters(self) -> dict[str, object]:
        """The point by name."""
        return {name: json.loads(value) for name, value in self.point}

    def folder(self, directory: Path) -> Path:
        """Of its trial."""
        digest = hashlib.sha256(repr(self.point).encode()).hexdigest()[:10]
        study = f"{digest}_{self.steps}_{self.seed}"
        return directory / "runs" / self.submission / study / f"{self.workload}_{self.framework}" / "trial_1"


def run_of(one: Experiment, variant: Variant, workload: str, seed: int) -> Run:
    """The run of a variant on a workload and a seed."""
    hint = facts.task(workload).step_hint
    steps = max(2, round(variant.share * one.horizon * HINTS.get(workload, hint)))
    point = {**_defaults(variant.submission, one.framework), **variant.point, "horizon_factor": steps / hint}
    texts = tuple(sorted((name, json.dumps(value)) for name, value in point.items()))
    return Run(variant.submission, texts, workload, one.framework, steps, seed)


@functools.cache
def _defaults(submission: str, framework: str) -> dict[str, object]:
    """What the submission's description says, but for the classes that objects hand in."""
    if _object_file(submission).is_file():
        description = importlib.import_module(f"benchmarks.experiments.objects.{submission}").DESCRIPTION
    else:
        description = submissions.describe(submission, framework)
    return {name: value for name, value in description.defaults.items() if not isinstance(value, type)}


def runs_of(one: Experiment) -> dict[tuple[str, str, int], Run]:
    """All runs of an experiment by variant, workload and seed; workload by workload, seed by seed.

    Raises:
        UserError: a workload or a submission is unknown.
    """
    for workload in one.workloads:
        registry.check(workload)
    variants = one.all_variants()
    for variant in variants.values():
        if not _object_file(variant.submission).is_file():
            submissions.check(variant.submission, one.framework)
    return {
        (name, workload, seed): run_of(one, variant, workload, seed)
        for workload in one.workloads
        for seed in one.seeds
        for name, variant in variants.items()
    }


def job_of(run: Run, directory: Path) -> jobs.Job:
    """A process that trains a run."""
    settings: dict[str, object] = {"max_global_steps": run.steps, "stop_at_target": False, "clock": "cpu"}
    folder = run.folder(directory)
    space = folder.parents[1] / "point.json"
    space.parent.mkdir(parents=True, exist_ok=True)
    if not space.is_file():
        atomic.write_text(space, json.dumps([run.hyperparameters]))
    file = _object_file(run.submission)
    train = jobs.command(
        run.workload,
        run.framework,
        run.submission,
        directory / "runs",
        folder.parents[1].name,
        run.seed,
        settings,
        space=space,
        save_checkpoints=False,
        path=file if file.is_file() else None,
    )
    name = f"{run.workload}: {run.submission}, {folder.parents[1].name}"
    return jobs.Job(name, (folder,), train, jobs.log_of(directory, name), settings, float(run.steps))


def result(run: Run, directory: Path) -> dict[str, Any] | None:
    """What is kept of a finished run; None where it is not finished."""
    folder = run.folder(directory)
    outcome = folders.outcome(folder)
    if outcome is None:
        return None
    with open(folder / "eval_measurements.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    late = [row for row in rows if int(row["global_step"]) >= CURVE_FROM * run.steps] or rows[-1:]
    return {
        **identity(run),
        "loss": _digits(late[-1]["validation/loss"]),
        "metric": _digits(outcome["final_metric"]),
        "target": outcome["target"],
        "steps_to_target": outcome["steps_to_target"],
        "ms_per_step": _digits(outcome["ms_per_step"], 4),
        "curve": [[int(row["global_step"]), _digits(row["validation/loss"])] for row in late],
    }


def identity(run: Run) -> dict[str, Any]:
    """What tells runs apart."""
    return {
        "submission": run.submission,
        "point": run.hyperparameters,
        "workload": run.workload,
        "framework": run.framework,
        "steps": run.steps,
        "seed": run.seed,
    }


def key(found: Mapping[str, Any]) -> str:
    """The identity in a kept result, as text; a horizon is its steps, whatever the step hint was."""
    point = {name: value for name, value in (YOUNGER | found["point"]).items() if name != "horizon_factor"}
    return json.dumps({"point": point, **{name: found[name] for name in _PLAIN}}, sort_keys=True)


_PLAIN = ("submission", "workload", "framework", "steps", "seed")


def missing(wanted: Sequence[Run], kept: Mapping[str, Any]) -> list[Run]:
    """Those of which no result is kept, each once."""
    return [run for run in dict.fromkeys(wanted) if key(identity(run)) not in kept]


def _object_file(submission: str) -> Path:
    return OBJECTS / f"{submission}.py"


def _digits(value: object, digits: int = 5) -> float | None:
    """A number of a table, None where it is not finite."""
    try:
        number = float(str(value))
    except ValueError as error:
        raise UserError(f"a run has no validation loss: {error}") from None
    return float(f"{number:.{digits}g}") if abs(number) < float("inf") else None
