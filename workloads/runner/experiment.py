"""The folder of an experiment and what is already there: finished trials, seeds, another process at work."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any, TextIO

from commands.errors import UserError
from workloads.runner.outcome import Outcome


def open_folder(
    experiment_dir: str, experiment_name: str, workload: str, framework: str, *, overwrite: bool, resume: bool
) -> Path:
    """`<experiment_dir>/<experiment_name>/<workload>_<framework>`, made and known to be writable.

    Raises:
        UserError: it exists and neither flag is given, or it cannot be written.
    """
    folder = Path(experiment_dir).expanduser() / experiment_name / f"{workload}_{framework}"
    if folder.exists():
        if overwrite:
            shutil.rmtree(folder, ignore_errors=True)
        elif not resume:
            raise UserError(
                f"The experiment {folder} exists already; go on with it by --resume_last_run, "
                "or replace it by --overwrite, or choose another --experiment_name."
            )
    check_writable(folder)
    return folder


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
    """The outcome of a finished trial, None if it is not finished."""
    found: Outcome | None = _read_json(trial_folder / "outcome.json")
    return found


def recorded_seed(trial_folder: Path) -> int | None:
    """The seed an earlier run of the trial used."""
    content = _read_json(trial_folder / "meta_data_0.json")
    return None if content is None else content.get("rng_seed")


def lock(trial_folder: Path) -> TextIO:
    """Holds the trial until the process ends or the file is closed.

    Raises:
        UserError: another process holds it.
    """
    file = open(trial_folder / ".lock", "w")  # noqa: SIM115 (the caller closes it)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UserError(f"Another process is at work on {trial_folder}; wait for it or stop it.") from None
    return file


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
