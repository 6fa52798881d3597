"""Trials in processes of their own: several at a time, in an order that may depend on results, with one display."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from commands.errors import UserError, tell
from submissions import registry as submissions
from workloads.runner import experiment
from workloads.runner.outcome import Outcome, describe, describe_several, settings_of
from workloads.runner.progress import is_terminal

CHECKOUT = Path(__file__).resolve().parents[2]
# One thread each: with several BLAS threads on as many cores, timings have outliers of ten times. XLA reads NPROC.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NPROC"), "1")
_PERIOD = 2.0  # seconds between looks at how far running jobs are
_LINE_PERIOD = 60.0  # seconds between lines where they cannot be rewritten


@dataclass(frozen=True)
class Job:
    """One process, which trains one trial or several one after the other.

    Attributes:
        name: unique among the jobs of a run.
        folders: of its trials.
        command: trains them; what is finished it must leave as it is.
        log: gets what the command prints.
        settings: the values of `workloads.runner.loop.SETTINGS`.
        seconds: what a trial is expected to take; only ratios matter, and the unit until the first has finished.
        needs: names of the jobs that must have finished before.
        prepare: called before the process is started, once those have; may raise UserError.
    """

    name: str
    folders: tuple[Path, ...]
    command: tuple[str, ...]
    log: Path
    settings: dict[str, object]
    seconds: float = 1.0
    needs: tuple[str, ...] = ()
    prepare: Callable[[], None] | None = None

    def outcomes(self) -> list[Outcome]:
        """Of the trials that are finished, with these settings."""
        found = (experiment.outcome(folder) for folder in self.folders)
        return [outcome for outcome in found if outcome is not None and settings_of(outcome) == self.settings]

    def is_finished(self) -> bool:
        """Whether none of its trials is yet to be run."""
        return len(self.outcomes()) == len(self.folders)

    def describe(self) -> str:
        """Its outcomes in words."""
        outcomes = self.outcomes()
        return describe(outcomes[0]) if len(self.folders) == 1 else describe_several(outcomes)


def command(
    workload: str,
    framework: str,
    submission: str,
    experiment_dir: Path,
    name: str,
    seed: int,
    settings: dict[str, object],
    *,
    space: Path | str | None = None,
    points: range = range(1),
    of: int = 1,
    save_checkpoints: bool = True,
    path: Path | None = None,
) -> tuple[str, ...]:
    """Trains points of a space, or the submission's own, into `<experiment_dir>/<submission>/<name>/...`.

    Args:
        settings: as of a job.
        space: a JSON file; None for the submission's own point.
        points: indices of the points to train, counted from 0.
        of: how many points there are.
        save_checkpoints: as the runner's flag.
        path: the submission's file; None for that of its name.
    """
    given = [f"--{flag}={value}" for flag, value in settings.items() if value is not None]
    if space is None:
        given.append("--tuning_ruleset=self")
    else:
        given += [f"--tuning_search_space={space}", f"--num_tuning_trials={of}"]
        given += [f"--hparam_start_index={points.start}", f"--hparam_end_index={points.stop}"]
    return (
        sys.executable,
        "-m",
        "workloads.run",
        f"--workload={workload}",
        f"--framework={framework}",
        f"--submission_path={path or submissions.path_of(submission, framework)}",
        f"--experiment_dir={experiment_dir / submission}",
        f"--experiment_name={name}",
        f"--rng_seed={seed}",
        "--resume_last_run",
        f"--save_checkpoints={save_checkpoints}",
        *given,
    )


def log_of(directory: Path, name: str) -> Path:
    """Where a job's log lies. Hidden, because a reader of the experiment takes every folder for a submission."""
    return directory / ".logs" / f"{re.sub(r'[^A-Za-z0-9_]+', '.', name)}.log"


def run(todo: Sequence[Job], parallel: int, *, say_kept: bool = True, patient: bool = False) -> list[str]:
    """Runs jobs in their order, `parallel` at a time, except finished ones; returns the names of the failed.

    Args:
        todo: the jobs.
        parallel: how many processes at a time.
        say_kept: print a line for each job that is finished already, not only how many trials are.
        patient: wait for a job that another process has at work, which else fails.
    """
    return _Run(todo, parallel, say_kept=say_kept, patient=patient).run()


class _Run:
    def __init__(self, todo: Sequence[Job], parallel: int, *, say_kept: bool, patient: bool) -> None:
        self.parallel, self.patient = parallel, patient
        self.left = [job for job in todo if not job.is_finished()]
        self.running: dict[subprocess.Popen[bytes], Job] = {}
        self.failed: list[str] = []
        self.status = _Status()
        kept = [job for job in todo if job not in self.left]
        for job in kept if say_kept else ():
            tell(f"{job.name}: kept, {job.describe()}")
        # Of jobs that have not started, looked up once: nobody else changes them.
        self.missing = {job.name: len(job.folders) - len(job.outcomes()) for job in self.left}
        self.trials = sum(self.missing.values())
        already = sum(len(job.folders) for job in todo) - self.trials
        if already and not say_kept:
            tell(f"{already} of {already + self.trials} trials are finished already and are kept")
        self.expected = sum(job.seconds * self.missing[job.name] for job in self.left)
        self.started = time.monotonic()

    def run(self) -> list[str]:
        looked = 0.0
        with _termination_interrupts():
            try:
                while self.left or self.running:
                    while len(self.running) < self.parallel and self.start_next():
                        pass
                    for process in [process for process in self.running if process.poll() is not None]:
                        self.finish(process)
                    if time.monotonic() - looked > _PERIOD:
                        looked = time.monotonic()
                        self.status.show(self.line())
                    time.sleep(0.1)
            finally:
                self.status.clear()
                for process in self.running:
                    process.send_signal(signal.SIGTERM)
                for process in self.running:
                    process.wait()
        return self.failed

    def start_next(self) -> bool:
        """Starts the first job that may start; False if there is none."""
        for job in list(self.left):
            lost = [name for name in job.needs if name in self.failed]
            if lost:
                self.left.remove(job)
                self.fail(job, f"it needs '{lost[0]}', which failed")
                continue
            waiting = {other.name for other in [*self.left, *self.running.values()]}
            if not waiting.isdisjoint(job.needs):
                continue
            try:
                if job.prepare is not None:
                    job.prepare()
            except UserError as error:
                self.left.remove(job)
                self.fail(job, str(error))
                continue
            process = _start(job)
            if process is None:
                if self.patient:
                    continue
                self.left.remove(job)
                self.fail(job, experiment.BUSY.format(job.folders[0]))
                continue
            self.left.remove(job)
            self.running[process] = job
            return True
        return False

    def finish(self, process: subprocess.Popen[bytes]) -> None:
        job = self.running.pop(process)
        if process.returncode != 0 or not job.is_finished():
            self.fail(job, f"{last_line(job.log)} (see {job.log})")
        else:
            self.status.clear()
            tell(f"[{self.done()}/{self.trials}, {self.time_left()} left] {job.name}: {job.describe()}")

    def fail(self, job: Job, reason: str) -> None:
        self.failed.append(job.name)
        self.status.clear()
        tell(f"{job.name}: FAILED, {reason}", sys.stderr)

    def to_do(self) -> list[tuple[Job, int]]:
        """The jobs that have not ended, with the number of trials they have yet to finish."""
        running = [(job, len(job.folders) - len(job.outcomes())) for job in self.running.values()]
        return [*running, *((job, self.missing[job.name]) for job in self.left)]

    def done(self) -> int:
        """Trials finished or given up."""
        return self.trials - sum(count for _, count in self.to_do())

    def time_left(self) -> str:
        expected = sum(job.seconds * count for job, count in self.to_do())
        past = self.expected - expected
        # Until the first has finished, expectations stand for themselves.
        pace = (time.monotonic() - self.started) / past if past > 0 else 1 / self.parallel
        return duration(expected * pace)

    def line(self) -> str:
        running = " | ".join(f"{job.name}: {last_line(job.log)}" for job in self.running.values())
        return f"{self.done()}/{self.trials} trials, {self.time_left()} left; running {running}"


class _Status:
    """On a terminal, one line with the progress of the running jobs; elsewhere a line every minute."""

    def __init__(self) -> None:
        self._terminal = is_terminal(sys.stderr)
        self._last = time.monotonic()

    def show(self, line: str) -> None:
        if self._terminal:
            tell(f"\r\x1b[K{line[: shutil.get_terminal_size().columns - 1]}", sys.stderr, end="")
        elif time.monotonic() - self._last > _LINE_PERIOD:
            self._last = time.monotonic()
            tell(line, sys.stderr)

    def clear(self) -> None:
        if self._terminal:
            self.show("")


def duration(seconds: float) -> str:
    """A time in words, to the minute: "7 min" or "2 h 05 min"."""
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def last_line(log: Path) -> str:
    """The last line a job printed."""
    with open(log, "rb") as file:
        file.seek(max(0, os.path.getsize(log) - 4096))
        lines = file.read().decode("utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it has printed nothing"


def _start(job: Job) -> subprocess.Popen[bytes] | None:
    """Starts a job; None if another process is at work on it, whose log stays as it is."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "ab") as log:
        # The job inherits the lock with its log: another study knows of it before the job has locked its trial.
        if not experiment.take(log) or any(experiment.is_locked(folder) for folder in job.folders):
            return None
        log.truncate(0)
        return subprocess.Popen(
            job.command,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=CHECKOUT,
            env={**os.environ, **ONE_THREAD},
        )


@contextlib.contextmanager
def _termination_interrupts() -> Iterator[None]:
    """Lets a termination end the jobs, too, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
