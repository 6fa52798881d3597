"""The runner's files, columns, rules and flags."""

from __future__ import annotations

import io
import itertools
import json
import textwrap
import time

import pytest

from tests.workloads.helpers import NADAMW, arguments, metrics, table
from workloads import registry, run
from workloads.bible_lm.task import BibleLmTask
from workloads.runner.progress import Progress
from workloads.runner.pytorch import PyTorchBackend

TRIAL = "e/bible_lm_pytorch/trial_1"
OFFICIAL_COLUMNS = [
    "accumulated_eval_time",
    "accumulated_logging_time",
    "accumulated_submission_time",
    "global_step",
    "preemption_count",
    "score",
    "test/loss",
    "test/num_examples",
    "total_duration",
    "train/loss",
    "validation/loss",
    "validation/num_examples",
]


def _submission(tmp_path, name, body):
    """A submission that is NadamW but for what `body` defines."""
    path = tmp_path / f"{name}.py"
    path.write_text(
        "from submissions.nadamw.pytorch.submission import *\n"
        "from submissions.nadamw.pytorch import submission as nadamw\n" + textwrap.dedent(body)
    )
    return path


def test_files_and_columns(small, tmp_path, capsys):
    assert run.main(arguments(tmp_path, max_global_steps=3)) == 0
    trial = tmp_path / TRIAL
    visible = {path.name for path in trial.iterdir() if not path.name.startswith(".")}
    assert visible == {
        "checkpoint_2",
        "checkpoint_3",
        "eval_measurements.csv",
        "flags_0.json",
        "measurements.csv",
        "meta_data_0.json",
        "outcome.json",
    }
    rows = table(trial / "eval_measurements.csv")
    assert set(OFFICIAL_COLUMNS) <= set(rows[0])
    assert list(rows[0]) == sorted(rows[0])
    assert [row["global_step"] for row in rows] == ["1", "2", "3"]
    assert all(row["score"] == row["accumulated_submission_time"] for row in rows)
    # Step 0's own row of the submission, then the evaluations.
    all_rows = table(trial / "measurements.csv")
    assert [row["global_step"] for row in all_rows] == ["0", "1", "2", "3"]
    assert float(all_rows[0]["loss"]) > 3
    assert all_rows[0]["validation/loss"] == ""
    assert "not reached in 3 steps" in capsys.readouterr().out


def test_meta_data(small, tmp_path):
    assert run.main(arguments(tmp_path, max_global_steps=1)) == 0
    content = json.loads((tmp_path / TRIAL / "meta_data_0.json").read_text())
    workload = registry.load("bible_lm", "pytorch")
    for name in ("step_hint", "max_allowed_runtime_sec", "validation_target_value", "eval_period_steps"):
        assert content[f"workload.{name}"] == getattr(workload, name)
    assert content["workload.target_metric_name"] == "loss"
    assert content["rng_seed"] == 3
    assert {"python_version", "torch_version", "numpy_version", "global_batch_size"} <= set(content)
    flags = json.loads((tmp_path / TRIAL / "flags_0.json").read_text())
    assert flags["workload"] == "bible_lm"
    assert flags["max_global_steps"] == 1


def test_same_seed_same_metrics_other_seed_other_metrics(small, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert run.main(arguments(tmp_path / name, rng_seed=seed, max_global_steps=2)) == 0
    a, b, c = (metrics(tmp_path / name / TRIAL) for name in "abc")
    assert a == b != c


def test_trials_of_a_search_space(small, tmp_path):
    space = tmp_path / "space.json"
    space.write_text(json.dumps({"learning_rate": {"min": 1e-3, "max": 1e-2, "scaling": "log"}}))
    flags = arguments(
        tmp_path,
        tuning_ruleset=None,
        tuning_search_space=space,
        num_tuning_trials=3,
        hparam_start_index=1,
        max_global_steps=1,
    )
    assert run.main(flags) == 0
    folder = tmp_path / "e/bible_lm_pytorch"
    assert sorted(path.name for path in folder.iterdir()) == ["trial_2", "trial_3"]
    points = [json.loads((folder / name / "hparams.json").read_text()) for name in ("trial_2", "trial_3")]
    assert points[0]["learning_rate"] != points[1]["learning_rate"]
    # One seed for all trials, so they differ by their hyperparameters alone.
    seeds = [
        json.loads((folder / name / "meta_data_0.json").read_text())["rng_seed"] for name in ("trial_2", "trial_3")
    ]
    assert seeds == [3, 3]


def test_submission_can_end_training(small, tmp_path):
    path = _submission(
        tmp_path,
        "stops",
        """
        from submissions.common.spec import TrainingCompleteError
        def update_params(**arguments):
            if arguments["global_step"] == 2:
                raise TrainingCompleteError
            return nadamw.update_params(**arguments)
        """,
    )
    assert run.main(arguments(tmp_path, submission_path=path, max_global_steps=9)) == 0
    outcome = json.loads((tmp_path / TRIAL / "outcome.json").read_text())
    assert (outcome["reason"], outcome["global_step"]) == ("submission", 3)
    # The final, free evaluation.
    assert [row["global_step"] for row in metrics(tmp_path / TRIAL)] == ["1", "2", "3"]


def test_training_ends_with_the_schedule_where_the_point_says_so(small, tmp_path):
    steps = registry.load("bible_lm", "pytorch").step_hint
    points = tmp_path / "points.json"
    points.write_text(json.dumps([{"horizon_factor": 4 / steps, "ends_with_schedule": True}]))
    flags = arguments(tmp_path, tuning_ruleset=None, tuning_search_space=points, max_global_steps=9)
    assert run.main(flags) == 0
    outcome = json.loads((tmp_path / TRIAL / "outcome.json").read_text())
    # The call that ends training counts as a step, though it makes none.
    assert (outcome["reason"], outcome["global_step"]) == ("submission", 5)
    rows = metrics(tmp_path / TRIAL)
    assert rows[-1]["validation/loss"] == rows[-2]["validation/loss"]


def test_a_schedule_by_time_ends_with_the_budget(small, tmp_path, monkeypatch):
    monkeypatch.setattr(BibleLmTask, "max_allowed_runtime_sec", 1e6)
    points = tmp_path / "points.json"
    for budget_factor, steps in ((1e-9, 2), (1.0, 6)):  # used up by the first step; hardly begun
        point = {"schedule_clock": "time", "ends_with_schedule": True, "budget_factor": budget_factor}
        points.write_text(json.dumps([point]))
        flags = arguments(
            tmp_path / str(steps), tuning_ruleset=None, tuning_search_space=points, max_global_steps=6
        )
        assert run.main(flags) == 0
        assert json.loads((tmp_path / str(steps) / TRIAL / "outcome.json").read_text())["global_step"] == steps


def test_times_are_of_the_clock_that_was_asked_for(small, tmp_path, capsys, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(time, "process_time", lambda: float(next(ticks)))  # a CPU second between any two looks
    for clock in ("wall", "cpu"):
        assert run.main(arguments(tmp_path / clock, max_global_steps=6, clock=clock)) == 0
    seconds = {
        clock: json.loads((tmp_path / clock / TRIAL / "outcome.json").read_text())["accumulated_submission_time"]
        for clock in ("wall", "cpu")
    }
    assert seconds["cpu"] == round(seconds["cpu"]) >= 6
    assert seconds["wall"] != round(seconds["wall"])
    assert run.main(arguments(tmp_path / "cpu", max_global_steps=6, clock="wall", resume_last_run=True)) == 2
    assert "--clock" in capsys.readouterr().err
    monkeypatch.setattr(PyTorchBackend, "is_one_process_on_cpu", lambda self: False)
    assert run.main(arguments(tmp_path / "gpu", max_global_steps=6, clock="cpu")) == 2
    assert "--clock=cpu" in capsys.readouterr().err


def test_stop_at_target(small, tmp_path, monkeypatch):
    monkeypatch.setattr(BibleLmTask, "validation_target_value", 100.0)
    assert run.main(arguments(tmp_path / "stop")) == 0
    assert run.main([*arguments(tmp_path / "go"), "--nostop_at_target"]) == 0
    stop, go = (json.loads((tmp_path / name / TRIAL / "outcome.json").read_text()) for name in ("stop", "go"))
    assert (stop["reason"], stop["global_step"], stop["steps_to_target"]) == ("target", 1, 1)
    assert (go["reason"], go["global_step"], go["steps_to_target"]) == ("step limit", 4, 1)


@pytest.mark.parametrize(("ruleset", "reached"), [("external", False), ("self", True)])
def test_time_budget(small, tmp_path, monkeypatch, ruleset, reached):
    # A clock that the submission moves: one second for each step.
    from workloads.runner.pytorch import PyTorchBackend

    clock = [0.0]
    monkeypatch.setattr(PyTorchBackend, "now", lambda self, *results: clock[0])
    monkeypatch.setattr(PyTorchBackend, "seed_step", lambda self, rng: clock.__setitem__(0, clock[0] + 1.0))
    monkeypatch.setattr(BibleLmTask, "max_allowed_runtime_sec", 7)
    space = tmp_path / "space.json"
    space.write_text('[{"learning_rate": 0.01}]')
    extra = {"tuning_search_space": space} if ruleset == "external" else {}
    assert run.main(arguments(tmp_path, tuning_ruleset=ruleset, max_global_steps=6, **extra)) == 0
    rows = table(tmp_path / TRIAL / "eval_measurements.csv")
    # Timed: a second for each step and one for each prepare_for_eval; the evaluations' own seconds are not.
    expected = [(1, 2.0), (2, 4.0), (4, 7.0), (6, 10.0)]
    allowed = [pair for pair in expected if pair[1] < 7 * (1.5 if reached else 1.0)]
    assert [(int(row["global_step"]), float(row["score"])) for row in rows] == allowed
    outcome = json.loads((tmp_path / TRIAL / "outcome.json").read_text())
    assert outcome["reason"] == ("step limit" if reached else "time budget")


def test_train_state_is_given_read_only_and_evaluations_are_passed(small, tmp_path):
    path = _submission(
        tmp_path,
        "curious",
        """
        def update_params(**arguments):
            state, results, step = (arguments[name] for name in ("train_state", "eval_results", "global_step"))
            assert [at for at, _ in results] == [at for at in (1, 2, 4) if at <= step]
            assert not state["training_complete"]
            try:
                state["training_complete"] = True
            except TypeError:
                return nadamw.update_params(**arguments)
        def update_params_(train_state=None): ...
        """,
    )
    text = path.read_text().replace(
        "def update_params(**arguments):", "def update_params(train_state, **arguments):"
    )
    path.write_text(
        text.replace("    state, results", "    arguments['train_state'] = train_state\n    state, results", 1)
    )
    assert run.main(arguments(tmp_path, submission_path=path, max_global_steps=5)) == 0


def test_earlier_run_of_other_settings_is_not_taken_for_this_one(small, tmp_path, capsys):
    space = tmp_path / "space.json"
    space.write_text('[{"learning_rate": 0.01}]')
    external = {"tuning_ruleset": None, "tuning_search_space": space}
    flags = [*arguments(tmp_path, max_global_steps=1, **external), "--resume_last_run"]
    assert run.main(flags) == 0
    assert run.main(flags) == 0
    capsys.readouterr()
    assert run.main([*flags, "--max_global_steps=2"]) == 2
    assert "finished with --max_global_steps=1, not 2" in capsys.readouterr().err
    space.write_text('[{"learning_rate": 0.02}]')
    assert run.main(flags) == 2
    assert "other hyperparameters" in capsys.readouterr().err


def test_overwrite_starts_anew(small, tmp_path):
    assert run.main(arguments(tmp_path, max_global_steps=2)) == 0
    assert run.main([*arguments(tmp_path, max_global_steps=1), "--overwrite"]) == 0
    assert len(metrics(tmp_path / TRIAL)) == 1


def test_without_checkpoints(small, tmp_path):
    assert run.main([*arguments(tmp_path, max_global_steps=2), "--nosave_checkpoints"]) == 0
    assert not list((tmp_path / TRIAL).glob("checkpoint_*"))
    assert len(metrics(tmp_path / TRIAL)) == 2


def test_help_names_the_flags(capsys):
    with pytest.raises(SystemExit) as caught:
        run.main(["--help"])
    assert caught.value.code == 0
    assert "--tuning_search_space" in capsys.readouterr().out.replace("--[no]", "--")


class _Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [io.StringIO(), _Terminal()])
def test_progress_reads_the_loss_only_when_it_shows_it(stream, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("workloads.runner.progress.time.monotonic", lambda: clock[0])
    reads = []
    progress = Progress("x", 100, 0, lambda: reads.append(1) or 0.25, stream)
    progress.metric = "validation/loss 1.5"
    for step in range(1, 21):
        clock[0] += 1.0
        progress.update(step)
    period = 1 if stream.isatty() else 15
    assert len(reads) == 20 // period
    text = stream.getvalue()
    first = "x: step 15/100  loss 0.2500  1.0 steps/s  85 s left  validation/loss 1.5"
    assert first in text
    assert ("\r" in text) == stream.isatty()
    assert text.count("\n") == (0 if stream.isatty() else 1)


def test_nadamw_path_is_right():
    assert NADAMW.endswith("submissions/nadamw/pytorch/submission.py")
