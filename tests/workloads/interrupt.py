"""Kills runs at chosen moments and resumes them. A program of its own, because it forks before any training.

    python -m tests.workloads.interrupt FOLDER '{"SUBMISSION": ["MOMENT", ...], ...}'

A moment is `before:N` or `after:N` (the N-th rename of a file into place), `step:N` (before the N-th update), or
`share:X` (after that share of the time that an undisturbed run took). For each, a run is killed at that moment and
then resumed, in FOLDER/SUBMISSION/MOMENT; FOLDER/SUBMISSION/whole is never killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch._dynamo  # noqa: F401  every child would import it anew at its first update

from tests.workloads.helpers import CHECKOUT, arguments, shrink
from workloads import registry, run
from workloads.runner import loop

MAX_STEPS = 5


def kill_at(moment: str) -> None:
    """Arranges that this process is killed at the moment."""
    place, number = moment.split(":")
    count = 0

    def counted(function: Callable[..., Any], before: bool) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal count
            count += 1
            if before and count == int(number):
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*arguments)
            if count == int(number):
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    if place == "step":
        loop._Run.update = counted(loop._Run.update, before=True)  # type: ignore[method-assign]
    else:
        os.replace = counted(os.replace, before=place == "before")


def in_child(flags: list[str], moment: str | None, seconds: float | None = None) -> int:
    """Runs the runner in a fork of this process; returns how it ended, negative for a signal.

    Args:
        flags: the runner's.
        moment: at which it kills itself.
        seconds: after which this process kills it.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if moment:
                kill_at(moment)
            code = run.main(flags)
        finally:
            sys.stdout.flush()
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(folder: Path, moments: dict[str, list[str]]) -> None:
    shrink(setattr)
    # Loaded once, before the forks.
    workload = registry.load("bible_lm", "pytorch")
    registry.load = lambda name, framework: workload
    for submission, its in moments.items():
        interrupt(folder / submission, submission, its)


def interrupt(folder: Path, submission: str, moments: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    space = folder / "space.json"
    # Dropout, so that the generator's state matters.
    space.write_text(json.dumps([{"learning_rate": 0.01, "dropout_rate": 0.2}]))
    common = {
        "submission_path": CHECKOUT / f"submissions/{submission}/pytorch/submission.py",
        "tuning_ruleset": None,
        "tuning_search_space": space,
        "max_global_steps": MAX_STEPS,
    }
    start = time.monotonic()
    assert in_child(arguments(folder / "whole", **common), None) == 0
    seconds = time.monotonic() - start
    for moment in moments:
        flags = arguments(folder / moment, **common)
        place, number = moment.split(":")
        if place == "share":
            code = in_child(flags, None, float(number) * seconds)
            assert code in (0, -signal.SIGKILL), f"{moment}: the run ended with {code}"  # it may have been faster
        else:
            code = in_child(flags, moment)
            assert code == -signal.SIGKILL, f"{moment}: the run ended with {code}"
        if code:
            code = in_child([*flags, "--resume_last_run"], None)
            assert code == 0, f"{moment}: the resumed run ended with {code}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
