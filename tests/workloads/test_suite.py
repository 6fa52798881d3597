"""Suites: everyone tuned with the same means, the best points raced; interruptions, bad input, archives."""

from __future__ import annotations

import dataclasses
import json
import lzma
import os
import signal
import subprocess
import sys
import threading

import pytest

import scoring
from tests.workloads.fake_training import Trainer
from workloads import archive, registry, study
from workloads.runner import jobs, tuning
from workloads.studies import choice, facts, points, suite, suite_run

# By steps: points 2 (10), 4 (20), 1 (30), 3 (never).
POINTS = [{"learning_rate": value} for value in (0.03, 0.1, 0.001, 0.05)]
REPORT = suite_run.report
SMALL = suite.Suite(("nadamw", "kfac_expand"), points=4, raced=2, raced_on_variants=1, studies=2)


@pytest.fixture
def trainer(monkeypatch):
    found = Trainer()
    monkeypatch.setattr(jobs, "_start", found)
    monkeypatch.setattr(suite_run, "report", lambda *_: True)
    monkeypatch.setitem(suite.SUITES, "embedded", SMALL)
    return found


@pytest.fixture
def space(tmp_path):
    path = tmp_path / "space.json"
    path.write_text(json.dumps(POINTS))
    return path


def _main(folder, space, *flags):
    given = ["--suite=embedded", "--workloads=mnist_vit", f"--experiment_dir={folder}"]
    return study.main([*given, f"--tuning_search_space={space}", *flags])


def _hparams(trial):
    return json.loads((trial / "hparams.json").read_text())


def test_the_best_points_of_each_are_the_trials_of_its_studies(trainer, space, tmp_path, capsys):
    assert _main(tmp_path / "x", space) == 0
    for submission in SMALL.submissions:
        record = json.loads((tmp_path / f"x/chosen/mnist_vit/{submission}.json").read_text())
        assert record["chosen"] == [2, 4]
        assert [one["trial"] for one in record["ranking"]] == [2, 4, 1, 3]
        assert record["seed"] == suite.TUNING_SEED
        for number in (1, 2):
            folder = tmp_path / f"x/race/{submission}/study_{number}/mnist_vit_pytorch"
            assert [_hparams(folder / f"trial_{k}") for k in (1, 2)] == [POINTS[1], POINTS[3]]
            meta = json.loads((folder / "trial_1/meta_data_0.json").read_text())
            assert meta["rng_seed"] == study.study_seed(number)
            assert meta["rng_seed"] != suite.TUNING_SEED
    said = capsys.readouterr().out
    assert "16 trials to run, 2 at a time: about" in said
    assert "1 of 2 trials" not in said.replace("2 of 2 trials reached", "")


RANGES = {
    "learning_rate": {"min": 0.02, "max": 0.2, "scaling": "log"},
    "horizon_factor": {"feasible_points": [0.35, 0.5, 0.75, 1.0]},
}


def test_further_points_go_on_with_the_sequence_at_shorter_horizons(tmp_path):
    path = tmp_path / "space.json"
    path.write_text(json.dumps(RANGES))
    further = points.Further(4, (0.25, 0.17))
    found = points.of(path, 8, further)
    plain = tuning.draw(RANGES, 12)
    assert found[:8] == plain[:8] == points.of(path, 8, None)
    assert [one["learning_rate"] for one in found] == [one["learning_rate"] for one in plain]
    assert {one["horizon_factor"] for one in found[8:]} == {0.25, 0.17}
    assert points.space_of(path, further)["horizon_factor"]["feasible_points"] == [0.17, 0.25, 0.35, 0.5, 0.75, 1.0]
    assert points.space_of(path, None) == RANGES


@pytest.mark.parametrize(
    "space",
    [
        [{"learning_rate": 0.1}] * 7,
        {"learning_rate": RANGES["learning_rate"]},
        {**RANGES, "horizon_factor": {"feasible_points": [1.0]}},
    ],
)
def test_where_no_horizon_is_chosen_the_space_goes_on_as_it_is(tmp_path, space):
    path = tmp_path / "space.json"
    path.write_text(json.dumps(space))
    further = points.Further(2, (0.25,))
    assert points.of(path, 3, further) == (space[:5] if isinstance(space, list) else tuning.draw(space, 5))
    assert points.space_of(path, further) == space


def test_a_suite_tuned_before_there_were_further_points_tunes_these_alone(trainer, tmp_path, monkeypatch, capsys):
    path = tmp_path / "ranges.json"
    path.write_text(json.dumps(RANGES))
    flags = ["--submissions=nadamw", "--stages=tuning"]
    assert _main(tmp_path / "x", path, *flags) == 0
    assert trainer.started == ["mnist_vit pytorch: tuning of nadamw, points 1 to 4"]
    more = dataclasses.replace(SMALL, further=points.Further(2, (0.25,)))
    monkeypatch.setitem(suite.SUITES, "embedded", more)
    assert _main(tmp_path / "x", path, *flags) == 0
    assert trainer.started[1:] == ["mnist_vit pytorch: tuning of nadamw, points 5 to 6"]
    assert "6 points of its space" in capsys.readouterr().out
    assert _main(tmp_path / "x", path, "--submissions=nadamw") == 0
    record = json.loads((tmp_path / "x/chosen/mnist_vit/nadamw.json").read_text())
    assert len(record["ranking"]) == 6
    assert [one["point"]["horizon_factor"] for one in record["ranking"] if one["trial"] > 4] == [0.25, 0.25]
    notes = json.loads((tmp_path / "x/suite.json").read_text())
    assert (notes["points_tuned"], notes["points_at_shorter_horizons"]) == (4, 2)


def test_interrupted_anywhere_it_goes_on(trainer, space, tmp_path):
    for stop in range(8):
        trainer.interrupt_at = stop
        assert _main(tmp_path / "x", space, "--jobs=1") == 130
    trainer.interrupt_at = None
    assert _main(tmp_path / "x", space, "--jobs=1") == 0
    assert len(trainer.started) == len(set(trainer.started)) == 8  # two of tuning, four of the race, two of paces
    assert _main(tmp_path / "x", space) == 0
    assert len(trainer.started) == 8


def test_what_another_process_has_at_work_is_waited_for(trainer, space, tmp_path):
    first = "mnist_vit pytorch: tuning of nadamw, points 1 to 4"
    trainer.busy[first] = 3
    assert _main(tmp_path / "x", space) == 0
    assert len(trainer.started) == 8
    assert trainer.started.index(first) > trainer.started.index(
        "mnist_vit pytorch: tuning of kfac_expand, points 1 to 4"
    )


def test_report_and_leaderboards(trainer, space, tmp_path):
    assert _main(tmp_path / "x", space, "--stages=tuning,race") == 0
    assert REPORT(tmp_path / "x/race", tmp_path / "x", ["pytorch", "jax"], 2)
    for name, file in (
        ("report", "report.html"),
        ("leaderboard_steps", "ranking.csv"),
        ("leaderboard_time", "ranking.csv"),
    ):
        assert (tmp_path / f"x/{name}_pytorch" / file).exists()
        assert not (tmp_path / f"x/{name}_jax").exists()


def test_termination_ends_the_jobs(tmp_path, monkeypatch):
    log = tmp_path / "log"
    job = jobs.Job("a", (tmp_path / "a",), (sys.executable, "-c", "import time; time.sleep(60)"), log, {})
    ended = []
    wait = subprocess.Popen.wait
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    monkeypatch.setattr(subprocess.Popen, "wait", lambda process: ended.append(wait(process)))
    with pytest.raises(KeyboardInterrupt):
        jobs.run([job], 1)
    assert ended == [-signal.SIGTERM]


def test_what_failed_takes_only_its_own_with_it(trainer, space, tmp_path, capsys):
    trainer.failing = "tuning of nadamw"
    assert _main(tmp_path / "x", space) == 1
    errors = capsys.readouterr().err
    assert "mnist_vit pytorch: tuning of nadamw, points 1 to 4: FAILED, the reason (see" in errors
    assert "nadamw in study 1, trial 1 to 2: FAILED, it needs 'mnist_vit pytorch: tuning of nadamw" in errors
    assert not (tmp_path / "x/race/nadamw").exists()
    assert (tmp_path / "x/race/kfac_expand/study_2/mnist_vit_pytorch/trial_2/outcome.json").exists()
    trainer.failing = "nothing"
    assert _main(tmp_path / "x", space) == 0


def test_jax_and_held_out_variants_race_what_was_found_in_pytorch_on_the_base(
    trainer, space, tmp_path, monkeypatch
):
    task = registry.WORKLOADS["mnist_vit"].task()
    monkeypatch.setattr(task, "VARIANTS", {"thin": {"width": 32}})
    entry = registry.Entry("mnist_vit_thin", "mnist_vit", ("pytorch", "jax"))
    monkeypatch.setitem(registry.WORKLOADS, "mnist_vit_thin", entry)
    monkeypatch.setattr(facts, "validation_target", lambda name: 0.9)
    monkeypatch.setattr(registry, "load", lambda *_: None)
    flags = [
        "--workloads=mnist_vit_thin,mnist_vit",
        "--framework=pytorch,jax",
        "--submissions=nadamw",
        "--studies=1",
    ]
    assert _main(tmp_path / "x", space, *flags) == 0
    assert [name for name in trainer.started if "tuning" in name] == [
        "mnist_vit pytorch: tuning of nadamw, points 1 to 4"
    ]
    raced = [name for name in trainer.started if "study" in name]
    assert [name.split(":")[0] for name in raced] == [
        "mnist_vit pytorch",
        "mnist_vit_thin pytorch",
        *["mnist_vit jax"] * 2,
        "mnist_vit_thin jax",
    ]
    study = tmp_path / "x/race/nadamw/study_1"
    assert _hparams(study / "mnist_vit_jax/trial_2") == POINTS[3]
    best = _hparams(study / "mnist_vit_pytorch/trial_1")
    for name in ("mnist_vit_thin_pytorch", "mnist_vit_thin_jax"):
        assert _hparams(study / f"{name}/trial_1") == best
        assert not (study / f"{name}/trial_2").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--suite=official"], "Unknown suite 'official'. Known: embedded, shorter_horizons."),
        (["--submissions=adam"], "there is no submission 'adam' in pytorch; known: "),
        (["--workloads=mnist"], "Unknown workload 'mnist'. Known: "),
        (["--framework=tf"], "Unknown framework 'tf'. Known: pytorch, jax."),
        (["--stages=tune"], "Unknown stage 'tune'. Known: tuning, race, pace, report."),
        (["--num_studies=2"], "--num_studies does not go with --suite"),
        (["--stages=race"], None),
        (["--suite=", "--submissions=nadamw", "--studies=2"], "--studies is for --suite"),
    ],
)
def test_bad_input_is_one_line(trainer, space, tmp_path, capsys, flags, message):
    code = _main(tmp_path / "x", space, *flags)
    errors = capsys.readouterr().err
    assert trainer.started == []
    if message is None:  # known only when the job is due
        assert code == 1
        assert "is not tuned" in errors or "lacks a finished trial_1; run the tuning first" in errors
    else:
        assert code == 2
        assert message in errors
        assert errors.count("\n") == 1


def test_a_submission_without_a_space_is_told_where_to_put_it(trainer, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(suite, "SPACES", suite.CHECKOUT / "tuning_search_spaces" / "nowhere")
    assert study.main(["--suite=embedded", "--workloads=mnist_vit", f"--experiment_dir={tmp_path / 'x'}"]) == 2
    assert "write tuning_search_spaces/nowhere/nadamw.json, or give a file as" in capsys.readouterr().err


def test_what_ran_up_to_another_target_or_at_other_points_is_not_mixed_in(
    trainer, space, tmp_path, capsys, monkeypatch
):
    assert _main(tmp_path / "x", space) == 0
    target = facts.validation_target("mnist_vit")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(facts, "validation_target", lambda name: 0.5)
        assert _main(tmp_path / "x", space) == 2
        assert f"ran up to the target {target}, but that of mnist_vit is 0.5 now" in capsys.readouterr().err
    space.write_text(json.dumps([{"learning_rate": 0.2}, *POINTS[1:]]))
    assert _main(tmp_path / "x", space) == 2
    assert "has other hyperparameters than its search space" in capsys.readouterr().err


def test_ranking_is_by_steps_then_by_metric():
    def tuned(trial, steps, metric):
        return choice.Tuned(trial, {}, {"steps_to_target": steps, "best_metric": metric})

    trials = [tuned(1, None, 0.5), tuned(2, 30, 0.2), tuned(3, None, None), tuned(4, 20, 0.9), tuned(5, 20, 0.8)]
    assert [one.trial for one in choice.ranking(trials, lower_is_better=False)] == [4, 5, 2, 1, 3]
    assert [one.trial for one in choice.ranking(trials, lower_is_better=True)] == [5, 4, 2, 1, 3]
    assert [one.trial for one in choice.ranking(trials, lower_is_better=True, by_steps=False)] == [2, 1, 5, 4, 3]


def test_edges():
    space = {
        "learning_rate": {"min": 1e-4, "max": 1e-1, "scaling": "log"},
        "weight_decay": {"min": 0.0, "max": 1.0, "scaling": "linear"},
        "horizon_factor": {"feasible_points": [1.0, 0.35, 0.5, 0.75]},
        "grad_clip": {"feasible_points": [None, 0.5]},
        "dropout_rate": {"feasible_points": [0.0]},
    }
    rest = {"grad_clip": 0.5, "dropout_rate": 0.0}
    middle = {"learning_rate": 1e-2, "weight_decay": 0.15, "horizon_factor": 0.5, **rest}
    assert choice.edges(middle, space) == []
    # Three decades: a tenth of them is a factor of 10 ** 0.3, nearly 2.
    corner = {"learning_rate": 1.9e-4, "weight_decay": 0.95, "horizon_factor": 1.0, **rest}
    assert choice.edges(corner, space) == ["learning_rate (low)", "weight_decay (high)", "horizon_factor (high)"]
    assert choice.edges({**middle, "learning_rate": 2.1e-4}, space) == []
    assert choice.edges(corner, [corner]) == []


def test_an_archive_scores_the_same_and_the_suite_goes_on_from_it(trainer, space, tmp_path, capsys):
    assert _main(tmp_path / "x", space, "--workloads=mnist_vit,bible_lm") == 0
    assert archive.main(["pack", str(tmp_path / "x"), str(tmp_path / "packed")]) == 0
    text = b"".join(lzma.decompress(path.read_bytes()) for path in (tmp_path / "packed").glob("*.xz")).decode()
    assert str(tmp_path) not in text
    assert str(jobs.CHECKOUT) not in text
    assert "Machine" not in text
    notes = (tmp_path / "packed/suite.json").read_text()
    assert str(tmp_path) not in notes
    command = "python -m workloads.study --experiment_dir=runs/x --suite=embedded --tuning_search_space=space.json"
    assert json.loads(notes)["commands"] == [f"{command} --workloads=mnist_vit,bible_lm"]
    assert "submissions/nadamw/pytorch/submission.py" in text
    # Of another suite's directory, what the archive has of other workloads stays.
    chosen = json.loads((tmp_path / "packed/chosen.json").read_text())
    (tmp_path / "packed/chosen.json").write_text(json.dumps({"other": {"nadamw": {}}, **chosen}))
    before = {**json.loads(notes), "commands": ["an earlier one"]}
    (tmp_path / "packed/suite.json").write_text(json.dumps(before))
    assert archive.main(["pack", str(tmp_path / "x"), str(tmp_path / "packed")]) == 0
    assert json.loads((tmp_path / "packed/chosen.json").read_text()) == {"other": {"nadamw": {}}, **chosen}
    commands = json.loads((tmp_path / "packed/suite.json").read_text())["commands"]
    assert commands == ["an earlier one", *json.loads(notes)["commands"]]
    assert archive.main(["unpack", str(tmp_path / "packed"), str(tmp_path / "y")]) == 0
    assert "36 trials unpacked" in capsys.readouterr().out
    boards = [
        scoring.leaderboard(scoring.read(tmp_path / name / "race"), workloads="present", cost=cost).ranking
        for cost in ("steps", "time")
        for name in ("x", "y")
    ]
    assert boards[0]["score"].to_dict() == boards[1]["score"].to_dict()
    assert boards[2]["score"].to_dict() == pytest.approx(boards[3]["score"].to_dict(), rel=1e-5)
    trainer.started.clear()
    assert _main(tmp_path / "y", space, "--workloads=mnist_vit,bible_lm") == 0
    assert trainer.started == []
    before, after = (json.loads((tmp_path / name / "chosen/mnist_vit/nadamw.json").read_text()) for name in "xy")
    assert before == after


def test_bad_archives_are_one_line(tmp_path, capsys):
    assert archive.main(["pack", str(tmp_path), str(tmp_path / "z")]) == 2
    assert archive.main(["unpack", str(tmp_path), str(tmp_path / "z")]) == 2
    (tmp_path / "race.json.xz").write_bytes(b"damaged")
    assert archive.main(["unpack", str(tmp_path), str(tmp_path / "z")]) == 2
    assert archive.main(["unpack", str(tmp_path / "nowhere"), str(tmp_path / "z")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 4
    assert "holds no finished trial" in errors[0]
    assert "holds no archive" in errors[1]
    assert "race.json.xz cannot be read: LZMAError" in errors[2]
    assert "There is no folder" in errors[3]
