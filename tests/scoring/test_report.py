"""The report: every algorithm on every workload, misses as misses, the same bytes each time."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from commands.errors import UserError
from scoring.judge import leaderboard, report
from scoring.judge.report import Report
from scoring.pages import output, write
from scoring.read import logs
from scoring.show import palette, report_tables, text
from tests.scoring.trees import META, curve, plain, write_official, write_runs, write_trial

SPEEDS = {"kfac_reduce": 2.2, "nadamw": 1.0, "sgd": 0.5}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_runs(tmp_path_factory.mktemp("runs"), SPEEDS, studies=3)
    # One algorithm stops early, one reaches the target in one study of three, one never ran the second workload.
    for study in range(3):
        short = curve("bible_lm", 0.5, seed=study, steps=100)
        write_trial(root / "early" / f"study_{study}" / "bible_lm_pytorch" / "trial_1", "bible_lm", short)
        rows = curve("mnist_vit", 2.0 if study == 0 else 0.5, seed=study)
        write_trial(root / "erratic" / f"study_{study}" / "mnist_vit_pytorch" / "trial_1", "mnist_vit", rows)
    return root


@pytest.fixture(scope="module")
def result(runs: Path) -> Report:
    return report.build(logs.read([runs], use_cache=False))


def test_the_summary_is_right(runs: Path, result: Report) -> None:
    """Medians and ratios against a computation from the CSV files alone."""
    table = result.summary.set_index(["workload", "algorithm"])
    medians = {}
    for name in ("kfac_reduce", "nadamw"):
        steps, seconds = [], []
        for study in range(3):
            rows = pd.read_csv(
                runs / name / f"study_{study}" / "bible_lm_pytorch" / "trial_1" / "eval_measurements.csv"
            )
            first = rows[rows["validation/loss"] <= META["bible_lm"]["validation_target_value"]].iloc[0]
            steps.append(first["global_step"])
            seconds.append(first["score"])
        medians[name] = np.median(steps), np.median(seconds)
        row = table.loc["bible_lm", name]
        assert (row["steps"], row["time"]) == pytest.approx(medians[name])
        assert (row["steps_low"], row["steps_high"]) == (min(steps), max(steps))
        assert row["steps_low"] <= row["steps_ci_low"] <= row["steps"] <= row["steps_ci_high"] <= row["steps_high"]
    row = table.loc["bible_lm", "kfac_reduce"]
    assert row["steps_ratio"] == pytest.approx(medians["kfac_reduce"][0] / medians["nadamw"][0])
    assert row["time_ratio"] == pytest.approx(medians["kfac_reduce"][1] / medians["nadamw"][1])
    assert row["ms_per_step"] == pytest.approx(100, rel=0.02)


def test_no_algorithm_is_dropped(result: Report) -> None:
    table = result.summary.set_index(["workload", "algorithm"])
    assert len(table) == 2 * 5
    assert table["state"].loc["bible_lm"].to_dict() == {
        "nadamw": "hit",
        "early": "unfinished",
        "erratic": "no data",
        "kfac_reduce": "hit",
        "sgd": "missed",
    }
    erratic = table.loc["mnist_vit", "erratic"]
    assert (erratic["state"], erratic["hits"], erratic["steps"]) == ("missed", 1, np.inf)
    assert np.isfinite(erratic["steps_low"])


def test_misses_are_shown_as_misses(result: Report) -> None:
    shown = {table.caption.split(":")[0]: text.terminal(table) for table in report_tables.tables(result)}
    bible = shown["bible_lm"]
    assert re.search(r"sgd +0 of 3 +not reached \(best 1\.8\d+\)", bible)
    assert re.search(r"early +0 of 3 +unfinished \(best 3\.\d+ at step 100\)", bible)
    assert re.search(r"erratic +0 of 0 +no data", bible)
    assert re.search(r"nadamw \(reference\) +3 of 3 .* 1\.00 ", bible)
    assert "validation/loss at most 1.7" in bible
    assert "validation/accuracy at least 0.93" in shown["mnist_vit"]


def test_reference(runs: Path, result: Report) -> None:
    assert result.reference == "nadamw"
    loaded = logs.read([runs])
    other = report.build(loaded, reference="kfac_reduce").summary.set_index(["workload", "algorithm"])
    assert other.loc["bible_lm", "nadamw"]["steps_ratio"] > 1.5
    missed = report.build(loaded, reference="sgd").summary.set_index(["workload", "algorithm"])
    assert missed["steps_ratio"].loc["bible_lm"].isna().all()
    with pytest.raises(UserError, match="no such algorithm; there are early, erratic"):
        report.build(loaded, reference="adam")


def test_another_target(runs: Path) -> None:
    easier = report.build(logs.read([runs]), goals={"bible_lm": 2.5}).summary.set_index(["workload", "algorithm"])
    assert easier.loc["bible_lm", "sgd"]["state"] == "hit"


def test_expected_studies(runs: Path) -> None:
    loaded = logs.read([runs])
    table = report.build(loaded, studies=7)
    assert not np.isfinite(table.summary["steps"]).any()
    assert "missing study" in set(table.oddities["what"])
    # Three hits of five are still a median.
    found = report.build(loaded, studies=5).summary.set_index(["workload", "algorithm"]).loc["bible_lm", "nadamw"]
    whole = report.build(loaded).summary.set_index(["workload", "algorithm"]).loc["bible_lm", "nadamw"]
    assert found["steps"] == whole["steps_high"]
    assert found["steps_high"] == np.inf


def test_two_frameworks_are_two_algorithms(tmp_path: Path) -> None:
    for framework, speed in (("jax", 1.0), ("pytorch", 2.0)):
        folder = tmp_path / "a" / "study_0" / f"bible_lm_{framework}" / "trial_1"
        write_trial(folder, "bible_lm", curve("bible_lm", speed))
    found = report.build(logs.read([tmp_path]))
    assert set(found.summary["algorithm"]) == {"a (jax)", "a (pytorch)"}
    assert "mixed frameworks" in set(found.oddities["what"])


def test_names_with_blanks_brackets_and_markup(tmp_path: Path) -> None:
    name = "a [b] <i>|c d"
    write_trial(tmp_path / name / "study_0" / "bible_lm_jax" / "trial_1", "bible_lm", plain())
    loaded = logs.read([tmp_path])
    found = report.build(loaded)
    output.write_report(found, loaded, write.folder(str(tmp_path / "out")))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<i>" not in page
    assert "a [b] &lt;i&gt;|c d" in page
    assert "a [b] <i>\\|c d" in (tmp_path / "out" / "report.md").read_text()


@pytest.fixture(scope="module")
def written(runs: Path, result: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out")
    output.write_report(result, logs.read([runs], use_cache=False), folder)
    return folder


FILES = [
    "curves.png",
    "curves.svg",
    "evaluations.csv",
    "oddities.csv",
    "report.html",
    "report.json",
    "report.md",
    "studies.csv",
    "table.csv",
    "trials.csv",
]


def test_the_same_bytes_each_time(runs: Path, written: Path, tmp_path: Path) -> None:
    loaded = logs.read([runs], use_cache=False)
    output.write_report(report.build(loaded), loaded, tmp_path)
    assert sorted(path.name for path in written.iterdir()) == FILES
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (written / name).read_bytes(), name


class _Page(HTMLParser):
    """Collects what a page is made of, and checks that its tags are balanced."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(content)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_page(content: str, figures_at_least: int) -> None:
    page = _Page(content)
    count = {tag: sum(name == tag for name, _ in page.tags) for tag, _ in page.tags}
    assert count["svg"] >= count["figure"] >= figures_at_least
    for tag, attributes in page.tags:
        if tag == "svg" and attributes.get("aria-hidden") != "true":
            assert attributes["role"] == "img"
            assert attributes["aria-labelledby"]
    assert count["h1"] == 1
    assert not {"script", "link", "img", "iframe", "object"} & set(count)
    for tag, attributes in page.tags:
        if tag == "figure" or attributes.get("class") == "scroll":
            assert attributes["tabindex"] == "0"
            assert attributes["aria-label"]
        if tag == "a":
            assert (attributes["href"] or "").startswith("#")
    names = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(names) == len(set(names))
    targets = set(re.findall(r'(?:url\(#|href="#)([^")]+)', content))
    assert targets <= set(names)
    outside = set(re.findall(r'https?://[^"\s<]+', content))
    assert all(url.startswith("http://www.w3.org/") for url in outside)
    assert "prefers-color-scheme: dark" in content
    assert "@media print" in content
    assert palette.INK["light"] not in re.sub(r"<style>.*?</style>", "", content, flags=re.DOTALL)


def test_the_page(written: Path) -> None:
    page = (written / "report.html").read_text()
    check_page(page, 2)
    for name in (*SPEEDS, "early", "erratic"):
        assert name in re.sub("<wbr>", "", page)


def test_the_tables_behind_it(written: Path) -> None:
    table = pd.read_csv(written / "table.csv")
    assert table["steps"].isin([np.inf]).any()
    evaluations = pd.read_csv(written / "evaluations.csv")
    assert list(evaluations.columns[:6]) == [
        "submission",
        "study",
        "workload",
        "framework",
        "trial",
        "hyperparameters",
    ]
    assert (written / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "![Learning curves](curves.png)" in (written / "report.md").read_text()


def test_colour_is_the_algorithm_and_line_the_framework() -> None:
    names = [f"{name} ({framework})" for name in ("a", "b", "nadamw") for framework in ("jax", "pytorch")]
    look = palette.styles(names, "nadamw (jax)")
    assert look["nadamw (jax)"].colour == look["nadamw (pytorch)"].colour == "ink"
    assert look["a (jax)"].colour == look["a (pytorch)"].colour != look["b (jax)"].colour
    assert {style.dash for name, style in look.items() if "jax" in name} == {palette.DASHES["jax"]}
    assert {style.dash for name, style in look.items() if "pytorch" in name} == {""}
    assert {style.dash for style in palette.styles(["a", "b"], "", {"a": "jax", "b": "jax"}).values()} == {""}


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def hits(scale: float) -> dict[str, list[float | None]]:
        return {
            "imagenet_vit": [scale * t for t in (9000.0, 9500.0, 10000.0)],
            "criteo1tb": [None, None, 700.0 * scale],
        }

    return write_official(tmp_path_factory.mktemp("official"), {"baseline": hits(2.0), "fast": hits(1.0)}, "0.6")


def test_leaderboard_files(official: Path, runs: Path, tmp_path: Path) -> None:
    """Our own runs lie beside the official logs; what they did not run is a miss with its reason."""
    loaded = logs.read([official, runs / "kfac_reduce"])
    board = leaderboard.build(loaded, replicates=50)
    assert board.ranking["score"].to_dict() == {"fast": 1 / 8, "baseline": pytest.approx((4 - 2) / 3 / 8)} | {
        "kfac_reduce": 0.0
    }
    reasons = board.cells.set_index(["submission", "workload"])["reason"]
    assert reasons["fast", "criteo1tb"] == "reached in 1 of 3 studies"
    assert reasons["fast", "wmt"] == "no data"
    assert reasons["fast", "imagenet_vit"] == ""
    output.write_leaderboard(board, loaded, tmp_path)
    check_page((tmp_path / "leaderboard.html").read_text(), 4)
    data = json.loads((tmp_path / "leaderboard.json").read_text())
    assert data["benchmark"] == "0.6"
    assert [row["submission"] for row in data["ranking"]] == ["fast", "baseline", "kfac_reduce"]
    assert sum(cell["ratio"] is None for cell in data["cells"]) == 3 * 8 - 2
    for name in ("ranking.csv", "cells.csv", "table.csv", "trials.csv"):
        assert len(pd.read_csv(tmp_path / name))


def test_leaderboard_of_chosen_workloads(official: Path, runs: Path) -> None:
    loaded = logs.read([official, runs])
    vit = leaderboard.build(loaded, workloads="imagenet_vit", replicates=20).ranking["score"]
    assert vit["fast"] == 1.0
    assert vit["baseline"] == pytest.approx(2 / 3)
    present = leaderboard.build(loaded, workloads="present", replicates=20)
    assert present.rules.base == ("criteo1tb", "imagenet_vit", "bible_lm", "mnist_vit")
    own = leaderboard.build(loaded, workloads="bible_lm", replicates=20)
    assert own.ranking["score"].idxmax() == "kfac_reduce"
    assert leaderboard.build(loaded, workloads="qualification", replicates=20).rules.base == (
        "criteo1tb",
        "ogbg",
        "wmt",
    )
    fixed = leaderboard.build(loaded, workloads="imagenet_vit", reference="baseline", relative=True, replicates=20)
    assert fixed.ranking["score"][["baseline", "fast"]].tolist() == [1.0, pytest.approx((4 - 0.5) / 3)]
    assert fixed.ranking["speedup"]["fast"] == pytest.approx(2.0)


def test_leaderboard_of_our_own_runs(runs: Path) -> None:
    board = leaderboard.build(logs.read([runs]), cost="steps", replicates=20)
    assert board.rules.base == ("bible_lm", "mnist_vit")
    assert board.ranking.index[0] == "kfac_reduce"
    assert board.reference == "nadamw"
    assert board.ranking["speedup"]["kfac_reduce"] > 1.5


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.12345, "0.1235"),
        (1234.5, "1,234"),
        (0.0, "0"),
        (np.nan, "–"),
        (np.inf, "miss"),
        (1e-7, "1.000e-07"),
        (30.849, "30.85"),
    ],
)
def test_numbers(value: float, shown: str) -> None:
    assert text.number(value) == shown


def test_intervals_and_batch_sizes(tmp_path: Path, result: Report) -> None:
    rows = {tuple(row[:2]): row[2:] for row in report_tables.interval_table(result).rows}
    assert rows["bible_lm", "sgd"] == ["miss to miss", "miss to miss", "miss to miss", "miss to miss"]
    assert rows["bible_lm", "nadamw"][1] == "1.00 to 1.00"
    assert ("bible_lm", "erratic") not in rows
    write_trial(tmp_path / "a" / "bible_lm_jax" / "trial_1", "bible_lm", plain(), None, batch_size=64)
    (table,) = report_tables.tables(report.build(logs.read([tmp_path])))
    assert (table.headers[-1], table.rows[0][-1]) == ("batch", "64")
    assert report_tables.tables(result)[0].headers[-1] == "ms/step"


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> logs.Logs:
    """NadamW in both frameworks, slower in JAX, K-FAC in both on one workload, SGD in JAX alone."""
    root = tmp_path_factory.mktemp("both")
    speeds = {("nadamw", "pytorch"): 1.0, ("nadamw", "jax"): 0.8, ("kfac", "pytorch"): 2.0, ("kfac", "jax"): 1.6}
    for (name, framework), speed in {**speeds, ("sgd", "jax"): 0.9}.items():
        folder = root / name / "study_0" / f"bible_lm_{framework}" / "trial_1"
        write_trial(folder, "bible_lm", curve("bible_lm", speed))
    return logs.read([root])


def test_each_framework_has_its_own_reference(both: logs.Logs) -> None:
    found = report.build(both)
    table = found.summary.set_index("algorithm")
    order = ["nadamw (jax)", "kfac (jax)", "sgd", "nadamw (pytorch)", "kfac (pytorch)"]
    assert list(found.summary["algorithm"]) == order
    for name, other in (
        ("sgd", "nadamw (jax)"),
        ("kfac (jax)", "nadamw (jax)"),
        ("kfac (pytorch)", "nadamw (pytorch)"),
    ):
        assert table.loc[name, "steps_ratio"] == table.loc[name, "steps"] / table.loc[other, "steps"]
        assert table.loc[name, "ms_ratio"] == table.loc[name, "ms_per_step"] / table.loc[other, "ms_per_step"]
    assert (table.loc[["nadamw (jax)", "nadamw (pytorch)"], "steps_ratio"] == 1.0).all()
    assert table.loc["nadamw (jax)", "steps"] > table.loc["nadamw (pytorch)", "steps"]
    words = text.markdown(report_tables.tables(found)[0])
    assert "nadamw (jax) and nadamw (pytorch), each for its framework" in words
    assert words.count("(reference)") == 2


def test_a_framework_that_was_not_run_on_a_workload_takes_no_rows(tmp_path: Path) -> None:
    """But a line says so; an algorithm that is missing beside its reference is a gap, and has its row."""
    for workload, runs in {
        "bible_lm": [("nadamw", "pytorch"), ("kfac", "pytorch"), ("nadamw", "jax"), ("kfac", "jax")],
        "mnist_vit": [("nadamw", "pytorch")],
    }.items():
        for name, framework in runs:
            folder = tmp_path / name / "study_0" / f"{workload}_{framework}" / "trial_1"
            write_trial(folder, workload, curve(workload, 1.0))
    first, second = report_tables.tables(report.build(logs.read([tmp_path])))
    assert [row[0].split(" (ref")[0] for row in first.rows] == [
        "nadamw (jax)",
        "kfac (jax)",
        "nadamw (pytorch)",
        "kfac (pytorch)",
    ]
    assert [row[:3] for row in second.rows[1:]] == [["kfac (pytorch)", "0 of 0", "no data"]]
    assert "Not run here: nadamw (jax), kfac (jax)." in second.note
    assert "Not run here" not in first.note


def test_a_reference_named_in_full_is_that_of_both_frameworks(both: logs.Logs) -> None:
    table = report.build(both, reference="nadamw (jax)").summary.set_index("algorithm")
    assert table.loc["kfac (pytorch)", "steps_ratio"] == (
        table.loc["kfac (pytorch)", "steps"] / table.loc["nadamw (jax)", "steps"]
    )
    by_kfac = report.build(both, reference="kfac").summary.set_index("algorithm")
    assert by_kfac.loc["nadamw (pytorch)", "steps_ratio"] > 1
    with pytest.raises(UserError, match="adam"):
        report.build(both, reference="adam")


def test_frameworks_stand_side_by_side(both: logs.Logs, runs: Path, result: Report, tmp_path: Path) -> None:
    found = report.build(both)
    table = report_tables.framework_table(found)
    assert table is not None
    summary = found.summary.set_index("algorithm")
    assert [row[1] for row in table.rows] == ["nadamw", "kfac"]
    for row in table.rows:
        steps = [summary.loc[f"{row[1]} ({framework})", "steps"] for framework in ("pytorch", "jax")]
        assert [float(cell.replace(",", "")) for cell in row[2:4]] == steps
        assert float(row[4]) == pytest.approx(steps[1] / steps[0], abs=0.006)
    output.write_report(found, both, write.folder(str(tmp_path / "out")))
    assert "PyTorch and JAX" in (tmp_path / "out" / "report.md").read_text()
    assert "PyTorch and JAX" in (tmp_path / "out" / "report.html").read_text()
    assert report_tables.framework_table(result) is None
