"""The leaderboard: reasons, ratios and speedups that are true, what it says about doubt, and what it writes."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from commands.errors import UserError
from scoring.cli import main
from scoring.judge import columns, leaderboard, parity, published, report, sweep, versions
from scoring.judge.leaderboard import Leaderboard
from scoring.pages import latex, output, report_page
from scoring.read import logs
from scoring.show import leaderboard_tables, report_tables, sweep_tables, text
from tests.scoring.trees import curve, official_meta, official_rows, plain, write_official, write_runs, write_trial

Hits = dict[str, dict[str, list[float | None]]]


def board(root: Path, hits: Hits, version: str = "1.0", **keywords: object) -> Leaderboard:
    write_official(root, hits, version)
    return leaderboard.build(logs.read(root, use_cache=False), **({"replicates": 50} | keywords))  # type: ignore[arg-type]


def reasons(found: Leaderboard) -> dict[tuple[str, str], str]:
    return found.cells.set_index(["submission", "workload"])["reason"].to_dict()


TWO: Hits = {
    "baseline": {"ogbg": [4000.0] * 3, "wmt": [8000.0] * 3},
    "fast": {"ogbg": [2000.0] * 3, "wmt": [8000.0] * 3},
}


def test_official_reasons_are_those_of_the_official_cells(tmp_path: Path) -> None:
    """Two studies of three are missing: the exact rules miss, the official median over one study is a hit."""
    hits = TWO | {"few": {"ogbg": [3000.0], "wmt": [None, None, 9000.0]}}
    exact = reasons(board(tmp_path, hits, workloads="ogbg,wmt"))
    official = reasons(leaderboard.build(logs.read(tmp_path), workloads="ogbg,wmt", official=True))
    assert exact["few", "ogbg"] == "reached in 1 of 3 studies; 2 studies missing"
    assert official["few", "ogbg"] == ""
    assert exact["few", "wmt"] == official["few", "wmt"] == "reached in 1 of 3 studies"


def test_a_hit_over_budget_is_a_hit_for_the_official_procedure(tmp_path: Path) -> None:
    late = 1.2 * 11303
    hits: Hits = {"a": {"ogbg": [late] * 3}, "b": {"ogbg": [10000.0] * 3}}
    assert reasons(board(tmp_path, hits, workloads="ogbg"))["a", "ogbg"] == "over budget"
    official = leaderboard.build(logs.read(tmp_path), workloads="ogbg", official=True)
    assert reasons(official)["a", "ogbg"] == ""


def test_normalised_cost_without_a_price_says_so(tmp_path: Path) -> None:
    hits = TWO | {"other": {"fastmri": [900.0] * 3}}
    found = board(tmp_path, hits, workloads="ogbg,wmt,fastmri", cost="normalised", reference="baseline")
    assert reasons(found)["other", "fastmri"] == "no price: the reference has no time per step here"
    assert "never reached" not in set(reasons(found).values())
    shown = text.terminal(leaderboard_tables.ratio_table(found))
    assert "no price" in shown
    with pytest.raises(UserError, match="name one with --reference"):
        leaderboard.build(logs.read(tmp_path), cost="normalised", reference="")


def test_ratios_to_a_reference_are_not_cut_below_1(tmp_path: Path) -> None:
    found = board(tmp_path, TWO, workloads="ogbg,wmt", relative=True)
    assert found.ranking["score"].to_dict() == {"fast": pytest.approx((7 / 6 + 1) / 2), "baseline": 1.0}
    assert found.ranking["rank"].to_dict() == {"fast": 1, "baseline": 2}
    ratios = found.cells.set_index(["submission", "workload"])["ratio"]
    assert ratios["fast", "ogbg"] == 0.5
    tau, share = found.profiles["fast"]
    # The profile is the integrand of the score, from the least ratio on.
    assert float((np.diff(tau) * share[:-1]).sum() / 3) == pytest.approx(found.ranking["score"]["fast"])


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"relative": True, "official": True}, "leave out --parity"),
        ({"against": "published", "official": True}, "leave out --parity"),
        ({"against": "published", "cost": "total_time"}, "knows time and steps"),
        ({"against": "published", "relaxations": {"all": 0.1}}, "no relaxed targets"),
        ({"against": "published", "ruleset": "external"}, "there are 0.5 external and 1.0 self, not 1.0 external"),
        ({"shares": (0.1,), "relative": True}, "--sweep goes with none"),
        ({"relative": True, "reference": ""}, "needs --reference"),
    ],
)
def test_wishes_that_exclude_each_other(tmp_path: Path, wishes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        board(tmp_path, TWO, **({"ruleset": "self"} | wishes))


def test_two_frameworks_are_two_rows_unless_one_is_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_official(tmp_path, TWO, "1.0")
    write_official(tmp_path, {"fast": {"ogbg": [6000.0] * 3}}, "1.0", "pytorch")
    runs = logs.read(tmp_path)
    found = leaderboard.build(runs, workloads="ogbg", replicates=20)
    costs = found.cells.set_index("submission")["cost"].to_dict()
    assert costs == {"baseline": 4000.0, "fast (jax)": 2000.0, "fast (pytorch)": 6000.0}
    official = leaderboard.build(runs, workloads="ogbg", official=True)
    assert official.cells.set_index("submission")["cost"].to_dict() == costs
    with pytest.raises(UserError, match=r"two frameworks, name one of fast \(jax\), fast \(pytorch\)"):
        leaderboard.build(runs, workloads="ogbg", reference="fast")
    assert main(["leaderboard", str(tmp_path), "--workloads=ogbg", "--framework=jax", "--replicates=20"]) == 0
    shown = capsys.readouterr().out
    assert "fast " in shown
    assert "pytorch" not in shown


def test_who_ran_nothing_has_no_speedup(tmp_path: Path) -> None:
    found = board(tmp_path, TWO | {"idle": {"fastmri": [900.0] * 3}}, workloads="ogbg,wmt")
    assert np.isnan(found.ranking.loc["idle", ["speedup", "speedup_low", "speedup_high"]].astype(float)).all()
    assert found.ranking.loc["fast", "speedup"] == pytest.approx(np.sqrt(2.0))
    row = next(row for row in leaderboard_tables.ranking_table(found).rows if row[0] == "idle")
    assert row[-2:] == ["–", "–"]


def test_no_interval_from_one_study(tmp_path: Path) -> None:
    found = board(tmp_path, TWO | {"once": {"ogbg": [3000.0], "wmt": [9000.0] * 3}}, workloads="ogbg,wmt")
    columns = ["score_low", "score_high", "rank_low", "rank_high", "first", "speedup_low", "speedup_high"]
    assert np.isnan(found.ranking.loc["once", columns].astype(float)).all()
    assert found.ranking.loc["fast", columns].notna().all()
    note = leaderboard_tables.ranking_table(found).note
    assert "7/27" in note
    single = board(
        tmp_path / "single", {"a": {"ogbg": [900.0]}, "b": {"ogbg": [800.0]}}, workloads="ogbg", studies=1
    )
    assert "cannot be said" in leaderboard_tables.verdict(single)
    summary = report.build(logs.read(tmp_path / "single"), studies=1).summary
    assert summary[["steps_ci_low", "time_ci_high", "steps_ratio_ci_low"]].isna().all(axis=None)


def test_a_reference_that_missed_is_marked(tmp_path: Path) -> None:
    hits: Hits = {"baseline": {"ogbg": [4000.0] * 3, "wmt": [None] * 3}, "fast": TWO["fast"]}
    found = board(tmp_path, hits, workloads="ogbg,wmt")
    assert found.reference_missed == ("wmt",)
    assert found.speedups.loc["fast", "wmt"] == pytest.approx((16114 + 1) / 8000)
    table = leaderboard_tables.speedup_table(found)
    assert table is not None
    assert table.headers == ["submission", "ogbg", "wmt*"]
    assert {row[0]: row[1:] for row in table.rows} == {"fast": ["2.00", "> 2.01"], "baseline": ["1.00", "miss"]}
    assert "* baseline missed wmt" in leaderboard_tables.ranking_table(found).note


def test_the_verdict_says_who_by_how_much_and_how_sure(tmp_path: Path) -> None:
    said = leaderboard_tables.verdict(board(tmp_path, TWO, workloads="ogbg,wmt"))
    assert said == (
        "fast is first with a score of 1.0000 (2 of 2 workloads credited), 0.1667 ahead of baseline; with other "
        "studies drawn from these it would be first in 100 % of cases."
    )
    none = board(tmp_path / "none", {"a": {"ogbg": [None] * 3}}, workloads="ogbg")
    assert leaderboard_tables.verdict(none).startswith("Nobody has a score")


def test_ranks_by_time_and_by_steps(tmp_path: Path) -> None:
    """fast needs half the time but, on a faster machine, more steps."""
    for name, time, steps in (("slow", 4000.0, 2000), ("fast", 2000.0, 3000)):
        for study in range(3):
            rows = official_rows("ogbg", time, "1.0")
            rows["global_step"] = (np.arange(1, len(rows) + 1) * steps) // len(rows)
            folder = tmp_path / name / f"study_{study}" / "ogbg_jax" / "trial_1"
            write_trial(folder, "ogbg", rows, official_meta("ogbg", "1.0"))
    runs = logs.read(tmp_path)
    found = leaderboard.build(runs, workloads="ogbg", replicates=20).ranking
    assert found[["rank", "other_rank"]].to_dict("index") == {
        "fast": {"rank": 1, "other_rank": 2},
        "slow": {"rank": 2, "other_rank": 1},
    }
    by_steps = leaderboard.build(runs, workloads="ogbg", cost="steps", replicates=20).ranking
    assert by_steps["other_rank"].to_dict() == {"slow": 2, "fast": 1}


def test_workloads_reached_and_credited(tmp_path: Path) -> None:
    hits = TWO | {"slow": {"ogbg": [9000.0] * 3, "wmt": [8000.0] * 3}}
    found = board(tmp_path, hits, workloads="ogbg,wmt").ranking
    assert found.loc["slow", ["reached", "credited", "present"]].tolist() == [2, 1, 2]


def test_a_sweep_of_relaxations(tmp_path: Path) -> None:
    """near misses by 4 %, far by 15 %: each is credited from its own share on."""
    target = official_meta("ogbg", "1.0")["validation_target_value"]
    for name, best in (("near", 0.96 * target), ("far", 0.85 * target)):
        for study in range(3):
            rows = official_rows("ogbg", 2000.0, "1.0")
            rows.loc[len(rows) - 1, "validation/mean_average_precision"] = best
            rows.loc[: len(rows) - 2, "validation/mean_average_precision"] = 0.1 * target
            folder = tmp_path / name / f"study_{study}" / "ogbg_jax" / "trial_1"
            write_trial(folder, "ogbg", rows, official_meta("ogbg", "1.0"))
    hits: Hits = {"hit": {"ogbg": [3000.0] * 3}}
    found = board(tmp_path, hits, workloads="ogbg", shares=sweep.SHARES)
    assert found.sweep is not None
    assert found.sweep.reached.set_index("submission")["share"].to_dict() == {"near": 0.04, "far": 0.15}
    # From 10 % on an earlier evaluation of "hit" is at the target, before all others.
    assert found.sweep.ranks.loc["hit", [0.0, 0.03, 0.04, 0.20]].tolist() == [1, 1, 2, 1]
    for official in (False, True):
        relaxed = leaderboard.build(
            logs.read(tmp_path), workloads="ogbg", relaxations={"all": 0.05}, official=official, replicates=20
        )
        assert list(relaxed.ranking.index) == ["near", "hit", "far"]
        assert "relaxed by 5 %" in leaderboard_tables.heading(relaxed)
    table = sweep_tables.newly_reached_table(found)
    assert table is not None
    assert table.rows == [["ogbg", "4 %", "near"], ["ogbg", "15 %", "far"]]


def test_against_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run of our own is placed among the published ones: as fast as the best, it shares their first place."""
    rules = versions.load("1.0", "self")
    table = published.load(rules)
    best = (
        table[(table["workload"] == "ogbg") & (table["state"] == "hit")]
        .groupby("submission")["time"]
        .median()
        .min()
    )
    write_official(tmp_path, {"kfac": {"ogbg": [float(best) / 2] * 3}}, "1.0")
    runs = logs.read(tmp_path)
    found = leaderboard.build(runs, ruleset="self", workloads="present", against="published", replicates=20)
    assert found.ranking.index[0] == "kfac"
    assert len(found.ranking) == 18
    assert found.ranking["score"].iloc[1] == pytest.approx((4 - 2) / 3, rel=1e-6)
    steps = leaderboard.build(runs, ruleset="self", workloads="present", against="published", cost="steps")
    assert np.isfinite(steps.cells.loc[steps.cells["submission"] == "muon_torch", "cost"]).all()
    command = ["leaderboard", str(tmp_path), "--ruleset=self", "--workloads=present", "--against=published"]
    assert main([*command, f"--output_dir={tmp_path / 'out'}", "--replicates=20"]) == 0
    shown = capsys.readouterr().out
    assert "muon_torch †" in shown
    assert "4 A100 of 40 GB" in shown


def test_published_files_hold_both_leaderboards() -> None:
    assert published.available() == [("0.5", "external"), ("1.0", "self")]
    five = published.load(versions.load("0.5", "external"), "steps")
    one = published.load(versions.load("1.0", "self"))
    assert (five["submission"].nunique(), one["submission"].nunique()) == (11, 17)
    assert five["cost"].equals(five["steps"])
    assert (np.isinf(one["time"]) == (one["state"] != "hit")).all()


def test_shares_and_metrics_at_the_target(tmp_path: Path) -> None:
    rows = plain()
    rows["test/loss"] = rows["validation/loss"] + 0.5
    write_trial(tmp_path / "a" / "study_0" / "bible_lm_pytorch" / "trial_1", "bible_lm", rows)
    (row,) = (row for _, row in report.build(logs.read(tmp_path)).summary.iterrows())
    assert row["share"] == pytest.approx(100 / 900)
    assert row["share_to_target"] == pytest.approx(70 / 900)
    assert row["eval_share"] == pytest.approx(10 / 115)
    assert row["coarseness"] == pytest.approx(10 / 70)
    at = rows[rows["global_step"] == 70].iloc[0]
    for split in ("train", "validation", "test"):
        assert row[f"{split}_at_target"] == at[f"{split}/loss"]
    table = report_tables.details_table(report.build(logs.read(tmp_path)), "bible_lm")
    assert table.headers[1:3] == ["period of time", "budget used"]
    assert table.rows[0][1:3] == ["14 %", "11 %"]
    beside = report_tables.costs_table(report.build(logs.read(tmp_path)), "bible_lm")
    assert dict(zip(beside.headers, beside.rows[0], strict=True))["evaluation period"] == "10.0 s"


def test_a_table_without_a_test_target_has_no_test_metric(tmp_path: Path) -> None:
    rows = official_rows("finewebedu_lm", 900.0, "1.0").assign(**{"test/ppl": 1.0})
    write_trial(tmp_path / "a" / "finewebedu_lm_jax" / "trial_1", "finewebedu_lm", rows)
    summary = report.build(logs.read(tmp_path), studies=1).summary
    assert summary["test_at_target"].isna().all()
    assert summary["validation_at_target"].notna().all()


def test_headings_belong_to_their_columns(tmp_path: Path) -> None:
    """The number under 'steps to target' is the steps."""
    write_runs(tmp_path, {"nadamw": 1.0, "kfac": 2.0}, workloads=("bible_lm",))
    found = report.build(logs.read(tmp_path))
    summary = found.summary.set_index("algorithm")
    table = report_tables.costs_table(found, "bible_lm")
    for row in table.rows:
        mine = summary.loc[row[0].removesuffix(" (reference)")]
        shown = dict(zip(table.headers, row, strict=True))
        assert shown["steps to target"].split()[0] == text.steps(mine["steps"])
        assert shown["time to target"].startswith(text.seconds(mine["time"]))
        assert shown["ms/step"] == text.milliseconds(mine["ms_per_step"])
        assert shown["best loss"] == text.number(mine["best"])


# Files.


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Leaderboard, Path]:
    root = tmp_path_factory.mktemp("logs")
    hits: Hits = TWO | {"slow_&_50%": {"ogbg": [9000.0] * 3, "wmt": [None] * 3}}
    found = board(root, hits, workloads="ogbg,wmt", shares=(0.0, 0.1))
    path = tmp_path_factory.mktemp("out")
    output.write_leaderboard(found, logs.read(root), path)
    return found, path


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open() as lines:
        return list(csv.DictReader(lines))


def test_csv_files(written: tuple[Leaderboard, Path]) -> None:
    found, path = written
    costs = {row["submission"]: row for row in read_csv(path / "costs.csv")}
    assert costs["fast"] == {"submission": "fast", "ogbg": "2000.0", "wmt": "8000.0"}
    assert costs["slow_&_50%"]["wmt"] == "inf"
    assert len(read_csv(path / "studies.csv")) == 3 * 2 * 3
    gains = {(row["submission"], row["workload"]): row["speedup"] for row in read_csv(path / "speedups.csv")}
    assert (gains["fast", "ogbg"], gains["slow_&_50%", "wmt"]) == ("2.0", "")
    corners = [row for row in read_csv(path / "profiles.csv") if row["submission"] == "baseline"]
    assert [(float(row["tau"]), float(row["share"])) for row in corners] == [(1.0, 0.5), (2.0, 1.0), (4.0, 1.0)]
    assert {row["share"] for row in read_csv(path / "sweep.csv")} == {"0.0", "0.1"}
    cells = {(row["submission"], row["workload"]): row for row in read_csv(path / "cells.csv")}
    assert cells["slow_&_50%", "ogbg"]["reason"] == "over 4 times the best"
    assert float(cells["fast", "ogbg"]["share_to_target"]) == pytest.approx(2000 / 11303)
    assert [row["submission"] for row in read_csv(path / "ranking.csv")] == list(found.ranking.index)


def test_json_names_what_it_rests_on(written: tuple[Leaderboard, Path]) -> None:
    found, path = written
    data = json.loads((path / "leaderboard.json").read_text())
    assert data["targets"]["ogbg"] == {
        "metric": "mean_average_precision",
        "direction": "maximize",
        "target": 0.28098,
        "budget_sec": 11303.0,
        "step_hint": 52000.0,
        "relaxed_by": 0.0,
    }
    assert data["inputs"] == list(found.inputs)
    assert (data["benchmark"], data["ruleset"], data["studies"], data["trials"]) == ("1.0", "external", 3, 5)
    assert data["code"] == output.code_version()
    assert "+" in data["code"]


def test_latex_is_escaped(written: tuple[Leaderboard, Path]) -> None:
    _, path = written
    content = (path / "leaderboard.tex").read_text()
    assert r"slow\_\&\_50\% &" in content
    assert content.count(r"\begin{tabular}") == content.count(r"\end{tabular}") == 2
    rows = [line for line in content.splitlines() if line.endswith(r"\\")]
    assert {line.count(" & ") for line in rows[:4]} == {
        len(leaderboard_tables.ranking_table(written[0]).headers) - 1
    }
    assert latex.escape("a_b < 5 %") == r"a\_b $<$ 5 \%"


def test_misses_are_grouped(written: tuple[Leaderboard, Path]) -> None:
    found, _ = written
    table = leaderboard_tables.misses_table(found)
    assert {row[0]: row[1:] for row in table.rows} == {
        "fast": ["0 of 2", "–"],
        "baseline": ["0 of 2", "–"],
        "slow_&_50%": ["2 of 2", "ogbg: over 4 times the best · wmt: never reached"],
    }
    distances = {row[0]: row[1:] for row in leaderboard_tables.distance_table(found).rows}
    assert distances["slow_&_50%"] == ["·", "10.0"]  # the curves of misses end a tenth below the target


def test_profiles_as_numbers(written: tuple[Leaderboard, Path]) -> None:
    table = leaderboard_tables.profile_table(written[0])
    rows = {row[0]: dict(zip(table.headers[1:], row[1:], strict=True)) for row in table.rows}
    assert (rows["baseline"]["1"], rows["baseline"]["1.5"], rows["baseline"]["2"]) == ("50 %", "50 %", "100 %")


def test_a_terminal_without_the_characters(tmp_path: Path) -> None:
    """Names and dashes that an ASCII terminal cannot show do not stop a command."""
    import os
    import subprocess
    import sys

    write_runs(tmp_path / "läufe", {"nadamw": 1.0, "kfäc": 0.2}, workloads=("bible_lm",))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONIOENCODING": "ascii"}
    for command in ("leaderboard", "lint"):
        done = subprocess.run(
            [sys.executable, "-m", "scoring", command, str(tmp_path / "läufe")],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert not done.stderr


def test_cut_json_after_a_crash(tmp_path: Path) -> None:
    """The report is written whatever was left of the files beside the measurements."""
    for damage, content in (("empty", ""), ("cut", '{"workload.step_h'), ("null", "null")):
        folder = write_trial(tmp_path / damage / "study_0" / "bible_lm_pytorch" / "trial_1", "bible_lm", plain())
        (folder / "hparams.json").write_text(content)
        (folder / "flags_0.json").write_text(content)
    whole = curve("bible_lm", 2.0)
    write_trial(tmp_path / "whole" / "study_0" / "bible_lm_pytorch" / "trial_1", "bible_lm", whole)
    found = report.build(logs.read(tmp_path))
    assert found.summary.set_index("algorithm")["state"].to_dict() == dict.fromkeys(
        ("cut", "empty", "null", "whole"), "hit"
    )
    assert (found.oddities["what"] == "unreadable JSON").sum() == 6


def test_findings_keep_their_places(tmp_path: Path) -> None:
    """A table of findings has the same columns, empty or not."""
    write_official(tmp_path, TWO, "1.0")
    found = logs.read(tmp_path).oddities
    assert isinstance(found, pd.DataFrame)
    assert list(found.columns) == ["level", "where", "what", "detail", "action", "count"]


def test_steps_of_an_inner_loop_are_marked(tmp_path: Path) -> None:
    """One submission takes a hundredth of the steps, each a hundred times as long: the others miss by steps."""
    for name, steps in (("a", 3000), ("b", 2900), ("loop", 30)):
        for study in range(3):
            rows = official_rows("ogbg", 2000.0, "1.0")
            rows["global_step"] = (np.arange(1, len(rows) + 1) * steps) // len(rows)
            folder = tmp_path / name / f"study_{study}" / "ogbg_jax" / "trial_1"
            write_trial(folder, "ogbg", rows, official_meta("ogbg", "1.0"))
    found = leaderboard.build(logs.read(tmp_path), workloads="ogbg", replicates=20)
    table = leaderboard_tables.ranking_table(found)
    shown = {row[0]: row[table.headers.index("rank by steps")] for row in table.rows}
    assert shown == {"loop": "1‡", "b": "2", "a": "2"}
    assert "steps do not compare" in table.note


def test_where_submissions_stand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The page of one command: scores by both procedures, time, steps, relaxed targets."""
    write_official(tmp_path / "logs", TWO, "1.0")
    path = tmp_path / "docs" / "standing.md"
    assert main(["standing", str(tmp_path / "logs"), f"--output={path}"]) == 0
    page = path.read_text()
    assert "python -m scoring standing logs --output=" in page
    official = parity.scores(logs.read(tmp_path / "logs"), versions.load("1.0"))
    assert f"| fast | jax | {official['fast']:.4f} (1) |" in page
    for heading in ("## By time", "## By steps", "## Under relaxed targets", "### Milliseconds per step"):
        assert heading in page
    assert "nobody" in page  # most workloads were run by none


def test_the_columns_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["columns"]) == 0
    assert capsys.readouterr().out.count("\n| ") == 2 + len(columns.COLUMNS)


def test_a_loop_of_updates_wins_no_report(tmp_path: Path) -> None:
    for name, ms in (("a", 1000.0), ("b", 1100.0), ("loop", 100_000.0)):
        rows = plain(ms=ms)
        if name == "loop":
            rows["global_step"] = np.arange(1, len(rows) + 1)
            rows["score"] = rows["accumulated_submission_time"] = rows["total_duration"] = (
                10.0 * rows["global_step"]
            )
        write_trial(tmp_path / name / "study_0" / "bible_lm_pytorch" / "trial_1", "bible_lm", rows)
    found = report.build(logs.read(tmp_path))
    assert found.summary.set_index("algorithm")["steps"].idxmin() == "loop"
    said = "Fewest steps to target: a on bible_lm (70, by time ahead of 1 with as many"
    assert report_page.verdict(found).startswith(said)
    table = report_tables.costs_table(found, "bible_lm")
    assert {row[0]: row[2] for row in table.rows} == {"a": "70", "b": "70", "loop": "7 ‡"}
    assert "steps do not compare" in table.note


def test_no_file_of_an_earlier_run_stays(tmp_path: Path) -> None:
    found = board(tmp_path / "logs", TWO, workloads="ogbg,wmt", shares=(0.1,))
    runs = logs.read(tmp_path / "logs")
    (tmp_path / "out").mkdir()
    output.write_leaderboard(found, runs, tmp_path / "out")
    assert (tmp_path / "out" / "sweep.csv").exists()
    output.write_leaderboard(leaderboard.build(runs, replicates=20), runs, tmp_path / "out")
    assert not (tmp_path / "out" / "sweep.csv").exists()
    write_runs(tmp_path / "many", {f"a{k}": 1.0 for k in range(7)}, studies=1, workloads=("bible_lm",))
    few, all_of_them = (logs.read(tmp_path / "many").select(submission=names) for names in ("a0,a1", "a*"))
    output.write_report(report.build(few), few, tmp_path / "out")
    assert (tmp_path / "out" / "curves.png").exists()
    output.write_report(report.build(all_of_them), all_of_them, tmp_path / "out")
    assert not (tmp_path / "out" / "curves.png").exists()
