"""`python -m benchmarks.experiments`: what is run, kept and shown."""

from __future__ import annotations

import json

import pytest

from benchmarks.experiments import __main__ as program
from benchmarks.experiments import page, records, runs
from benchmarks.experiments.experiment import SEEDS, TUNED_ON, Experiment, Variant
from benchmarks.experiments.notebook import EXPERIMENTS
from submissions import registry as submissions
from tests.workloads.helpers import shrink, start_here
from workloads import registry
from workloads.runner import jobs
from workloads.studies import suite

TOY = Experiment(
    "toy",
    "Two steps.",
    "nadamw",
    {"slow": Variant({"learning_rate": 1e-6}), "same": Variant(submission="adamw")},
    workloads=("bible_lm",),
    horizon=0.01,
    seeds=(3001,),
)


def result_of(run, loss, curve=(), pace=10.0):
    late = [*curve, (run.steps, loss)]
    return {
        **runs.identity(run),
        "loss": loss,
        "metric": loss,
        "steps_to_target": None,
        "ms_per_step": pace,
        "curve": late,
    }


def kept_of(one, losses, **more):
    """Results by variant -> losses over seeds, the same on every workload."""
    found = {}
    for (name, _, seed), run in runs.runs_of(one).items():
        result = result_of(run, losses[name][one.seeds.index(seed)], **more.get(name, {}))
        found[runs.key(result)] = result
    return found


def test_every_experiment_of_the_notebook_can_be_run():
    names = [one.name for one in EXPERIMENTS]
    assert len(set(names)) == len(names)
    for one in EXPERIMENTS:
        assert len(runs.runs_of(one)) == (1 + len(one.variants)) * len(one.workloads) * len(one.seeds)


def test_a_step_hint_that_changes_moves_no_kept_result(monkeypatch):
    """Horizons are those of the hint that experiments were planned with, and a result is known by its steps."""
    (base, *_) = runs.runs_of(TOY).values()
    before = runs.identity(base)
    hint = registry.WORKLOADS["bible_lm"].task().step_hint
    monkeypatch.setattr(registry.WORKLOADS["bible_lm"].task(), "step_hint", hint // 2)
    monkeypatch.setitem(runs.HINTS, "bible_lm", hint)
    (again, *_) = runs.runs_of(TOY).values()
    assert again.steps == base.steps
    assert again.hyperparameters["horizon_factor"] == 2 * base.hyperparameters["horizon_factor"]
    assert runs.key(runs.identity(again)) == runs.key(before)
    assert runs.key(before) != runs.key(before | {"steps": base.steps + 1})


def test_experiments_have_seeds_of_their_own_and_spare_what_is_held_out():
    assert not {suite.TUNING_SEED, 1001, 1002, 1003, 7001, 7002, 7003} & set(SEEDS)
    assert len(TUNED_ON) == 4
    assert set(TUNED_ON) < set(registry.BASES)
    # What is held out may stand in the notebook once, in the experiment that confirms.
    held_out = [one.name for one in EXPERIMENTS if not set(one.workloads) <= set(TUNED_ON)]
    assert len(held_out) <= 1


def test_differences_are_paired_by_seed():
    one = Experiment(
        "x", "", "nadamw", {"new": Variant({"beta2": 0.9})}, workloads=("bible_lm",), seeds=(3001, 3002)
    )
    kept = kept_of(one, {"base": [1.0, 2.0], "new": [0.9, 1.8]}, new={"curve": [(80, 1.5)], "pace": 12.0})
    found = page.compare(one, kept)["new", "bible_lm"]
    assert found.losses == pytest.approx((-0.1, -0.2))
    # As low as the base at its end: only there with the first seed, after 80 steps with the second.
    steps = next(iter(runs.runs_of(one).values())).steps
    assert found.shares == pytest.approx((1.0, 80 / steps))
    assert found.pace == pytest.approx(1.2)
    text = page.page([one], kept)
    assert "-0.1500 (-0.2000 to -0.1000)" in text
    assert "| 1.20 |" in text
    assert "4 runs are kept, 4 of them in the 1 experiments" in text


def test_another_submission_at_a_share_of_the_steps():
    other = Variant({"learning_rate": 0.1}, "kfac_expand", share=0.5, inherits=False)
    one = Experiment(
        "x", "", "nadamw", {"other": other}, base={"beta2": 0.9}, workloads=("bible_lm",), seeds=(3001,)
    )
    found = runs.runs_of(one)
    base, half = found["base", "bible_lm", 3001], found["other", "bible_lm", 3001]
    assert half.steps == base.steps // 2
    assert base.hyperparameters["beta2"] == 0.9
    assert half.hyperparameters["beta2"] == submissions.describe("kfac_expand", "pytorch").defaults["beta2"] != 0.9
    assert half.hyperparameters["learning_rate"] == 0.1
    kept = kept_of(one, {"base": [1.0], "other": [0.9]}, other={"curve": [(60, 1.5)]})
    assert page.compare(one, kept)["other", "bible_lm"].shares == (0.5,)  # of the base's steps
    assert "other: kfac_expand, learning_rate 0.1, 0.5 of the steps" in page.page([one], kept)


def test_a_run_that_diverged_is_said_and_an_experiment_without_runs_is_not_shown():
    one = Experiment("x", "", "nadamw", {"new": Variant({"beta2": 0.9})}, workloads=("bible_lm",), seeds=(3001,))
    assert "diverged" in page.page([one], kept_of(one, {"base": [1.0], "new": [None]}))
    assert "## x" not in page.page([one], {})


def test_a_part_of_the_runs_is_compared_as_far_as_it_goes():
    one = Experiment(
        "x", "", "nadamw", {"new": Variant({"beta2": 0.9})}, workloads=("bible_lm",), seeds=(3001, 3002)
    )
    kept = kept_of(one, {"base": [1.0, 2.0], "new": [0.9, 1.8]})
    lost = runs.key(runs.identity(runs.runs_of(one)["new", "bible_lm", 3002]))
    del kept[lost]
    assert page.compare(one, kept)["new", "bible_lm"].losses == pytest.approx((-0.1,))


def test_equal_runs_of_several_experiments_are_run_once():
    other = Experiment(
        "other", "", "nadamw", {"more": Variant({"beta2": 0.9})}, workloads=("bible_lm",), horizon=0.01
    )
    wanted = [*runs.runs_of(TOY).values(), *runs.runs_of(other).values()]
    assert len(set(wanted)) == len(wanted) - 1  # the base on the first seed


def test_runs_are_kept_and_not_repeated(tmp_path, monkeypatch, capsys):
    shrink(monkeypatch.setattr)
    monkeypatch.setattr(jobs, "_start", start_here)
    monkeypatch.setattr(program, "EXPERIMENTS", (TOY,))
    kept, document = tmp_path / "kept.jsonl", tmp_path / "page.md"

    def call(*arguments):
        flags = ["--experiment_dir", str(tmp_path / "runs"), "--results", str(kept), "--page", str(document)]
        monkeypatch.setattr("sys.argv", ["experiments", *arguments, *flags])
        return program.main()

    assert call("run", "toy", "--jobs", "2") == 0
    results = records.read(kept)
    assert len(results) == 3
    by_submission = {(one["submission"], one["point"].get("learning_rate")): one for one in results.values()}
    own = submissions.describe("nadamw", "pytorch").defaults
    base, slow = by_submission["nadamw", own["learning_rate"]], by_submission["nadamw", 1e-6]
    assert base["point"] == {
        **own,
        "horizon_factor": base["point"]["horizon_factor"],
    }  # not what defaults may become
    assert (base["steps"], slow["steps"], base["seed"]) == (4, 4, 3001)
    assert base["loss"] < slow["loss"]
    assert "/" not in json.dumps(list(results.values()))  # no path of the machine
    capsys.readouterr()
    assert call("run", "toy") == 0
    assert "0 runs" in capsys.readouterr().out
    assert call("table") == 0
    assert "## toy" in document.read_text()
    assert call("list", "nonsense") == 2
    assert "There is no experiment 'nonsense'. Known: toy." in capsys.readouterr().err


def test_a_hyperparameter_added_since_does_not_lose_the_results_of_before():
    """Points are kept whole: those from before the hyperparameter are of the value that was all there was."""
    run = runs.run_of(TOY, Variant({"statistics_rows_by_side": False}, "kfac_expand"), "bible_lm", 3001)
    now = runs.identity(run)
    before = {**now, "point": {k: v for k, v in now["point"].items() if k != "statistics_rows_by_side"}}
    assert runs.key(before) == runs.key(now)
    other = {**now, "point": {**now["point"], "statistics_rows_by_side": True}}
    assert runs.key(other) != runs.key(now)


def test_what_is_kept_in_the_repository_belongs_to_experiments():
    kept = records.read()
    wanted = {runs.key(runs.identity(run)) for one in EXPERIMENTS for run in runs.runs_of(one).values()}
    assert len(kept) > 300
    assert not set(kept) - wanted


def test_a_damaged_record_is_named_by_its_line(tmp_path):
    path = tmp_path / "kept.jsonl"
    path.write_text('{"submission": "nadamw"}\n')
    with pytest.raises(Exception, match="line 1 cannot be read"):
        records.read(path)
