"""The folder of an experiment and what is already there: finished trials, seeds, another process at work."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

from commands import atomic
from commands.errors import UserError, tell
from workloads.runner.outcome import Outcome

BUSY = "Another process is at work on {}; wait for it or stop it."


def open_folder(
    experiment_dir: str,
    experiment_name: str,
    workload: str,
    framework: str,
    trials: Sequence[str],
    *,
    whole: bool,
    overwrite: bool,
    resume: bool,
) -> Path:
    """`<experiment_dir>/<experiment_name>/<workload>_<framework>`, made and known to be writable.

    Args:
        experiment_dir, experiment_name, workload, framework: as the flags.
        trials: the names of the folders of the trials to run.
        whole: whether these are the whole experiment, not a slice of it, so that `overwrite` removes other trials,
            too.
        overwrite: remove what is there.
        resume: go on with what is there.

    Raises:
        UserError: one of the trials exists and neither flag is given, another process is at work on what is to be
            removed, or the folder cannot be written.
    """
    folder = Path(experiment_dir).expanduser() / experiment_name / f"{workload}_{framework}"
    check_writable(folder.parent)
    with _starting(folder):
        there = [folder / name for name in trials if (folder / name).exists()]
        if overwrite and folder.exists():
            _remove(folder, sorted(folder.glob("trial_*")) if whole else there, whole=whole)
        elif there and not resume:
            raise UserError(
                f"The experiment {folder} exists already; go on with it by --resume_last_run, "
                "or replace it by --overwrite, or choose another --experiment_name."
            )
        check_writable(folder)
    return folder


def _remove(folder: Path, trials: Sequence[Path], *, whole: bool) -> None:
    """Removes trials, or the whole folder, unless another process is at work on one of them."""
    with contextlib.ExitStack() as stack:
        for trial in trials:
            if trial.is_dir():
                stack.enter_context(_locked(trial))
        for path in [folder] if whole else trials:
            # Under a hidden name first, so that whoever looks sees all of it or nothing.
            aside = path.with_name(f".{path.name}.{os.getpid()}.old")
            try:
                os.replace(path, aside)
            except OSError as error:
                raise UserError(
                    f"The folder {path} cannot be removed: {error.strerror or error}; choose another "
                    "--experiment_name."
                ) from None
            shutil.rmtree(aside, ignore_errors=True)


def check_writable(folder: Path) -> None:
    """Makes a folder and writes to it.

    Raises:
        UserError: that is not possible.
    """
    probe = folder / f".probe.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(b"0" * 4096)  # a full disk shows only when something is written
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"The folder {folder} cannot be written: {error.strerror or error}; "
            "choose another --experiment_dir (--output_dir in the demo) or make room."
        ) from None


def outcome(trial_folder: Path) -> Outcome | None:
    """The outcome of a finished trial, None if it is not finished.

    A trial whose outcome, meta data or hyperparameters cannot be read, because the machine went down while they
    were written, is not finished either: a note says so, and the run that goes on with it writes them anew.
    """
    found = read_json(trial_folder / "outcome.json", Outcome.__required_keys__)
    if found is None:
        return None
    if any(_is_damaged(trial_folder / name) for name in ("meta_data_0.json", "hparams.json")):
        return None
    return cast(Outcome, found)


def recorded_seed(trial_folder: Path) -> int | None:
    """The seed an earlier run of the trial used, from the first of its records that can be read."""
    for pattern in ("meta_data_*.json", "outcome.json"):
        for path in sorted(trial_folder.glob(pattern)):
            seed = (read_json(path) or {}).get("rng_seed")
            if isinstance(seed, int):
                return seed
    return None


def repair(trial_folder: Path, pattern: str, content: Mapping[str, object]) -> None:
    """Writes `content` to the files of a trial that cannot be read."""
    for path in trial_folder.glob(pattern):
        if _is_damaged(path):
            atomic.write_json(path, content)


@contextlib.contextmanager
def lock(trial_folder: Path) -> Iterator[None]:
    """Makes the folder of a trial, and holds it until the end of the context or of the process.

    Raises:
        UserError: another process holds it.
    """
    with contextlib.ExitStack() as stack:
        with _starting(trial_folder.parent):
            trial_folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_locked(trial_folder))
        yield


def is_locked(trial_folder: Path) -> bool:
    """Whether a process is at work on a trial."""
    if not trial_folder.is_dir():
        return False
    try:
        with _locked(trial_folder):
            return False
    except (OSError, UserError) as error:
        return isinstance(error, UserError)


@contextlib.contextmanager
def _locked(trial_folder: Path) -> Iterator[None]:
    with open(trial_folder / ".lock", "w", encoding="utf-8") as file:
        if not take(file):
            raise UserError(BUSY.format(trial_folder))
        yield


@contextlib.contextmanager
def _starting(folder: Path) -> Iterator[None]:
    """Lets one process at a time take or remove trials of an experiment, which takes it a moment."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        directory = os.open(folder.parent, os.O_RDONLY)  # locked itself: a file beside the folder would stay
    except OSError as error:
        raise UserError(f"The folder {folder.parent} cannot be used: {error.strerror or error}.") from None
    try:
        take(directory, wait=True)
        yield
    finally:
        os.close(directory)


def take(file: IO[Any] | int, *, wait: bool = False) -> bool:
    """Locks an open file until it is closed, by all that have it from here; False if another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True


_told: set[Path] = set()


def read_json(path: Path, keys: frozenset[str] = frozenset()) -> dict[str, object] | None:
    """The object in a JSON file of a trial; None if there is no such file, or, with a note, if it is damaged.

    Args:
        path: the file.
        keys: what a whole one has.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        problem = str(error)
    else:
        if isinstance(content, dict) and keys <= content.keys():
            return content
        lacking = sorted(keys - content.keys()) if isinstance(content, dict) else []
        problem = f"it lacks {', '.join(lacking)}" if lacking else "it holds no object"
    if path not in _told:  # once for each file
        _told.add(path)
        tell(f"note: {path} cannot be read ({problem}); the trial is taken for unfinished", sys.stderr)
    return None


def _is_damaged(path: Path) -> bool:
    return path.exists() and read_json(path) is None
