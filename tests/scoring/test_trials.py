"""From evaluations to trials, studies and cells: budgets, best trials, medians, and what is no hit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from commands.errors import UserError
from scoring.judge import cells as cells_module
from scoring.judge import columns, lint, parity, score, trials, versions
from scoring.read import logs
from tests.scoring.trees import META, official_meta, official_rows, plain, write_official, write_trial


def reach(root: Path, **keywords: Any) -> pd.DataFrame:
    runs = logs.read([root])
    return trials.reach(runs, versions.rules_for(runs.trials), **keywords)


def one(root: Path, rows: pd.DataFrame | None, meta: dict[str, Any] | None = None) -> pd.Series:
    write_trial(root / "a" / "study_0" / "bible_lm_pytorch" / "trial_1", "bible_lm", rows, meta)
    return reach(root).iloc[0]


def test_a_value_at_the_target_is_a_hit(tmp_path: Path) -> None:
    rows = plain()
    rows.loc[4, "validation/loss"] = META["bible_lm"]["validation_target_value"]
    assert one(tmp_path, rows)["steps"] == 50


def test_progress_of_a_trial(tmp_path: Path) -> None:
    row = one(tmp_path, plain())
    assert (row["state"], row["time"], row["steps"], row["best_step"]) == ("hit", 70.0, 70.0, 100.0)
    assert row["best"] == pytest.approx(0.2)
    assert row["distance"] == pytest.approx(0.2 - 1.7)
    assert (row["last_time"], row["last_step"], row["eval_period"]) == (100.0, 100.0, 10.0)
    assert row["ms_per_step"] == pytest.approx(1000.0)
    assert row["share"] == pytest.approx(100 / 900)


def test_a_step_is_timed_from_the_first_evaluation_on(tmp_path: Path) -> None:
    rows = plain()
    for name in ("score", "accumulated_submission_time", "total_duration"):
        rows[name] += 500.0  # compilation
    assert one(tmp_path, rows)["ms_per_step"] == pytest.approx(1000.0)


@pytest.mark.parametrize(
    ("change", "state"),
    [
        ({"max_allowed_runtime_sec": 70}, "hit"),
        ({"max_allowed_runtime_sec": 69.9}, "over budget"),
        ({"validation_target_value": 0.1, "max_allowed_runtime_sec": 105}, "missed"),
        ({"validation_target_value": 0.1, "step_hint": 100}, "missed"),
        ({"validation_target_value": 0.1}, "unfinished"),
    ],
)
def test_states(tmp_path: Path, change: dict[str, float], state: str) -> None:
    assert one(tmp_path, plain(), META["bible_lm"] | change)["state"] == state


@pytest.mark.parametrize(("step", "state"), [(100, "missed"), (110, "unfinished")])
def test_a_run_that_ended_with_its_schedule_is_no_unfinished_one(tmp_path: Path, step: int, state: str) -> None:
    folder = tmp_path / "a" / "study_0" / "bible_lm_pytorch" / "trial_1"
    write_trial(folder, "bible_lm", plain(), META["bible_lm"] | {"validation_target_value": 0.1})
    (folder / "outcome.json").write_text(f'{{"global_step": {step}}}')
    assert reach(tmp_path).iloc[0]["state"] == state


def test_no_data_and_divergence(tmp_path: Path) -> None:
    assert one(tmp_path / "x", None)["state"] == "no data"
    rows = plain()
    rows.loc[3:, "validation/loss"] = np.nan
    assert one(tmp_path / "y", rows)["state"] == "missed"


def test_direction_comes_from_the_meta_data_first(tmp_path: Path) -> None:
    """A metric nobody knows, to be reached from below: its first value beyond 1.7 is the first of all."""
    meta = META["bible_lm"] | {"target_metric_name": "loss", "lower_is_better": False}
    assert one(tmp_path, plain(), meta)["steps"] == 10


def test_self_tuning_has_a_longer_budget(tmp_path: Path) -> None:
    rows = official_rows("ogbg", 1.4 * 12011, "0.6")
    folder = tmp_path / "a" / "study_0" / "ogbg_jax" / "trial_1"
    write_trial(folder, "ogbg", rows, official_meta("ogbg", "0.6"))
    runs = logs.read([tmp_path])
    states = {
        ruleset: trials.reach(runs, versions.rules_for(runs.trials, "auto", ruleset))["state"].iloc[0]
        for ruleset in ("external", "self")
    }
    assert states == {"external": "over budget", "self": "hit"}


def two_trials(root: Path) -> Path:
    """One trial reaches the target at its third evaluation after 300 s, the other at its sixth after 200 s."""
    home = root / "a" / "study_0" / "ogbg_jax"
    write_trial(home / "trial_1", "ogbg", official_rows("ogbg", 300.0), official_meta("ogbg"))
    write_trial(home / "trial_2", "ogbg", official_rows("ogbg", 200.0, misses=5), official_meta("ogbg"))
    return root


def test_the_best_trial_is_best_by_time_not_by_index(tmp_path: Path) -> None:
    runs = logs.read([two_trials(tmp_path)])
    rules = versions.rules_for(runs.trials)
    exact = cells_module.studies(trials.reach(runs, rules), rules)
    assert exact[["trial", "cost", "trials"]].values.tolist() == [[2, 200.0, 2]]
    assert parity.studies(runs, rules)["cost"].tolist() == [300.0]


def test_trials_beyond_the_ruleset_do_not_count(tmp_path: Path) -> None:
    home = tmp_path / "a" / "study_0" / "ogbg_jax"
    for number in range(1, 7):
        write_trial(home / f"trial_{number}", "ogbg", official_rows("ogbg", 100.0 - number), official_meta("ogbg"))
    runs = logs.read([tmp_path])
    rules = versions.rules_for(runs.trials)
    reached = trials.reach(runs, rules)
    assert cells_module.studies(reached, rules)["cost"].tolist() == [95.0]
    assert "extra trials" in set(lint.lint(runs, rules, reached)["what"])


def cells(root: Path, cost: str = "time") -> pd.DataFrame:
    runs = logs.read([root])
    rules = versions.rules_for(runs.trials)
    return cells_module.cells(cells_module.studies(trials.reach(runs, rules, cost), rules), rules).set_index(
        ["submission", "workload"]
    )


def test_a_missing_study_is_a_miss_and_does_not_help(tmp_path: Path) -> None:
    hits: dict[str, dict[str, list[float | None]]] = {
        "whole": {"ogbg": [100.0, 200.0, 300.0, None, None]},
        "part": {"ogbg": [100.0, 200.0]},
        "three": {"ogbg": [100.0, 200.0, 300.0]},
    }
    root = write_official(tmp_path, hits)
    found = cells(root)
    assert found["cost"].to_dict() == {("part", "ogbg"): np.inf, ("three", "ogbg"): 300.0, ("whole", "ogbg"): 300.0}
    assert found.loc[("part", "ogbg"), ["present", "hits", "state"]].tolist() == [2, 2, "no data"]
    runs = logs.read([root])
    rules = versions.rules_for(runs.trials)
    official = parity.cells(parity.studies(runs, rules), rules).set_index("submission")["cost"]
    assert official["part"] == 150.0  # the median over those present


def test_an_even_number_of_studies(tmp_path: Path) -> None:
    assert columns.median_of(np.array([1.0, 3.0, 5.0, np.inf])) == 4.0
    assert columns.median_of(np.array([1.0, 3.0, np.inf, np.inf])) == np.inf
    assert columns.median_of(np.array([np.inf])) == np.inf


def test_costs(tmp_path: Path) -> None:
    root = write_official(tmp_path, {"a": {"ogbg": [1000.0] * 5}})
    steps = cells(root, "steps")["cost"].iloc[0]
    assert steps == round(1000 / 18477 * 80000)
    assert cells(root, "total_time")["cost"].iloc[0] == 2000.0
    with pytest.raises(UserError, match="no column 'nonsense'"):
        cells(root, "nonsense")


def test_normalised_time_is_steps_at_the_pace_of_the_reference(tmp_path: Path) -> None:
    """b takes as many steps on a machine twice as slow."""
    for name, ms in (("a", 1000.0), ("b", 2000.0)):
        for study in range(5):
            folder = tmp_path / name / f"study_{study}" / "bible_lm_pytorch" / "trial_1"
            write_trial(folder, "bible_lm", plain(ms=ms))
    runs = logs.read([tmp_path])
    rules = versions.rules_for(runs.trials)
    priced, unpriced = trials.with_normalised(runs, rules, "a")
    assert not unpriced
    reached = trials.reach(priced, rules, "normalised")
    assert reached["time"].unique().tolist() == [70.0, 140.0]
    assert reached["cost"].tolist() == pytest.approx([70.0] * 10)


def test_two_frameworks_of_a_submission_are_two_rows(tmp_path: Path) -> None:
    write_official(tmp_path, {"a": {"ogbg": [100.0] * 5}})
    write_official(tmp_path, {"a": {"ogbg": [1.0]}}, framework="pytorch")
    assert cells(tmp_path)["cost"].to_dict() == {("a (jax)", "ogbg"): 100.0, ("a (pytorch)", "ogbg"): np.inf}
    one = logs.read([tmp_path]).select(framework="jax")
    assert trials.reach(one, versions.rules_for(one.trials))["submission"].unique().tolist() == ["a"]
    runs = logs.read([tmp_path])
    rules = versions.rules_for(runs.trials)
    assert "mixed frameworks" in set(lint.lint(runs, rules, trials.reach(runs, rules))["what"])


def test_an_unknown_workload_is_reported_and_not_scored(tmp_path: Path) -> None:
    write_official(tmp_path, {"a": {"ogbg": [100.0] * 5}})
    write_trial(tmp_path / "a" / "study_0" / "mystery_jax" / "trial_1", "mystery", plain(), {})
    assert list(cells(tmp_path).index) == [("a", "ogbg")]
    runs = logs.read([tmp_path])
    rules = versions.rules_for(runs.trials)
    assert "unknown workload" in set(lint.lint(runs, rules, trials.reach(runs, rules))["what"])


def test_meta_data_that_disagree(tmp_path: Path) -> None:
    for number, target in enumerate((1.7, 1.7, 0.3)):
        meta = META["bible_lm"] | {"validation_target_value": target}
        write_trial(tmp_path / "a" / f"study_{number}" / "bible_lm_pytorch" / "trial_1", "bible_lm", plain(), meta)
    runs = logs.read([tmp_path])
    rules = versions.rules_for(runs.trials)
    assert rules.targets["bible_lm"].value == 1.7
    found = lint.lint(runs, rules, trials.reach(runs, rules))
    assert (found["what"] == "target disagrees").sum() == 1


def test_version_and_ruleset_are_found(tmp_path: Path) -> None:
    for version in ("0.5", "0.6"):
        root = write_official(tmp_path / version, {"a": {"ogbg": [100.0], "wmt": [100.0]}}, version)
        rules = versions.rules_for(logs.read([root]).trials)
        assert (rules.version, rules.ruleset) == (version, "external")


def test_one_single_submission(tmp_path: Path) -> None:
    """Alone, it is its own best: every workload it reaches counts in full."""
    write_official(tmp_path, {"a": {"ogbg": [100.0] * 5, "ogbg_model_size": [1.0] * 5, "imagenet_vit": [9.0] * 5}})
    found = cells(tmp_path).reset_index()
    assert score.scores(found, versions.load("0.5")).to_dict() == {"a": 2 / 8}


def test_a_target_nobody_reaches(tmp_path: Path) -> None:
    write_official(tmp_path, {"a": {"ogbg": [None] * 5}, "b": {"ogbg": [None] * 5}})
    assert score.scores(cells(tmp_path).reset_index(), versions.load("0.5")).to_dict() == {"a": 0.0, "b": 0.0}
    runs = logs.read([tmp_path])
    assert parity.scores(runs, versions.rules_for(runs.trials)).to_dict() == {"a": 0.0, "b": 0.0}
