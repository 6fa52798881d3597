"""The tables of docs/official.md keep what they have, and show what the kept records say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks.official import rows, table
from benchmarks.official.conditions import COMPILED_STATISTICS, problems
from benchmarks.official.record import Failure, Record
from commands.errors import UserError
from workloads import algoperf

DOCS = Path(__file__).resolve().parents[2] / "docs"
HERE = "Python 3.11.7, jax 0.7.0; one thread of a CPU."
NEWER = HERE.replace("0.7.0", "0.8.0")
TEXT = "# Title\n" + "".join(f"\n{rows.BEGIN.format(v)}\n{rows.END}\n\nMore.\n" for v in rows.VERSIONS)


def record(**changes):
    values = {
        "workload": "ogbg",
        "framework": "jax",
        "submission": "kfac_reduce",
        "data_parallel": False,
        "losses": [3.0, 2.5, 2.0, 1.5, 1.0, 7.0],
        "seconds": {"plain": 0.5, "statistics": 4.0},
        "covered": 999,
        "parameters": 1000,
        "gradient_errors": {"a": 1e-7, "b": 3e-7},
        "counters": {"steps": 5, "a/refreshes": 2, "a/skipped": 0, "a/cosine": 0.5},
        "resumed": True,
        "peak_rss_mb": 2048.0,
    }
    return Record(**(values | changes))


def test_a_row():
    line = rows.row(record(max_factor_dim=512, unoptimized=True))
    assert line == (
        "| ogbg | jax | kfac_reduce | 5, unoptimized, blocks of 512 | 0.50 | 4.00 |  |  |  | 3 → 1 "
        "| 99.9 | 2: 3e-07 | yes | 2.0 |"
    )
    failed = rows.row(Failure("ogbg", "jax", "nadamw", "ValueError: a|b"))
    assert "failed: ValueError: a/b" in failed
    assert {line.count("|"), failed.count("|")} == {rows.HEADER.splitlines()[0].count("|")}


def written(text, version, environment, *results):
    """The text with rows of these, as the command writes them."""
    lines = rows.rows_of(text, version)
    lines |= {rows.case_of(result): rows.Row(environment, rows.row(result)) for result in results}
    return rows.insert(text, version, lines)


def test_compiled_statistics_are_said():
    compiled = {"framework": "pytorch", "compiled": True}
    assert "| 5, compiled |" in rows.row(record(**compiled))
    assert "| 5, compiled, statistics too |" in rows.row(record(**compiled, note=COMPILED_STATISTICS))
    assert "| 5, compiled, statistics not |" in rows.row(
        record(**compiled, note="statistics steps run uncompiled: a")
    )


def test_other_rows_stay_in_the_order_of_the_cases():
    first, second = record(submission="nadamw"), record(workload="criteo1tb")
    text = written(written(TEXT, "1.0", HERE, first), "1.0", HERE, second)
    assert [row.line for row in rows.rows_of(text, "1.0").values()] == [rows.row(second), rows.row(first)]
    assert text.startswith("# Title\n\n")
    assert text.endswith("\n\nMore.\n")
    assert text.count(HERE) == 1
    assert "- criteo1tb: " in text
    assert "- wmt: " not in text


def test_versions_of_algoperf_stand_apart():
    older, newer = record(submission="nadamw"), record(submission="nadamw", losses=[2.0] * 6)
    text = written(written(TEXT, "0.6", HERE, older), "1.0", NEWER, newer)
    case = rows.case_of(older)
    assert rows.rows_of(text, "0.6") == {case: rows.Row(HERE, rows.row(older))}
    assert rows.rows_of(text, "1.0") == {case: rows.Row(NEWER, rows.row(newer))}
    with pytest.raises(ValueError, match=r"has no lines .*AlgoPerf 0\.6"):
        rows.rows_of(TEXT.replace("AlgoPerf 0.6", ""), "0.6")


def test_a_row_made_in_another_environment_leaves_the_table_of_the_old_one():
    first, second = record(submission="nadamw"), record(workload="criteo1tb")
    text = written(TEXT, "1.0", HERE, first, second)
    renewed = record(submission="nadamw", peak_rss_mb=1.0)
    text = written(text, "1.0", NEWER, renewed)
    assert rows.rows_of(text, "1.0") == {
        rows.case_of(second): rows.Row(HERE, rows.row(second)),
        rows.case_of(first): rows.Row(NEWER, rows.row(renewed)),
    }
    assert text.count(rows.HEADER) == 2
    with pytest.raises(ValueError, match="what was installed"):
        rows.rows_of(text.replace(HERE, ""), "1.0")


def test_records_of_another_version_are_refused(tmp_path, monkeypatch):
    case = ("ogbg", "jax", "kfac_reduce")
    (tmp_path / f"{table.case_label(*case)}.json").write_text(json.dumps(dataclasses.asdict(record())))
    monkeypatch.setattr(algoperf, "version", lambda: "0.6")
    assert table.run_case(*case, records=tmp_path) == record()
    monkeypatch.setattr(algoperf, "version", lambda: "1.0")
    with pytest.raises(UserError, match=r"made with AlgoPerf 0\.6, and 1\.0 is installed"):
        table.run_case(*case, records=tmp_path)


def test_records_come_back_without_most_figures_of_single_layers(tmp_path):
    path = tmp_path / "raw.jsonl"
    rows.write_raw_records(path, [record(), record(workload="criteo1tb")])
    rows.write_raw_records(path, [record(peak_rss_mb=1.0)])
    rows.write_raw_records(path, [record(algoperf="1.0")])
    counters = {"steps": 5, "a/refreshes": 2}
    expected = [record(algoperf="1.0", counters=counters), record(workload="criteo1tb", counters=counters)]
    expected.append(record(counters=counters, peak_rss_mb=1.0))
    assert list(rows.raw_records(path).values()) == expected


def test_the_documented_rows_are_those_of_the_kept_records():
    text = (DOCS / "official.md").read_text(encoding="utf-8")
    documented = {version: rows.rows_of(text, version) for version in rows.VERSIONS}
    kept = rows.raw_records(DOCS / "results" / "official.jsonl")
    assert {version for version, _ in kept} == set(rows.VERSIONS)
    for (version, case), result in kept.items():
        shown = documented[version].get(case)
        assert shown is not None
        assert shown.line == rows.row(result)
        assert result.environment in ("", shown.environment)
        # What a row does not meet, the page says in these words.
        assert [problem for problem in problems(result) if problem not in text] == [], case
