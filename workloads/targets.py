"""Sets the targets of workloads as AlgoPerf sets its own, and records how.

    python -m workloads.targets --workloads=mnist_vit,bible_lm --experiment_dir=runs/targets

Each of NadamW, AdamW, Nesterov and heavy ball is tuned over one whole horizon: the first points of its search
space, with the horizon fixed, on the seed for tuning. Its best point is trained again on seeds used for nothing
else. The horizon is 75 % of the step hint, as in AlgoPerf's target-setting NadamW, so that a race, which has all of
the hint, leaves the reference some room: a median is out of reach for half of the seeds. AlgoPerf (its
documentation, "Defining target performance") takes the median over seeds of the best validation metric achieved,
and, of the runs that achieve it, the worst of their best test metrics. Here all four are repeated, and the best
median counts; there the best alone is repeated, 20 times after 200 points. A held-out variant gets its target from
the points that were best on its base workload.

Run again, it goes on where it was interrupted. Writes `workloads/<base>/targets.json`.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from absl import flags

from algoperf_kfac.config import as_mapping
from commands import atomic, errors
from commands.errors import UserError, tell
from commands.flags import new, parse
from submissions import registry as submissions
from workloads import registry, target_file
from workloads.runner import experiment, jobs, tuning
from workloads.runner.flags import define_clock
from workloads.studies import choice, facts, suite
from workloads.studies.target_values import REFERENCE, repeat_in, settle, verdict

FRAMEWORK = "pytorch"
SUBMISSIONS = ("nadamw", "adamw", "nesterov", "heavy_ball")
POINTS = 8
HORIZON = 0.75  # of the step hint; training ends with it
SEEDS = (7001, 7002, 7003)  # used for nothing but targets


@dataclass(frozen=True)
class Plan:
    """Where the runs of one call lie, and whose they are."""

    directory: Path
    submissions: tuple[str, ...]
    max_steps: int | None = None
    clock: str = "wall"

    def settings(self, workload: str) -> dict[str, object]:
        """Of a workload's trials, as `workloads.runner.loop.SETTINGS` names them."""
        steps = self.max_steps or round(HORIZON * facts.task(workload).step_hint)
        return {"max_global_steps": steps, "stop_at_target": False, "clock": self.clock}

    @property
    def runs(self) -> Path:
        """The folder of all trials."""
        return self.directory / "targets"

    def folder(self, submission: str, seed: int, workload: str) -> Path:
        """The folder of a submission's trials on a workload."""
        return self.runs / submission / f"seed_{seed}" / f"{workload}_{FRAMEWORK}"

    def space(self, submission: str) -> Path:
        """Its search space with a fixed horizon."""
        return self.directory / "spaces" / f"{submission}.json"

    def point_file(self, submission: str, workload: str) -> Path:
        """Its best point on a base workload, as a list of one."""
        return self.directory / "best" / workload / f"{submission}.json"


def write_spaces(plan: Plan) -> None:
    """Writes each submission's search space with the horizon fixed.

    Raises:
        UserError: there is no space, or it does not tune the horizon.
    """
    for submission in plan.submissions:
        path = suite.space_of(submission)
        space = tuning.read_space(str(path))
        if not isinstance(space, dict) or "horizon_factor" not in space:
            raise UserError(f"The search space {path} has no range of horizon_factor to be fixed.")
        plan.space(submission).parent.mkdir(parents=True, exist_ok=True)
        atomic.write_json(plan.space(submission), {**space, "horizon_factor": {"feasible_points": [HORIZON]}})


def jobs_of(plan: Plan, workloads: Sequence[str]) -> list[jobs.Job]:
    """All jobs, workload by workload: the tuning of each submission on the base, then its best point's seeds."""
    found: dict[str, jobs.Job] = {}
    for workload in facts.in_order(workloads):
        for submission in plan.submissions:
            tuned = _tuning_jobs(plan, facts.base_of(workload), submission)
            repeats = _repeat_jobs(plan, workload, submission, tuple(job.name for job in tuned))
            found |= {job.name: job for job in [*tuned, *repeats]}
    return list(found.values())


def _tuning_jobs(plan: Plan, workload: str, submission: str) -> list[jobs.Job]:
    folder = plan.folder(submission, suite.TUNING_SEED, workload)
    points = tuning.read_points(str(plan.space(submission)), POINTS)
    for index, point in enumerate(points):
        suite.check_point(folder / f"trial_{index + 1}", as_mapping(point))
    return [
        _job(
            plan,
            f"{workload}: {submission}, points {part.start + 1} to {part.stop}",
            workload,
            submission,
            suite.TUNING_SEED,
            space=plan.space(submission),
            points=part,
            of=len(points),
        )
        for part in suite.parts(len(points), suite.TOGETHER[FRAMEWORK])
    ]


def _repeat_jobs(plan: Plan, workload: str, submission: str, needs: tuple[str, ...]) -> list[jobs.Job]:
    base = facts.base_of(workload)
    return [
        _job(
            plan,
            f"{workload}: best point of {submission}, seed {seed}",
            workload,
            submission,
            seed,
            space=plan.point_file(submission, base),
            points=range(1),
            of=1,
            needs=needs,
        )
        for seed in SEEDS
    ]


def _job(
    plan: Plan,
    name: str,
    workload: str,
    submission: str,
    seed: int,
    *,
    space: Path,
    points: range,
    of: int,
    needs: tuple[str, ...] = (),
) -> jobs.Job:
    folder = plan.folder(submission, seed, workload)
    train = jobs.command(
        workload,
        FRAMEWORK,
        submission,
        plan.runs,
        f"seed_{seed}",
        seed,
        plan.settings(workload),
        space=space,
        points=points,
        of=of,
        save_checkpoints=False,
    )
    return jobs.Job(
        name,
        tuple(folder / f"trial_{index + 1}" for index in points),
        train,
        jobs.log_of(plan.directory, name),
        plan.settings(workload),
        float(facts.record(workload).get("seconds", suite.UNKNOWN_SECONDS)),
        needs,
        functools.partial(_prepare_repeat, plan, submission, workload, folder) if needs else None,
    )


def _prepare_repeat(plan: Plan, submission: str, workload: str, folder: Path) -> None:
    """Writes the best point to where the repeats read it."""
    base = facts.base_of(workload)
    point = _best_point(plan, submission, base).point
    suite.check_point(folder / "trial_1", point)
    path = plan.point_file(submission, base)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, json.dumps([point], indent=2))


def _best_point(plan: Plan, submission: str, base: str) -> choice.Tuned:
    folder = plan.folder(submission, suite.TUNING_SEED, base)
    points = tuning.read_points(str(plan.space(submission)), POINTS)
    trials = suite.tuned_trials(folder, [as_mapping(point) for point in points])
    return choice.ranking(trials, lower_is_better=facts.task(base).lower_is_better, by_steps=False)[0]


# The record.


def record(plan: Plan, workload: str, command: str) -> dict[str, object]:
    """The entry of `targets.json` of a workload, from its finished runs.

    Raises:
        UserError: a run is missing, or all diverged.
    """
    task, base = facts.task(workload), facts.base_of(workload)
    lower, metric = task.lower_is_better, task.target_metric_name
    repeats = {
        name: [repeat_in(plan.folder(name, seed, workload) / "trial_1", metric) for seed in SEEDS]
        for name in plan.submissions
    }
    found = settle(repeats, lower_is_better=lower)
    best = {name: _best_point(plan, name, base) for name in plan.submissions}
    runs = {
        name: {
            "trial": best[name].trial,
            "point": best[name].point,
            "at_an_edge": choice.edges(best[name].point, _space(plan, name)),
            "validation": [_or_none(one.best(1, lower_is_better=lower), 6) for one in ours],
            "test": [_or_none(one.best(2, lower_is_better=lower), 6) for one in ours],
            "median": _or_none(found.medians[name], 6),
            "steps_to_target": [_or_none(one.steps_to(found.validation, lower_is_better=lower)) for one in ours],
        }
        for name, ours in repeats.items()
    }
    reference = repeats.get(REFERENCE, repeats[found.submission])
    steps = [one.steps_to(found.validation, lower_is_better=lower) for one in reference]
    meta = experiment.read_json(plan.folder(found.submission, SEEDS[0], workload) / "trial_1" / "meta_data_0.json")
    middle = statistics.median(steps)
    return {
        "validation": found.validation,
        "test": found.test,
        "provisional": False,
        "metric": metric,
        "set_by": found.submission,
        "step_hint": task.step_hint,
        "share_of_horizon": _or_none(middle / task.step_hint),
        "spread_of_steps": _or_none((max(steps) - min(steps)) / middle) if math.isfinite(middle) else None,
        "seconds_to_target": _or_none(
            statistics.median(step * one.ms_per_step / 1e3 for step, one in zip(steps, reference, strict=True))
        ),
        "seconds": round(statistics.median(one.seconds for one in reference), 2),
        "ms_per_step": round(statistics.median(one.ms_per_step for one in reference), 2),
        "horizon": HORIZON,
        "points_from": base,
        "points": POINTS,
        "tuning_seed": suite.TUNING_SEED,
        "seeds": list(SEEDS),
        "framework": FRAMEWORK,
        "clock": plan.clock,
        "submissions": runs,
        "versions": {name: value for name, value in (meta or {}).items() if name.endswith("_version")},
        "command": command,
    }


def _space(plan: Plan, submission: str) -> Mapping[str, tuning.Entry]:
    space = tuning.read_space(str(plan.space(submission)))
    return space if isinstance(space, dict) else {}


def _or_none(value: float, digits: int = 4) -> float | None:
    """A number JSON knows."""
    return round(value, digits) if math.isfinite(value) else None


def ensure_entry(workload: str) -> None:
    """Gives a workload without targets some that no run reaches: without any it cannot run."""
    if not facts.record(workload):
        unreachable = 0.0 if facts.task(workload).lower_is_better else 1.0
        entry = {"validation": unreachable, "test": unreachable, "provisional": True, "how": "not set yet"}
        target_file.write(facts.base_of(workload), workload, entry)


# The command.


def main(argv: Sequence[str] | None = None) -> int:
    """Runs with the given arguments (default: the command line's); returns the exit code."""
    values = new()
    flags.DEFINE_list("workloads", list(registry.WORKLOADS), "Workloads and variants.", flag_values=values)
    flags.DEFINE_list("submissions", list(SUBMISSIONS), "Whose best counts.", flag_values=values)
    flags.DEFINE_integer("jobs", 2, "Processes at a time, a core each.", lower_bound=1, flag_values=values)
    flags.DEFINE_string("experiment_dir", None, "Where to. Required.", flag_values=values)
    flags.DEFINE_integer(
        "max_global_steps",
        None,
        "Shorter runs, to try the command; with --nowrite.",
        lower_bound=1,
        flag_values=values,
    )
    define_clock(values)
    flags.DEFINE_bool("write", default=True, help="Write targets.json, not only print.", flag_values=values)

    def command() -> int:
        parse(sys.argv[1:] if argv is None else argv, values, "python -m workloads.targets", ("experiment_dir",))
        return _run(values)

    return errors.run(command, interrupted="interrupted; the same command goes on")


def _run(values: flags.FlagValues) -> int:
    if values.max_global_steps is not None and values.write:
        raise UserError("Targets of shortened runs must not be written: give --nowrite with --max_global_steps.")
    for workload in values.workloads:
        registry.check(workload)
    for submission in values.submissions:
        submissions.check(submission, FRAMEWORK)
    directory = Path(values.experiment_dir).expanduser().resolve()
    experiment.check_writable(directory)
    plan = Plan(directory, tuple(dict.fromkeys(values.submissions)), values.max_global_steps, values.clock)
    write_spaces(plan)
    for workload in {name for one in values.workloads for name in (facts.base_of(one), one)}:
        ensure_entry(workload)
    todo = jobs_of(plan, values.workloads)
    trials = sum(len(job.folders) - len(job.outcomes()) for job in todo)
    seconds = sum(job.seconds * (len(job.folders) - len(job.outcomes())) for job in todo)
    tell(f"==> {trials} trials to run, {values.jobs} at a time: about {jobs.duration(seconds / values.jobs)}")
    failed = jobs.run(todo, values.jobs, say_kept=False, patient=True)
    command = f"python -m workloads.targets --workloads=WORKLOAD --submissions={','.join(plan.submissions)}"
    incomplete = []
    for workload in facts.in_order(list(dict.fromkeys(values.workloads))):
        try:
            entry = record(plan, workload, command.replace("WORKLOAD", workload))
        except UserError as error:
            incomplete.append(workload)
            tell(f"error: no target of {workload}: {errors.one_line(error)}", sys.stderr)
            continue
        base = facts.base_of(workload)
        written = (
            f"; written to {target_file.write(base, workload, entry).parent.name}/targets.json"
            if values.write
            else ""
        )
        tell(_line(workload, entry) + written)
    return 1 if failed or incomplete else 0


def _line(workload: str, entry: Mapping[str, object]) -> str:
    share, spread, seconds = entry["share_of_horizon"], entry["spread_of_steps"], entry["seconds_to_target"]
    parts = [
        f"validation {entry['metric']} {entry['validation']}, test {entry['test']}, set by {entry['set_by']}",
        f"{REFERENCE} reaches it after {100 * share:.0f} % of the horizon" if isinstance(share, float) else "",
        f"spread over seeds {100 * spread:.0f} %" if isinstance(spread, float) else "",
        f"{seconds:.1f} s to target" if isinstance(seconds, float) else "",
        f"{entry['seconds']} s a whole run",
        verdict(entry),
    ]
    return f"{workload}: " + "; ".join(filter(None, parts))


if __name__ == "__main__":
    sys.exit(main())
