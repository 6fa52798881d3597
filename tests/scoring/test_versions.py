"""Which rules hold: the versions there are, how one is told, official targets files, and what is said about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import scoring
from commands.errors import UserError
from scoring.cli import main
from scoring.judge import leaderboard, lint, trials, versions
from scoring.judge.rules import parse_relaxations
from scoring.oddities import Oddities
from scoring.read import logs
from tests.scoring.trees import official_meta, official_rows, plain, write_official, write_trial

ALL = {"ogbg": [1000.0] * 3, "wmt": [5000.0] * 3, "fastmri": [900.0] * 3}


def test_versions_are_the_data_files() -> None:
    assert versions.versions() == ("0.5", "0.6", "1.0")
    rules = scoring.load_version("1.0", "self")
    assert (rules.studies, rules.trials, rules.budget_factor) == (3, 1, 1.5)
    assert rules.budget("finewebedu_lm") == 1.5 * 31967
    lm = rules.targets["finewebedu_lm"]
    assert (lm.metric, lm.value, lm.higher_is_better, np.isnan(lm.test_value)) == ("ppl", 22.2995, False, True)
    assert len(rules.base) == 9
    assert not rules.held_out


def test_directions_stand_in_the_data() -> None:
    for version in versions.versions():
        upward = {name for name, one in versions.load(version).targets.items() if one.higher_is_better}
        names = ("fastmri", "imagenet", "ogbg", "wmt")
        assert upward == {name for name in versions.load(version).targets if name.startswith(names)}


def test_the_version_is_told_by_workloads_and_budgets(tmp_path: Path) -> None:
    for version in versions.versions():
        root = write_official(tmp_path / version, {"a": ALL}, version)
        assert versions.rules_for(logs.read([root]).trials).version == version
    # Criteo's budget and hint are the same in 0.5 and 0.6, but 0.5 alone has the variant.
    root = write_official(tmp_path / "x", {"a": {"criteo1tb": [99.0], "criteo1tb_embed_init": [99.0]}}, "0.5")
    assert versions.rules_for(logs.read([root]).trials).version == "0.5"
    root = write_official(tmp_path / "y", {"a": {"finewebedu_lm": [9999.0]}}, "1.0")
    assert versions.rules_for(logs.read([root]).trials).version == "1.0"


def test_logs_without_meta_data_are_judged_by_their_workloads_and_say_so(tmp_path: Path) -> None:
    home = tmp_path / "a" / "study_0"
    for name in ("ogbg", "finewebedu_lm"):
        write_trial(home / f"{name}_jax" / "trial_1", name, official_rows(name, 900.0, "1.0"), {})
    rules = versions.rules_for(logs.read([tmp_path]).trials)
    assert rules.version == "1.0"
    assert rules.assumed[0].startswith("only 0 of 2 trials agree with any version: targets of 1.0, no meta_data")


def test_where_few_agree_budgets_come_from_meta_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A fork with budgets of its own keeps the official targets, and the first line says so."""
    meta = official_meta("ogbg", "1.0") | {"max_allowed_runtime_sec": 500, "step_hint": 77}
    for study, time in enumerate((400.0, 450.0, 600.0)):
        folder = tmp_path / "a" / f"study_{study}" / "ogbg_jax" / "trial_1"
        write_trial(folder, "ogbg", official_rows("ogbg", time, "1.0"), meta)
    runs = logs.read([tmp_path])
    rules = versions.rules_for(runs.trials)
    assert (rules.budget("ogbg"), rules.targets["ogbg"].step_hint) == (500.0, 77.0)
    assert trials.reach(runs, rules)["state"].tolist() == ["hit", "hit", "over budget"]
    assert main(["leaderboard", str(tmp_path), "--workloads=ogbg"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert "only 0 of 3 trials agree with any version" in first
    assert "budget and hint come from meta_data" in first


def test_an_assumed_ruleset_is_said(tmp_path: Path) -> None:
    root = write_official(tmp_path, {"a": ALL}, "1.0")
    for flags in root.rglob("flags_0.json"):
        flags.unlink()
    rules = versions.rules_for(logs.read([root]).trials)
    assert rules.ruleset == "self"
    assert "one trial a study" in rules.assumed[0]
    folder = root / "a" / "study_0" / "ogbg_jax" / "trial_2"
    write_trial(folder, "ogbg", official_rows("ogbg", 1.0, "1.0"), official_meta("ogbg", "1.0"))
    (folder / "flags_0.json").unlink()
    rules = versions.rules_for(logs.read([root]).trials)
    assert rules.ruleset == "external"
    assert "up to 2 trials" in rules.assumed[0]
    assert versions.rules_for(logs.read([root]).trials, ruleset="self").assumed == ()


def official_file(path: Path, version: str, new: bool, **changes: Any) -> Path:
    """A workload_targets.json as the official scorer has them, in its older or newer form."""
    rules = versions.load(version)
    workloads: dict[str, dict[str, Any]] = {}
    for name, target in rules.targets.items():
        one: dict[str, Any] = {
            "target_metric_name": target.metric,
            "validation_target_value": target.value,
            "step_hint": int(target.step_hint),
        }
        if new:
            one["target_metric_goal"] = "maximize" if target.higher_is_better else "minimize"
            one["max_allowed_runtime_sec"] = int(target.budget)
        workloads[name] = one | changes.get(name, {})
    workloads["cifar"] = {"target_metric_name": "accuracy", "validation_target_value": 0.85, "step_hint": 4883}
    data = {
        "benchmark_version": "0.6",  # the label is wrong in the file of 1.0, too
        "base_workloads": list(rules.base),
        "held_out_workloads": list(rules.held_out),
        "workloads": workloads,
    }
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("version", ["0.5", "0.6", "1.0"])
def test_official_targets_files(tmp_path: Path, version: str, new: bool) -> None:
    ours = versions.load(version, "self")
    found = versions.load(str(official_file(tmp_path / "workload_targets.json", version, new)), "self")
    assert (found.version, found.base, dict(found.held_out)) == (ours.version, ours.base, dict(ours.held_out))
    assert (found.studies, found.budget_factor) == (ours.studies, ours.budget_factor)
    # By their text, for an unknown figure is NaN and unlike itself.
    assert {name: repr(found.targets[name]) for name in ours.targets} == {
        name: repr(target) for name, target in ours.targets.items()
    }
    assert "cifar" in found.unscored


def test_an_official_file_of_other_targets(tmp_path: Path) -> None:
    changed = {"ogbg": {"validation_target_value": 0.1, "max_allowed_runtime_sec": 50}}
    found = versions.load(str(official_file(tmp_path / "t.json", "1.0", True, **changed)))
    assert (found.targets["ogbg"].value, found.budget("ogbg")) == (0.1, 50.0)
    path = official_file(tmp_path / "u.json", "1.0", True, ogbg={"target_metric_goal": "upwards"})
    with pytest.raises(UserError, match="direction 'upwards'"):
        versions.load(str(path))
    data = json.loads(path.read_text()) | {"held_out_workloads": ["mnist"]}
    data["workloads"]["ogbg"]["target_metric_goal"] = "maximize"
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match="not a benchmark data file"):
        versions.load(str(path))  # a held-out workload that is not in the file
    data["workloads"]["mnist"] = data["workloads"]["ogbg"]
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match="held-out workload mnist has no base workload"):
        versions.load(str(path))
    (tmp_path / "v.json").write_text("{")
    with pytest.raises(UserError, match=r"not a benchmark data file, nor a workload_targets\.json"):
        versions.load(str(tmp_path / "v.json"))


def test_what_occurs_and_is_not_scored_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_official(tmp_path, {"a": ALL}, "1.0")
    write_trial(root / "a" / "study_0" / "bible_lm_jax" / "trial_1", "bible_lm", plain())
    assert main(["leaderboard", str(root)]) == 0
    shown = capsys.readouterr().out
    assert "warning: workload without credit (1x), such as a: bible_lm" in shown
    board = leaderboard.build(logs.read([root]), workloads="present", replicates=20)
    assert board.rules.base == ("fastmri", "ogbg", "wmt", "bible_lm")
    assert "workload without credit" not in set(board.oddities["what"])


def test_every_table_names_version_ruleset_and_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_official(tmp_path / "logs", {"a": ALL}, "1.0")
    assert main(["report", str(root), "--ruleset=self", f"--output_dir={tmp_path / 'out'}"]) == 0
    shown = capsys.readouterr().out
    for name, budget in (("ogbg", "16,954"), ("wmt", "24,171"), ("fastmri", "4,118")):
        (line,) = (line for line in shown.splitlines() if line.startswith(f"{name}:"))
        assert line.endswith(f"AlgoPerf 1.0, self-tuning (budgets x 1.5), budget {budget} s")


def test_report_and_leaderboard_find_the_same(tmp_path: Path) -> None:
    root = write_official(tmp_path, {"a": ALL | {"ogbg": [1000.0]}, "b": ALL}, "1.0")
    runs = logs.read([root])
    rules = versions.rules_for(runs.trials)
    found = lint.lint(runs, rules, trials.reach(runs, rules))
    board = leaderboard.build(runs, replicates=20)
    report = scoring.report(runs)
    assert report.oddities.equals(board.oddities)
    assert found.equals(board.oddities)
    costs = board.cells.set_index(["submission", "workload"])["cost"]
    summary = report.summary.set_index(["algorithm", "workload"])
    assert {key: summary.loc[key, "time"] for key in summary.index} == {key: costs[key] for key in summary.index}
    assert np.isinf(costs["a", "ogbg"])  # two studies are missing, in both


def test_relaxed_targets() -> None:
    rules = versions.load("0.5").relaxed(parse_relaxations("all=0.05, imagenet_resnet=0.10"))
    strict = versions.load("0.5")
    assert rules.targets["wmt"].value == pytest.approx(0.95 * strict.targets["wmt"].value)
    assert rules.targets["criteo1tb"].value == pytest.approx(1.05 * strict.targets["criteo1tb"].value)
    for name in ("imagenet_resnet", "imagenet_resnet_large_bn_init"):
        assert rules.targets[name].value == pytest.approx(0.9 * strict.targets[name].value)
    assert "relaxed by 5, 10 %" in rules.title


@pytest.mark.parametrize("text", ["all", "all=1", "all=-0.1", "=0.1", "all=x", "ogbg=0.1,ogbg=0.2"])
def test_relaxations_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="write NAME=SHARE"):
        parse_relaxations(text)
    with pytest.raises(UserError, match="unknown workload mnist"):
        versions.load("1.0").relaxed({"mnist": 0.1})


def test_flags_that_disagree_are_said(tmp_path: Path) -> None:
    root = write_official(tmp_path, {"a": ALL}, "1.0")
    flags = root / "a" / "study_0" / "ogbg_jax" / "trial_1" / "flags_0.json"
    flags.write_text(json.dumps({"tuning_ruleset": "self"}))
    rules = versions.rules_for(logs.read([root]).trials, odd=Oddities())
    assert rules.ruleset == "external"
    assert "1 of 9 trials state another tuning ruleset" in rules.assumed[0]
