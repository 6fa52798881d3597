"""Runs submissions on workloads over several studies, as trials in processes of their own.

    python -m workloads.study --submissions=nadamw,kfac_reduce --workloads=mnist_vit,bible_lm \\
        --num_studies=5 --jobs=2 --experiment_dir=runs/x

leaves `<experiment_dir>/<submission>/study_<j>/<workload>_<framework>/trial_<i>/`. Run again, it skips finished
trials and goes on with interrupted ones. Study j has the same seed for every submission and workload.

    python -m workloads.study --suite=embedded --studies=3 --experiment_dir=runs/suite

tunes every submission on every workload with the same means, races the best points, and ends with report and
leaderboards (`workloads.studies.suite`). `--submissions`, `--workloads`, `--framework` and `--stages` take a part.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import flags

from commands import errors, frameworks
from commands.errors import UserError, tell
from commands.flags import new, parse
from commands.frameworks import FRAMEWORKS
from submissions import registry as registered
from workloads import registry
from workloads.runner import experiment, tuning
from workloads.runner.flags import define_clock
from workloads.runner.jobs import Job, command, log_of, run
from workloads.studies import suite, suite_run


def study_seed(study: int) -> int:
    """The seed of study `study`, counted from 1."""
    return 1000 + study


def jobs(
    experiment_dir: Path,
    submissions: Sequence[str],
    workloads: Sequence[str],
    framework: str,
    studies: Sequence[int],
    search_spaces: dict[str, str],
    trials: Mapping[str, Sequence[int]],
    max_steps: int | None = None,
    *,
    stop_at_target: bool = True,
    clock: str = "wall",
    save_checkpoints: bool = True,
) -> list[Job]:
    """All trials, study by study, so that an interrupted series leaves whole comparisons.

    Args:
        search_spaces: submission -> JSON file; one without an entry trains its own point, as trial 1.
        trials: submission -> indices of the points to train, counted from 0; for those with a file.
        max_steps, stop_at_target, clock, save_checkpoints: as the runner's flags.
    """
    settings: dict[str, object] = {
        "max_global_steps": max_steps,
        "stop_at_target": stop_at_target,
        "clock": clock,
    }
    result = []
    for study in studies:
        for workload in workloads:
            for submission in submissions:
                space = search_spaces.get(submission)
                indices = trials[submission] if space else (0,)
                for index in indices:
                    name = f"{submission}/study_{study}/{workload}_{framework}/trial_{index + 1}"
                    train = command(
                        workload,
                        framework,
                        submission,
                        experiment_dir,
                        f"study_{study}",
                        study_seed(study),
                        settings,
                        space=space,
                        points=range(index, index + 1),
                        of=max(indices) + 1,
                        save_checkpoints=save_checkpoints,
                    )
                    log = log_of(experiment_dir, name)
                    result.append(Job(name, (experiment_dir / name,), train, log, settings))
    return result


def define() -> flags.FlagValues:
    """The flags of `python -m workloads.study`."""
    values = new()
    flags.DEFINE_list(
        "submissions",
        None,
        "Names of folders in submissions/. Required; default of a suite: its own.",
        flag_values=values,
    )
    flags.DEFINE_list("workloads", list(registry.WORKLOADS), "Workloads.", flag_values=values)
    flags.DEFINE_list("framework", ["pytorch"], f"Frameworks: {', '.join(FRAMEWORKS)}.", flag_values=values)
    flags.DEFINE_integer("num_studies", 1, "How many studies.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("first_study", 1, "Number of the first.", lower_bound=1, flag_values=values)
    flags.DEFINE_list(
        "tuning_search_space",
        [],
        "For each submission that is to be tuned, <submission>=<JSON file>; a file alone is for all of them. "
        "Without one a submission trains its own point.",
        flag_values=values,
    )
    flags.DEFINE_integer("num_tuning_trials", 1, "How many points.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("hparam_start_index", None, "From this point on.", lower_bound=0, flag_values=values)
    flags.DEFINE_integer("hparam_end_index", None, "Up to before it.", lower_bound=0, flag_values=values)
    flags.DEFINE_integer("max_global_steps", None, "Default: step_hint.", lower_bound=1, flag_values=values)
    flags.DEFINE_bool("stop_at_target", default=True, help="End a trial at its target.", flag_values=values)
    define_clock(values)
    flags.DEFINE_bool("save_checkpoints", default=True, help="Lets trials resume.", flag_values=values)
    flags.DEFINE_integer("jobs", 2, "Trials at a time, a core each.", lower_bound=1, flag_values=values)
    flags.DEFINE_string("experiment_dir", None, "Where to. Required.", flag_values=values)
    flags.DEFINE_string(
        "suite", None, f"Tune and race as this suite says: {', '.join(suite.SUITES)}.", flag_values=values
    )
    flags.DEFINE_integer(
        "studies", None, "How many studies of a suite. Default: its own.", lower_bound=1, flag_values=values
    )
    flags.DEFINE_list(
        "stages", list(suite.STAGES), f"Parts of a suite: {', '.join(suite.STAGES)}.", flag_values=values
    )
    return values


def main(argv: Sequence[str] | None = None) -> int:
    """Runs with the given arguments (default: the command line's); returns the exit code."""

    def main_command() -> int:
        values = define()
        arguments = sys.argv[1:] if argv is None else argv
        parse(arguments, values, "python -m workloads.study", ("experiment_dir",))
        if values.suite:
            return _run_suite(values)
        for name in ("studies", "stages"):
            if values[name].present:
                raise UserError(f"--{name} is for --suite; give that, too, or leave it out.")
        if not values.submissions:
            raise UserError("The flag --submissions is missing. See python -m workloads.study --help.")
        failed = run(_jobs_of(values), values.jobs)
        if failed:
            tell(f"error: {len(failed)} of the trials failed: {', '.join(failed)}", sys.stderr)
        return 1 if failed else 0

    return errors.run(main_command, interrupted="interrupted; the same command goes on")


def _run_suite(values: flags.FlagValues) -> int:
    chosen = suite.get(values.suite)
    names = values.submissions or list(chosen.submissions)
    numbers = range(values.first_study, values.first_study + (values.studies or chosen.studies))
    spaces = _search_spaces(values.tuning_search_space, names)
    return suite_run.run(values, spaces, {study: study_seed(study) for study in numbers})


def _jobs_of(values: flags.FlagValues) -> list[Job]:
    """The jobs the flags ask for, checked as far as it costs nothing."""
    for framework in values.framework:
        frameworks.check(framework)
    for workload in values.workloads:
        registry.check(workload)
    for framework, submission in itertools.product(values.framework, values.submissions):
        registered.load(submission, framework)  # names a package that is missing
    spaces = _search_spaces(values.tuning_search_space, values.submissions)
    trials: dict[str, list[int]] = {}
    for submission, path in spaces.items():
        points = tuning.read_points(path, values.num_tuning_trials)
        selected = tuning.select(points, values.hparam_start_index, values.hparam_end_index)
        trials[submission] = [index for index, _ in selected]
    # Absolute, because a job runs in the checkout, whatever folder the command was given in.
    directory = Path(values.experiment_dir).expanduser().resolve()
    experiment.check_writable(directory)
    studies = range(values.first_study, values.first_study + values.num_studies)
    every = [
        job
        for study, framework in itertools.product(studies, values.framework)
        for job in jobs(
            directory,
            values.submissions,
            values.workloads,
            framework,
            [study],
            spaces,
            trials,
            values.max_global_steps,
            stop_at_target=values.stop_at_target,
            clock=values.clock,
            save_checkpoints=values.save_checkpoints,
        )
    ]
    return list({job.name: job for job in every}.values())  # a name given twice would be in its own way


def _search_spaces(entries: Sequence[str], submissions: Sequence[str]) -> dict[str, str]:
    spaces: dict[str, str] = {}
    for entry in entries:
        name, separator, path = entry.partition("=")
        if not separator:
            spaces |= {submission: str(Path(name).resolve()) for submission in submissions}
        elif name in submissions:
            spaces[name] = str(Path(path).resolve())
        else:
            raise UserError(f"--tuning_search_space names '{name}', which is not among --submissions.")
    return spaces


if __name__ == "__main__":
    sys.exit(main())
