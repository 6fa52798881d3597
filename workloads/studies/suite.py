"""A suite: every submission tuned on every workload with the same means, then raced over studies.

For each workload and submission: the first points of the submission's search space, each trained up to its target
on a seed of its own; the best of them are the trials of every study of the race, by AlgoPerf's external ruleset. A
held-out variant is raced at the best point found on its base workload, and JAX at those found in PyTorch.

    <experiment_dir>/tuning/<submission>/seed_901/<workload>_<framework>/trial_<i>/
    <experiment_dir>/chosen/<workload>/<submission>.json        the ranking, and what lies at an edge of the space
    <experiment_dir>/race/<submission>/study_<j>/<workload>_<framework>/trial_<i>/
    <experiment_dir>/pace/<submission>/study_<j>/<workload>_<framework>/trial_1/    one at a time, for times
"""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from commands import atomic
from commands.errors import UserError
from submissions import registry as submissions
from workloads import registry
from workloads.runner import experiment
from workloads.runner.jobs import CHECKOUT, Job, command, log_of
from workloads.runner.logs import read_hyperparameters
from workloads.studies import choice, facts
from workloads.studies import points as points_of
from workloads.studies.points import Further

SPACES = CHECKOUT / "tuning_search_spaces" / "suite"
TUNING_SEED = 901  # used for nothing but tuning
TUNED_IN = "pytorch"
STAGES = ("tuning", "race", "pace", "report")
# How many trials share a process in PyTorch, which takes seconds to start. In JAX they would share compiled
# programs as well, and the times of all but the first would lack compilation.
TOGETHER = {"pytorch": 4, "jax": 1}
UNKNOWN_SECONDS = 20.0  # what a trial is expected to take where nothing was measured


@dataclass(frozen=True)
class Suite:
    """What is compared, and what each side is given.

    Attributes:
        submissions: names of folders in submissions/.
        points: how many points of its space each is tuned over, with horizons as the space has them.
        further: points behind these, at horizons shorter than all of the space's.
        raced: how many of them are the trials of a study.
        raced_on_variants: the same on a held-out variant.
        studies: how many studies, unless told otherwise.
    """

    submissions: tuple[str, ...]
    points: int
    raced: int
    raced_on_variants: int
    studies: int
    further: Further | None = None

    @property
    def tuned(self) -> int:
        """How many points there are in all."""
        return self.points + (self.further.count if self.further else 0)


EMBEDDED = Suite(
    submissions=(
        "nadamw",
        "kfac_expand",
        "kfac_reduce",
        "soap",
        "muon",
        "shampoo",
        "schedule_free_adamw",
        "adamw",
        "nesterov",
        "heavy_ball",
    ),
    points=8,
    raced=3,
    raced_on_variants=1,
    studies=3,
)
SUITES = {
    "embedded": EMBEDDED,
    # The same with points beyond the edge at which K-FAC and Muon were best on some workloads.
    "shorter_horizons": replace(EMBEDDED, further=Further(4, (0.25, 0.17))),
}


@dataclass(frozen=True)
class Plan:
    """One run of a suite.

    Attributes:
        directory: where to, absolute.
        spaces: submission -> JSON file, one for all workloads.
        seeds: of the studies, by their numbers.
        max_steps: of every trial; None for each workload's step hint.
        clock: of every trial, as the runner's flag.
    """

    suite: Suite
    directory: Path
    workloads: tuple[str, ...]
    submissions: tuple[str, ...]
    frameworks: tuple[str, ...]
    spaces: Mapping[str, Path]
    seeds: Mapping[int, int]
    max_steps: int | None = None
    clock: str = "wall"
    stages: tuple[str, ...] = STAGES

    @property
    def race(self) -> Path:
        """The folder `scoring` reads."""
        return self.directory / "race"

    @property
    def settings(self) -> dict[str, object]:
        """Of every trial, as `workloads.runner.loop.SETTINGS` names them."""
        return {"max_global_steps": self.max_steps, "stop_at_target": True, "clock": self.clock}

    def tuned_in(self, workload: str, submission: str) -> str:
        """The framework a submission is tuned in on a workload: PyTorch, unless one of the two is not there."""
        there = registry.WORKLOADS[workload].frameworks
        order = (TUNED_IN, *self.frameworks)
        return next(name for name in order if name in there and submissions.path_of(submission, name).is_file())

    def tuning_folder(self, workload: str, submission: str) -> Path:
        """The folder of the tuning trials of a base workload."""
        name = f"{workload}_{self.tuned_in(workload, submission)}"
        return self.directory / "tuning" / submission / f"seed_{TUNING_SEED}" / name

    def chosen_file(self, workload: str, submission: str) -> Path:
        """The record of what was chosen on a base workload; the points lie beside it."""
        return self.directory / "chosen" / workload / f"{submission}.json"

    def points_file(self, submission: str) -> Path:
        """The file whose first points it is tuned over: its search space, or these points as a list."""
        if self.suite.further is None:
            return self.spaces[submission]
        return self.directory / "spaces" / f"{submission}.json"

    def runs(self) -> Iterator[tuple[str, str, str]]:
        """Framework, workload and submission, workload by workload, so that an interruption leaves whole ones."""
        for framework in self.frameworks:
            for workload in facts.in_order(self.workloads):
                if framework in registry.WORKLOADS[workload].frameworks:
                    for submission in self.submissions:
                        if submissions.path_of(submission, framework).is_file():
                            yield framework, workload, submission


def get(name: str) -> Suite:
    """The suite of a name.

    Raises:
        UserError: there is none, with those that are.
    """
    if name not in SUITES:
        raise UserError(f"Unknown suite '{name}'. Known: {', '.join(SUITES)}.")
    return SUITES[name]


def space_of(submission: str) -> Path:
    """A submission's search space in a suite, the same for all workloads.

    Raises:
        UserError: it has none.
    """
    path = SPACES / f"{submission}.json"
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in SPACES.glob("*.json"))) or "none"
        raise UserError(
            f"There is no search space of '{submission}' for the suite; write {path.relative_to(CHECKOUT)}, or "
            f"give a file as --tuning_search_space={submission}=FILE. Known: {known}."
        )
    return path


def jobs(plan: Plan) -> list[Job]:
    """All jobs of the stages tuning and race, each behind those it needs.

    Raises:
        UserError: finished trials belong to another target or other points.
    """
    found: dict[str, Job] = {}
    seconds = Seconds(plan.directory)
    for framework, workload, submission in plan.runs():
        base = facts.base_of(workload)
        tuned = _tuning_jobs(plan, base, submission, seconds)
        if "tuning" in plan.stages:
            found |= {job.name: job for job in tuned}
        needs = tuple(job.name for job in tuned) if "tuning" in plan.stages else ()
        if "race" in plan.stages:
            raced = _race_jobs(plan, framework, workload, submission, needs, seconds)
            if all(job.is_finished() for job in tuned):  # what does not fit shows before any work
                for job in raced:
                    if job.prepare is not None:
                        job.prepare()
            found |= {job.name: job for job in raced}
    return list(found.values())


def _tuning_jobs(plan: Plan, workload: str, submission: str, seconds: Seconds) -> list[Job]:
    framework, space = plan.tuned_in(workload, submission), plan.points_file(submission)
    points = tuned_points(plan, submission)
    folder = plan.tuning_folder(workload, submission)
    for index, point in enumerate(points):
        check_point(folder / f"trial_{index + 1}", point)
    if plan.suite.further is not None:
        space.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(space, json.dumps(points, indent=2))
    found = []
    for part in parts(len(points), TOGETHER[framework]):
        name = f"{workload} {framework}: tuning of {submission}, points {part.start + 1} to {part.stop}"
        train = command(
            workload,
            framework,
            submission,
            plan.directory / "tuning",
            folder.parent.name,
            TUNING_SEED,
            plan.settings,
            space=space,
            points=part,
            of=len(points),
            save_checkpoints=False,
        )
        folders = tuple(folder / f"trial_{index + 1}" for index in part)
        expected = seconds.of(workload, framework, submission)
        job = Job(name, folders, train, log_of(plan.directory, name), plan.settings, expected)
        found.append(_checked(job, workload))
    return found


def _race_jobs(
    plan: Plan, framework: str, workload: str, submission: str, needs: tuple[str, ...], seconds: Seconds
) -> list[Job]:
    raced = plan.suite.raced if workload == facts.base_of(workload) else plan.suite.raced_on_variants
    points = min(raced, len(tuned_points(plan, submission)))
    found = []
    for study in plan.seeds:
        for part in parts(points, TOGETHER[framework]):
            last = f" to {part.stop}" if len(part) > 1 else ""
            name = f"{workload} {framework}: {submission} in study {study}, trial {part.start + 1}{last}"
            where = (plan.race, framework, workload, submission)
            found.append(_chosen_job(plan, name, where, study, part, points, needs, seconds))
    return found


def pace_jobs(plan: Plan) -> list[Job]:
    """A trial of each submission's best point on the seed of the first study, to be run one at a time."""
    seconds, study = Seconds(plan.directory), next(iter(plan.seeds))
    return [
        _chosen_job(
            plan,
            f"{workload} {framework}: pace of {submission}",
            (plan.directory / "pace", framework, workload, submission),
            study,
            range(1),
            1,
            (),
            seconds,
        )
        for framework, workload, submission in plan.runs()
    ]


def _chosen_job(
    plan: Plan,
    name: str,
    where: tuple[Path, str, str, str],
    study: int,
    part: range,
    of: int,
    needs: tuple[str, ...],
    seconds: Seconds,
) -> Job:
    """Trains chosen points on the seed of a study.

    Args:
        where: folder of the stage, framework, workload and submission.
        part: indices of the points, counted from the best.
        of: how many points there are.
    """
    stage, framework, workload, submission = where
    base = facts.base_of(workload)
    folder = stage / submission / f"study_{study}" / f"{workload}_{framework}"
    folders = tuple(folder / f"trial_{index + 1}" for index in part)
    train = command(
        workload,
        framework,
        submission,
        stage,
        folder.parent.name,
        plan.seeds[study],
        plan.settings,
        space=_points_file(plan, base, submission),
        points=part,
        of=of,
        save_checkpoints=False,
    )
    job = Job(
        name,
        folders,
        train,
        log_of(plan.directory, name),
        plan.settings,
        seconds.of(workload, framework, submission),
        needs,
        functools.partial(_prepare_race, plan, base, submission, folders, part),
    )
    return _checked(job, workload)


def parts(count: int, size: int) -> list[range]:
    """The indices up to `count`, in pieces of at most `size`."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _prepare_race(plan: Plan, workload: str, submission: str, folders: Sequence[Path], part: range) -> None:
    """Makes sure that the points are chosen, and that earlier trials ran them."""
    points = choose(plan, workload, submission)
    for folder, index in zip(folders, part, strict=True):
        check_point(folder, points[index])


def choose(plan: Plan, workload: str, submission: str) -> list[dict[str, object]]:
    """Ranks a submission's tuning trials on a base workload and records the best; returns their points.

    Raises:
        UserError: trials are missing.
    """
    folder = plan.tuning_folder(workload, submission)
    space = points_of.space_of(plan.spaces[submission], plan.suite.further)
    trials = tuned_trials(folder, tuned_points(plan, submission))
    ranked = choice.ranking(trials, lower_is_better=facts.task(workload).lower_is_better)
    best = ranked[: plan.suite.raced]
    record = {
        "workload": workload,
        "submission": submission,
        "tuned_in": plan.tuned_in(workload, submission),
        "seed": TUNING_SEED,
        "step_hint": facts.task(workload).step_hint,
        "target": ranked[0].outcome["target"],
        "metric": ranked[0].outcome["metric"],
        "rule": "the fewest steps to the target, then the best validation metric",
        "space": space,
        "chosen": [tuned.trial for tuned in best],
        "at_an_edge": {f"trial_{tuned.trial}": choice.edges(tuned.point, space) for tuned in best},
        "ranking": [
            {
                "trial": tuned.trial,
                "steps_to_target": tuned.outcome["steps_to_target"],
                "best_metric": tuned.outcome["best_metric"],
                "point": tuned.point,
            }
            for tuned in ranked
        ],
    }
    path = plan.chosen_file(workload, submission)
    points = [dict(tuned.point) for tuned in best]
    path.parent.mkdir(parents=True, exist_ok=True)
    if experiment.read_json(path) != record:
        atomic.write_json(path, record)
        atomic.write_text(_points_file(plan, workload, submission), json.dumps(points, indent=2))
    return points


def tuned_points(plan: Plan, submission: str) -> list[dict[str, object]]:
    """The points a submission is tuned over, in the order of their trials."""
    return points_of.of(plan.spaces[submission], plan.suite.points, plan.suite.further)


def tuned_trials(folder: Path, points: Sequence[Mapping[str, object]]) -> list[choice.Tuned]:
    """The finished trials of these points.

    Raises:
        UserError: one is missing.
    """
    found = []
    for index, point in enumerate(points):
        outcome = experiment.outcome(folder / f"trial_{index + 1}")
        if outcome is None:
            raise UserError(f"{folder} lacks a finished trial_{index + 1}; run the tuning first.")
        found.append(choice.Tuned(index + 1, dict(point), outcome))
    return found


def _points_file(plan: Plan, workload: str, submission: str) -> Path:
    path = plan.chosen_file(workload, submission)
    return path.with_name(f"{path.stem}.points.json")


def check_point(trial: Path, point: Mapping[str, object]) -> None:
    """Raises UserError if a trial was begun at another point."""
    saved = read_hyperparameters(trial)
    if saved is not None and saved != point:
        raise UserError(
            f"The trial {trial} has other hyperparameters than its search space or its tuning give now; choose "
            "another --experiment_dir, or remove that of the submission there."
        )


def _checked(job: Job, workload: str) -> Job:
    """The job, unless trials that ran up to another target would be mixed with those that are to come."""
    target = facts.validation_target(workload)
    for outcome in job.outcomes():
        if outcome["target"] != target:
            raise UserError(
                f"Trials in {job.folders[0].parent} ran up to the target {outcome['target']}, but that of "
                f"{workload} is {target} now; choose another --experiment_dir, or remove those trials."
            )
    return job


class Seconds:
    """What a trial is expected to take: from finished trials, else from the record of how the targets were set."""

    def __init__(self, directory: Path) -> None:
        self._measured: dict[tuple[str, str], float] = {}
        self._paces: dict[tuple[str, str, str], list[float]] = {}
        for path in directory.glob("*/*/*/*/*/outcome.json"):
            outcome = experiment.outcome(path.parent)
            if outcome is not None and outcome["global_step"]:
                workload, _, framework = path.parts[-3].rpartition("_")
                spent = outcome["accumulated_submission_time"] + outcome["accumulated_eval_time"]
                key = (workload, framework, path.parts[-5])
                self._paces.setdefault(key, []).append(spent / outcome["global_step"])

    def of(self, workload: str, framework: str, submission: str) -> float:
        """Seconds of a trial over the whole step hint, evaluations included."""
        paces = self._paces.get((workload, framework, submission))
        if paces:
            return statistics.median(paces) * facts.task(workload).step_hint
        return float(facts.record(workload).get("seconds", UNKNOWN_SECONDS))
