"""What `python -m workloads.study --suite=...` does: plan, say how long it takes, run what is missing, report."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags

from commands import atomic, frameworks
from commands.errors import UserError, tell
from submissions import registry as submissions
from workloads import registry
from workloads.runner import experiment, jobs
from workloads.studies import facts, suite
from workloads.studies.suite import Plan

# Flags that a suite decides itself.
NOT_OURS = ("num_studies", "hparam_start_index", "hparam_end_index", "stop_at_target", "save_checkpoints")
REFERENCE = "nadamw"


def run(values: flags.FlagValues, spaces: dict[str, str], seeds: dict[int, int]) -> int:
    """Runs the suite the flags name; returns the exit code.

    Args:
        values: of `workloads.study`.
        spaces: submission -> the JSON file given for it; all others have that of the suite.
        seeds: of the studies, by their numbers.

    Raises:
        UserError: a name is unknown, a flag does not belong to a suite, or what lies there does not fit.
    """
    plan = _plan(values, spaces, seeds)
    experiment.check_writable(plan.directory)
    todo = suite.jobs(plan)
    _note(plan, values)
    _announce(plan, todo, values.jobs)
    failed = jobs.run(todo, values.jobs, say_kept=False, patient=True)
    if "pace" in plan.stages and not failed:
        tell("==> The pace of each, one trial at a time: leave the machine alone meanwhile")
        failed = jobs.run(suite.pace_jobs(plan), 1, say_kept=False, patient=True)
    if failed:
        tell(f"error: {len(failed)} of the jobs failed; the same command tries them again", sys.stderr)
    reported = "report" not in plan.stages or report(plan.race, plan.directory, plan.frameworks, len(plan.seeds))
    return 0 if reported and not failed else 1


def _plan(values: flags.FlagValues, spaces: dict[str, str], seeds: dict[int, int]) -> Plan:
    chosen = suite.get(values.suite)
    given = [name for name in NOT_OURS if values[name].present]
    if given:
        raise UserError(f"--{given[0]} does not go with --suite, which decides that itself; leave it out.")
    names = values.submissions or list(chosen.submissions)
    for framework in values.framework:
        frameworks.check(framework)
    for workload in values.workloads:
        registry.check(workload)
    for stage in values.stages:
        if stage not in suite.STAGES:
            raise UserError(f"Unknown stage '{stage}'. Known: {', '.join(suite.STAGES)}.")
    for name in names:
        there = [one for one in values.framework if submissions.path_of(name, one).is_file()]
        if not there:
            submissions.check(name, values.framework[0])
        for framework in set(values.framework) - set(there):
            tell(f"note: there is no submission '{name}' in {framework}, where it is left out")
    for framework in values.framework:
        ours = [name for name in values.workloads if framework in registry.WORKLOADS[name].frameworks]
        for name in ours[:1]:
            registry.load(name, framework)  # a missing package shows here, once, and not in every job
    return Plan(
        suite=chosen,
        directory=Path(values.experiment_dir).expanduser().resolve(),
        workloads=tuple(dict.fromkeys(values.workloads)),
        submissions=tuple(dict.fromkeys(names)),
        frameworks=tuple(dict.fromkeys(values.framework)),
        spaces={name: Path(spaces[name]) if name in spaces else suite.space_of(name) for name in names},
        seeds=seeds,
        max_steps=values.max_global_steps,
        clock=values.clock,
        stages=tuple(values.stages),
    )


def _announce(plan: Plan, todo: Sequence[jobs.Job], parallel: int) -> None:
    missing = [(job, len(job.folders) - len(job.outcomes())) for job in todo]
    trials = sum(count for _, count in missing)
    seconds = sum(job.seconds * count for job, count in missing) / parallel
    workloads = facts.in_order(plan.workloads)
    tell(
        f"==> {len(plan.submissions)} submissions ({', '.join(plan.submissions)}) on {len(workloads)} workloads "
        f"({', '.join(workloads)}) in {', '.join(plan.frameworks)}"
    )
    tell(
        f"==> Each: {plan.suite.tuned} points of its space on seed {suite.TUNING_SEED}, the best "
        f"{plan.suite.raced} as trials of {len(plan.seeds)} studies"
    )
    if trials:
        tell(
            f"==> {trials} trials to run, {parallel} at a time: about {jobs.duration(seconds)} if each ran to its "
            "step limit, less as far as they reach their targets (an estimate, set right as trials finish)"
        )


def _note(plan: Plan, values: flags.FlagValues) -> None:
    """Writes `suite.json`: what each side is given, on how many cores, by which commands."""
    path = plan.directory / "suite.json"
    before = experiment.read_json(path) or {}
    commands = before.get("commands")
    commands = list(commands) if isinstance(commands, list) else []
    trains = {"tuning", "race"} & set(plan.stages)  # paces are always measured one at a time
    parallel = values.jobs if trains else before.get("processes_at_a_time", values.jobs)
    command = " ".join(["python -m workloads.study", *_as_typed(values)])
    content = {
        "suite": values.suite,
        "points_tuned": plan.suite.points,
        "points_at_shorter_horizons": plan.suite.further.count if plan.suite.further else 0,
        "points_raced": plan.suite.raced,
        "tuning_seed": suite.TUNING_SEED,
        "study_seeds": list(plan.seeds.values()),
        "processes_at_a_time": parallel,
        "cores": os.cpu_count(),
        "clock": values.clock,
        "commands": commands if command in commands else [*commands, command],
    }
    if content != before:
        atomic.write_json(path, content)


def _as_typed(values: flags.FlagValues) -> Iterator[str]:
    """The flags that were given, with no folder of this machine in them."""
    for name in sorted(values):
        if not values[name].present:
            continue
        if name == "experiment_dir":
            yield f"--{name}=runs/{Path(values.experiment_dir).name}"
        elif name == "tuning_search_space":
            parts = [entry.rpartition("=")[::2] for entry in values.tuning_search_space]
            yield f"--{name}=" + ",".join(
                f"{who}={Path(path).name}" if who else Path(path).name for who, path in parts
            )
        else:
            yield values[name].serialize()


def report(race: Path, output: Path, frameworks: Sequence[str], studies: int = 0) -> bool:
    """Writes report and leaderboards on a race into folders below `output`; returns whether all could be.

    Args:
        race: of the layout `scoring` reads.
        studies: how many are due, a missing one is a miss; 0 for as many as there are.
    """
    good = True
    for framework in frameworks:
        if not any(race.glob(f"*/*/*_{framework}/trial_*/eval_measurements.csv")):
            continue
        with_reference = any(race.glob(f"{REFERENCE}/*/*_{framework}"))
        common = [f"--framework={framework}", *([f"--reference={REFERENCE}"] if with_reference else [])]
        common += [f"--studies={studies}"] if studies else []
        kinds = {"report": ["report"]}
        for cost in ("steps", "time"):
            kinds[f"leaderboard_{cost}"] = ["leaderboard", "--workloads=present", f"--cost={cost}"]
        for name, arguments in kinds.items():
            place = output / f"{name}_{framework}"
            kind, *more = arguments
            command = ["-m", "scoring", kind, str(race), *more, *common, f"--output_dir={place}"]
            finished = subprocess.run([sys.executable, *command], cwd=jobs.CHECKOUT, check=False)
            if finished.returncode != 0:
                good = False
                tell(f"error: the {kind} could not be written ({' '.join(command)})", sys.stderr)
    return good
