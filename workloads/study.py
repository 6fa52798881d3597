"""Runs submissions on workloads over several studies, as trials in processes of their own.

    python -m workloads.study --submissions=nadamw,kfac_reduce --workloads=mnist_vit,bible_lm \\
        --num_studies=5 --jobs=2 --experiment_dir=runs/x

leaves `<experiment_dir>/<submission>/study_<j>/<workload>_<framework>/trial_<i>/`. Run again, it skips finished
trials and goes on with interrupted ones. Study j has the same seed for every submission and workload.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from absl import flags

from commands import errors, frameworks
from commands.errors import UserError, tell
from commands.flags import new, parse
from commands.frameworks import FRAMEWORKS
from submissions import registry as registered
from workloads import registry
from workloads.runner import experiment, tuning
from workloads.runner.outcome import Outcome, describe
from workloads.runner.progress import is_terminal

CHECKOUT = Path(__file__).resolve().parent.parent
# One thread each: with several BLAS threads on as many cores, timings have outliers of ten times. XLA reads NPROC.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NPROC"), "1")


@dataclass(frozen=True)
class Job:
    """One trial.

    Attributes:
        folder: the trial's folder.
        command: trains it.
        log: gets what the command prints.
        settings: the values of `workloads.runner.loop.SETTINGS`.
    """

    name: str
    folder: Path
    command: tuple[str, ...]
    log: Path
    settings: dict[str, object]

    def finished(self) -> Outcome | None:
        """The outcome of the trial, None if it is yet to be run, or was run with other settings."""
        outcome = experiment.outcome(self.folder)
        return outcome if outcome is not None and outcome["settings"] == self.settings else None


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
    trials: Sequence[int],
    max_steps: int | None = None,
    *,
    stop_at_target: bool = True,
    save_checkpoints: bool = True,
) -> list[Job]:
    """All trials, study by study, so that an interrupted series leaves whole comparisons.

    Args:
        search_spaces: submission -> JSON file; one without an entry trains its own point, as trial 1.
        trials: indices of the points to train, counted from 0.
        max_steps, stop_at_target, save_checkpoints: as the runner's flags.
    """
    settings: dict[str, object] = {"max_global_steps": max_steps, "stop_at_target": stop_at_target}
    common = [] if max_steps is None else [f"--max_global_steps={max_steps}"]
    common += [f"--stop_at_target={stop_at_target}", f"--save_checkpoints={save_checkpoints}"]
    result = []
    for study in studies:
        for workload in workloads:
            for submission in submissions:
                space = search_spaces.get(submission)
                for index in trials if space else (0,):
                    name = f"{submission}/study_{study}/{workload}_{framework}/trial_{index + 1}"
                    command = [
                        sys.executable,
                        "-m",
                        "workloads.run",
                        f"--workload={workload}",
                        f"--framework={framework}",
                        f"--submission_path={registered.path_of(submission, framework)}",
                        f"--experiment_dir={experiment_dir / submission}",
                        f"--experiment_name=study_{study}",
                        f"--rng_seed={study_seed(study)}",
                        "--resume_last_run",
                        *common,
                    ]
                    if space:
                        command += [f"--tuning_search_space={space}", f"--num_tuning_trials={max(trials) + 1}"]
                        command += [f"--hparam_start_index={index}", f"--hparam_end_index={index + 1}"]
                    else:
                        command += ["--tuning_ruleset=self"]
                    # Hidden, because a reader of the experiment takes every folder for a submission.
                    log = experiment_dir / ".logs" / f"{name.replace('/', '.')}.log"
                    result.append(Job(name, experiment_dir / name, tuple(command), log, settings))
    return result


def run(todo: Sequence[Job], parallel: int) -> list[str]:
    """Runs jobs, `parallel` at a time, except finished trials; prints each outcome, returns the failed names."""
    left: list[Job] = []
    for job in todo:
        outcome = job.finished()
        if outcome is None:
            left.append(job)
        else:
            tell(f"{job.name}: kept, {describe(outcome)}")
    total = len(left)
    failed: list[str] = []
    running: dict[subprocess.Popen[bytes], Job] = {}
    status = _Status()
    started = time.monotonic()
    try:
        while left or running:
            while left and len(running) < parallel:
                job = left.pop(0)
                started_process = _start(job)
                if started_process is None:
                    failed.append(job.name)
                    status.clear()
                    tell(f"{job.name}: FAILED, {experiment.BUSY.format(job.folder)}", sys.stderr)
                else:
                    running[started_process] = job
            for process in [process for process in running if process.poll() is not None]:
                job = running.pop(process)
                status.clear()
                outcome = job.finished()
                if process.returncode != 0 or outcome is None:
                    failed.append(job.name)
                    tell(f"{job.name}: FAILED, {_last_line(job.log)} (see {job.log})", sys.stderr)
                else:
                    done = total - len(left) - len(running)
                    minutes = (time.monotonic() - started) / done * (total - done) / 60
                    tell(f"[{done}/{total}, {minutes:.0f} min left] {job.name}: {describe(outcome)}")
            status.show([_last_line(job.log) for job in running.values()])
            time.sleep(0.1)
    finally:
        status.clear()
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            process.wait()
    return failed


class _Status:
    """On a terminal, one line with the progress of the running jobs; elsewhere nothing."""

    def __init__(self) -> None:
        self._terminal = is_terminal(sys.stderr)

    def show(self, lines: Sequence[str]) -> None:
        if self._terminal:
            text = " | ".join(lines)[: shutil.get_terminal_size().columns - 1]
            tell(f"\r\x1b[K{text}", sys.stderr, end="")

    def clear(self) -> None:
        self.show([])


def _start(job: Job) -> subprocess.Popen[bytes] | None:
    """Starts a job; None if another process is at work on it, whose log stays as it is."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "ab") as log:
        # The job inherits the lock with its log: another study knows of it before the job has locked its trial.
        if not experiment.take(log) or experiment.is_locked(job.folder):
            return None
        log.truncate(0)
        return subprocess.Popen(
            job.command,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=CHECKOUT,
            env={**os.environ, **ONE_THREAD},
        )


def _last_line(log: Path) -> str:
    """The last line a job printed."""
    with open(log, "rb") as file:
        file.seek(max(0, os.path.getsize(log) - 4096))
        lines = file.read().decode("utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it has printed nothing"


def define() -> flags.FlagValues:
    """The flags of `python -m workloads.study`."""
    values = new()
    flags.DEFINE_list("submissions", None, "Names of folders in submissions/. Required.", flag_values=values)
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
    flags.DEFINE_bool("save_checkpoints", default=True, help="Lets trials resume.", flag_values=values)
    flags.DEFINE_integer("jobs", 2, "Trials at a time, a core each.", lower_bound=1, flag_values=values)
    flags.DEFINE_string("experiment_dir", None, "Where to. Required.", flag_values=values)
    return values


def main(argv: Sequence[str] | None = None) -> int:
    """Runs with the given arguments (default: the command line's); returns the exit code."""

    def command() -> int:
        values = define()
        arguments = sys.argv[1:] if argv is None else argv
        parse(arguments, values, "python -m workloads.study", ("submissions", "experiment_dir"))
        failed = run(_jobs_of(values), values.jobs)
        if failed:
            tell(f"error: {len(failed)} of the trials failed: {', '.join(failed)}", sys.stderr)
        return 1 if failed else 0

    return errors.run(command, interrupted="interrupted; the same command goes on")


def _jobs_of(values: flags.FlagValues) -> list[Job]:
    """The jobs the flags ask for, checked as far as it costs nothing."""
    for framework in values.framework:
        frameworks.check(framework)
    for workload in values.workloads:
        registry.check(workload)
    for framework, submission in itertools.product(values.framework, values.submissions):
        registered.load(submission, framework)  # names a package that is missing
    spaces = _search_spaces(values.tuning_search_space, values.submissions)
    trials = [0]
    for path in spaces.values():
        points = tuning.read_points(path, values.num_tuning_trials)
        trials = [index for index, _ in tuning.select(points, values.hparam_start_index, values.hparam_end_index)]
    # Absolute, because a job runs in the checkout, whatever folder the command was given in.
    directory = Path(values.experiment_dir).expanduser().resolve()
    experiment.check_writable(directory)
    studies = range(values.first_study, values.first_study + values.num_studies)
    return [
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
            save_checkpoints=values.save_checkpoints,
        )
    ]


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
