"""A schedule by time ends with the time, whether steps are slow or fast, and goes on after an interruption."""

from __future__ import annotations

import json

import pytest

from submissions.common.schedule import Schedule
from tests.workloads.helpers import CHECKOUT, arguments, metrics
from workloads import run
from workloads.bible_lm.task import BibleLmTask
from workloads.runner import loop
from workloads.runner.jax import JaxBackend
from workloads.runner.pytorch import PyTorchBackend

BUDGET = 1_000  # seconds
LENGTH = 10  # of the schedule, in its own steps


class Clock:
    """What the runner takes for the time: so many seconds for each update.

    Attributes:
        positions: where the schedule stood at each.
    """

    def __init__(self, patch, seconds):
        self.positions, time, at = [], 0, Schedule.at

        def update(*args):
            nonlocal time
            time += seconds
            self.positions.append(args[-1])
            return at(*args)

        patch.setattr(Schedule, "at", update)
        for backend in (PyTorchBackend, JaxBackend):
            patch.setattr(backend, "now", lambda *_: float(time))


@pytest.fixture(autouse=True)
def far_limit(small, monkeypatch):
    """The runner's own limit is far off: it is the schedule that ends training."""
    monkeypatch.setattr(BibleLmTask, "max_allowed_runtime_sec", 1_000 * BUDGET)


def _flags(folder, framework, clock):
    folder.mkdir(parents=True, exist_ok=True)
    point = {"schedule_clock": clock, "budget_factor": 1e-3, "ends_with_schedule": True}
    point["horizon_factor"] = LENGTH / BibleLmTask.step_hint
    (folder / "points.json").write_text(json.dumps([point]))
    return arguments(
        folder,
        framework=framework,
        submission_path=CHECKOUT / f"submissions/kfac_reduce/{framework}/submission.py",
        tuning_ruleset=None,
        tuning_search_space=folder / "points.json",
        max_global_steps=30,
    )


@pytest.mark.parametrize("framework", ["pytorch", "jax"])
@pytest.mark.parametrize(
    ("clock", "seconds", "expected"),
    [
        ("time", 250, [0, 2, 5, 7]),
        ("time", 50, sorted([*range(LENGTH)] * 2)),
        ("sooner", 250, [0, 2, 5, 7]),
        ("sooner", 50, [*range(LENGTH)]),
        ("restart", 250, [0, 2, 5, 7]),
        ("restart", 50, [*range(2 * LENGTH)]),
    ],
)
def test_slow_and_fast_steps_end_with_the_time(tmp_path, monkeypatch, framework, clock, seconds, expected):
    time = Clock(monkeypatch, seconds)
    assert run.main(_flags(tmp_path, framework, clock)) == 0
    outcome = json.loads((tmp_path / f"e/bible_lm_{framework}/trial_1/outcome.json").read_text())
    assert outcome["reason"] == "submission"
    assert time.positions == expected


@pytest.mark.parametrize("framework", ["pytorch", "jax"])
def test_an_interruption_changes_nothing(tmp_path, monkeypatch, framework):
    expected = [0, 1, 2, 3, 5, 6, 7, 8]
    whole, flags = tmp_path / "whole", _flags(tmp_path, framework, "time")
    with monkeypatch.context() as patch:
        time = Clock(patch, 125)
        assert run.main(_flags(whole, framework, "time")) == 0
    assert time.positions == expected
    with monkeypatch.context() as patch:
        time = Clock(patch, 125)
        update = loop._Run.update

        def interrupted(self, *rngs):
            if self.step == 5:
                raise KeyboardInterrupt
            update(self, *rngs)

        patch.setattr(loop._Run, "update", interrupted)
        assert run.main(flags) == 130
    assert time.positions == expected[:5]
    time = Clock(monkeypatch, 125)  # starts anew, as in a new process
    assert run.main([*flags, "--resume_last_run"]) == 0
    assert time.positions == expected[4:]  # from the last checkpoint, after step 4
    trial = f"e/bible_lm_{framework}/trial_1"
    assert metrics(tmp_path / trial) == metrics(whole / trial)
