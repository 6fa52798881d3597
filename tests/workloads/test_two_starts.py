"""Two starts of one experiment, one after the other or at once: nothing that runs or is finished is lost."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import shutil
import time

import pytest

from tests.workloads.helpers import arguments, metrics, start
from workloads import run, study
from workloads.runner import experiment

EXPERIMENT = "e/bible_lm_pytorch"


@pytest.fixture
def space(tmp_path):
    path = tmp_path / "space.json"
    path.write_text(json.dumps([{"learning_rate": rate} for rate in (0.01, 0.02)]))
    return path


def _slice(folder, space, index, *more, **changes):
    """The flags of a run of one of two points."""
    flags = arguments(
        folder,
        tuning_ruleset=None,
        tuning_search_space=space,
        num_tuning_trials=2,
        hparam_start_index=index,
        hparam_end_index=index + 1,
        max_global_steps=1,
        **changes,
    )
    return [*flags, *more]


@pytest.mark.parametrize("busy", ["trial_1", "trial_2"])
def test_overwrite_spares_an_experiment_at_work(small, tmp_path, capsys, busy):
    assert run.main(arguments(tmp_path, max_global_steps=1)) == 0
    before = metrics(tmp_path / EXPERIMENT / "trial_1")
    capsys.readouterr()
    with experiment.lock(tmp_path / EXPERIMENT / busy):
        assert run.main([*arguments(tmp_path, max_global_steps=1), "--overwrite"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"Another process is at work on {tmp_path / EXPERIMENT / busy}" in line
    assert metrics(tmp_path / EXPERIMENT / "trial_1") == before
    assert run.main([*arguments(tmp_path, rng_seed=4, max_global_steps=1), "--overwrite"]) == 0
    assert metrics(tmp_path / EXPERIMENT / "trial_1") != before
    # Nothing else is left, in sight or hidden.
    assert [path.name for path in (tmp_path / EXPERIMENT).iterdir()] == ["trial_1"]
    assert [path.name for path in (tmp_path / "e").iterdir()] == ["bible_lm_pytorch"]


def test_overwrite_of_a_running_process(tmp_path, capsys):
    first = start(arguments(tmp_path, max_global_steps=400))
    trial = tmp_path / EXPERIMENT / "trial_1"
    try:
        while not (trial / "eval_measurements.csv").exists():
            assert first.poll() is None
            time.sleep(0.1)
        assert run.main([*arguments(tmp_path, rng_seed=4), "--overwrite"]) == 2
        assert "Another process is at work" in capsys.readouterr().err
        assert first.poll() is None
        assert json.loads((trial / "meta_data_0.json").read_text())["rng_seed"] == 3
    finally:
        first.kill()
        first.communicate()


def test_slices_of_a_sweep_fill_one_experiment(small, tmp_path, space):
    """In any order, with and without flags, also where another slice is at work; --overwrite replaces the slice."""
    folder = tmp_path / EXPERIMENT
    with experiment.lock(folder / "trial_2"):
        assert run.main(_slice(tmp_path, space, 0)) == 0
        assert run.main(_slice(tmp_path, space, 1)) == 2
    before = metrics(folder / "trial_1")
    assert run.main(_slice(tmp_path, space, 1, "--resume_last_run")) == 0
    assert run.main(_slice(tmp_path, space, 1, "--overwrite", rng_seed=4)) == 0
    assert metrics(folder / "trial_1") == before
    assert json.loads((folder / "trial_2/meta_data_0.json").read_text())["rng_seed"] == 4
    assert run.main(_slice(tmp_path, space, 0)) == 2  # it is there already


def test_a_trial_that_another_process_finished_meanwhile_is_kept(small, tmp_path, monkeypatch, capsys):
    other = tmp_path / "other"
    assert run.main(arguments(other, max_global_steps=1)) == 0
    printed = capsys.readouterr().out
    lock = experiment.lock

    @contextlib.contextmanager
    def late(trial):
        with lock(trial):
            shutil.copytree(other / EXPERIMENT / "trial_1", trial, dirs_exist_ok=True)
            yield

    monkeypatch.setattr(experiment, "lock", late)
    monkeypatch.setattr(run.loop, "run", lambda trial: pytest.fail("it is finished"))
    assert run.main(arguments(tmp_path, max_global_steps=1)) == 0
    assert capsys.readouterr().out == printed.replace(str(other), str(tmp_path))


def test_a_file_system_without_locks(small, tmp_path, monkeypatch):
    def none(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    assert run.main(arguments(tmp_path, max_global_steps=1)) == 0
    assert run.main([*arguments(tmp_path, max_global_steps=1), "--overwrite"]) == 0


@pytest.mark.parametrize("who", ["a run", "another study"])
def test_study_leaves_a_job_at_work_alone(tmp_path, capsys, who):
    name = "nadamw/study_1/bible_lm_pytorch/trial_1"
    flags = ["--submissions=nadamw", "--workloads=bible_lm", f"--experiment_dir={tmp_path}", "--max_global_steps=1"]
    log = tmp_path / ".logs" / f"{name.replace('/', '.')}.log"
    log.parent.mkdir()
    log.write_text("its log\n")
    with experiment.lock(tmp_path / name) if who == "a run" else open(log, "ab") as held:
        assert held is None or experiment.take(held)
        assert study.main(flags) == 1
    assert f"{name}: FAILED, Another process is at work on" in capsys.readouterr().err
    assert log.read_text() == "its log\n"
