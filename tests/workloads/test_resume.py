"""A run killed at any moment resumes and ends as if nothing had happened."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest

from tests.workloads.helpers import CHECKOUT, arguments, environment, metrics, table
from workloads import run
from workloads.runner import checkpoints, experiment

# Renames of a run with evaluations after steps 1, 2, 4, 5: both tables (1, 2), hparams, meta data and flags
# (3-5), checkpoint and both tables at each evaluation (6-8, 9-11, 12-14, 15-17), tables (18, 19), outcome (20).
MOMENTS = [
    "before:1",
    "after:4",
    "before:6",
    "after:6",
    "after:7",
    "after:8",
    "before:9",
    "step:4",
    "after:15",
    "before:20",
]
MOMENTS_OF_KFAC = ["after:8", "step:4"]
TRIAL = "e/bible_lm_pytorch/trial_1"


@pytest.fixture(scope="module")
def of_submissions(tmp_path_factory):
    """The folder with the runs of each submission; all in one program, which imports torch once."""
    folder = tmp_path_factory.mktemp("runs")
    moments = {"nadamw": [*MOMENTS, f"share:{random.random()}"], "kfac_reduce": MOMENTS_OF_KFAC}
    command = [sys.executable, "-m", "tests.workloads.interrupt", str(folder), json.dumps(moments)]
    finished = subprocess.run(command, cwd=CHECKOUT, env=environment(), capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return folder


@pytest.fixture
def runs(of_submissions):
    return of_submissions / "nadamw"


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_run_equals_an_uninterrupted_one(runs, moment):
    _assert_same(runs / "whole" / TRIAL, runs / moment / TRIAL)


def test_state_of_kfac_resumes_too(of_submissions):
    folder = of_submissions / "kfac_reduce"
    for moment in MOMENTS_OF_KFAC:
        _assert_same(folder / "whole" / TRIAL, folder / moment / TRIAL)


def _assert_same(whole, killed):
    assert [row["global_step"] for row in metrics(whole)] == ["1", "2", "4", "5"]
    assert metrics(killed) == metrics(whole)
    steps = [row["global_step"] for row in table(killed / "measurements.csv")]
    assert steps == [row["global_step"] for row in table(whole / "measurements.csv")]
    ends = [json.loads((trial / "outcome.json").read_text()) for trial in (whole, killed)]
    assert ends[0]["final_metric"] == ends[1]["final_metric"]
    assert not list(killed.glob(".*.tmp"))


def test_interruptions_are_counted(runs):
    whole, killed = (
        json.loads((runs / name / TRIAL / "outcome.json").read_text()) for name in ("whole", "after:8")
    )
    assert (whole["preemption_count"], killed["preemption_count"]) == (0, 1)
    counts = [row["preemption_count"] for row in table(runs / "after:8" / TRIAL / "eval_measurements.csv")]
    assert counts == ["0", "1", "1", "1"]
    assert (runs / "after:8" / TRIAL / "meta_data_1.json").exists()


def test_times_go_on_where_they_were(runs):
    rows = table(runs / "after:8" / TRIAL / "eval_measurements.csv")
    for name in ("accumulated_submission_time", "accumulated_eval_time", "total_duration"):
        values = [float(row[name]) for row in rows]
        assert values == sorted(values)
        assert values[0] > 0


def test_kill_at_a_random_time(runs):
    (killed,) = runs.glob("share:*")
    _assert_same(runs / "whole" / TRIAL, killed / TRIAL)


def test_finished_trial_is_kept(small, tmp_path, capsys):
    assert run.main(arguments(tmp_path, max_global_steps=2)) == 0
    before = (tmp_path / TRIAL / "eval_measurements.csv").stat().st_mtime_ns
    first = capsys.readouterr().out
    assert run.main([*arguments(tmp_path, max_global_steps=2), "--resume_last_run"]) == 0
    assert (tmp_path / TRIAL / "eval_measurements.csv").stat().st_mtime_ns == before
    assert capsys.readouterr().out == first


def test_damaged_checkpoint_falls_back_to_the_one_before(tmp_path):
    for step, content in ((1, b"one"), (2, b"two"), (10, b"torn")):
        checkpoints.save(tmp_path, step, content, keep_all=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_10", "checkpoint_2"]

    def unpack(content):
        if content == b"torn":
            raise EOFError
        return {"content": content}

    assert checkpoints.restore(tmp_path, unpack) == {"content": b"two"}
    assert checkpoints.restore(tmp_path / "none", unpack) is None


def test_resuming_with_another_seed_is_refused(small, tmp_path, capsys):
    assert run.main(arguments(tmp_path, max_global_steps=1)) == 0
    (tmp_path / TRIAL / "outcome.json").unlink()
    assert run.main([*arguments(tmp_path, rng_seed=4), "--resume_last_run"]) == 2
    assert "--rng_seed=3" in capsys.readouterr().err


def test_two_processes_cannot_train_one_trial(small, tmp_path, capsys):
    (tmp_path / TRIAL).mkdir(parents=True)
    with experiment.lock(tmp_path / TRIAL):
        assert run.main([*arguments(tmp_path), "--resume_last_run"]) == 2
    assert "Another process" in capsys.readouterr().err
