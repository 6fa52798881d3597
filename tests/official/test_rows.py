"""The table of docs/official.md keeps what it has, and shows what the kept records say."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.official import rows
from benchmarks.official.conditions import problems
from benchmarks.official.record import Failure, Record

DOCS = Path(__file__).resolve().parents[2] / "docs"
HERE = "Python 3.11.7, jax 0.7.0; one thread of a CPU."
TEXT = f"# Title\n\n{rows.BEGIN}\n{rows.END}\n\nMore.\n"


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


def test_other_rows_stay_in_the_order_of_the_cases():
    first, second = record(submission="nadamw"), record(workload="criteo1tb")
    text = TEXT
    for result in (first, second):
        case = rows.case_of(result)
        text = rows.insert(text, rows.kept(text, HERE, [case]) | {case: rows.row(result)}, HERE)
    assert list(rows.rows_of(text).values()) == [rows.row(second), rows.row(first)]
    assert text.startswith("# Title\n\n")
    assert text.endswith("\n\nMore.\n")
    assert rows.kept(text, HERE, [rows.case_of(first)]) == {rows.case_of(second): rows.row(second)}


def test_rows_of_other_versions_do_not_mix():
    case = rows.case_of(record())
    text = rows.insert(TEXT, {case: rows.row(record())}, HERE)
    newer = HERE.replace("0.7.0", "0.8.0")
    with pytest.raises(ValueError, match=r"not made with .*jax 0\.8\.0"):
        rows.kept(text, newer, [("mnist", "jax", "nadamw")])
    assert rows.kept(text, newer, [case]) == {}
    with pytest.raises(ValueError, match="has no lines"):
        rows.kept("# Title", HERE, [case])


def test_records_come_back_without_most_figures_of_single_layers(tmp_path):
    path = tmp_path / "raw.jsonl"
    rows.write_raw_records(path, [record(), record(workload="criteo1tb")])
    rows.write_raw_records(path, [record(peak_rss_mb=1.0)])
    counters = {"steps": 5, "a/refreshes": 2}
    expected = [record(workload="criteo1tb", counters=counters), record(counters=counters, peak_rss_mb=1.0)]
    assert list(rows.raw_records(path).values()) == expected


def test_the_documented_rows_are_those_of_the_kept_records():
    documented = rows.rows_of((DOCS / "official.md").read_text(encoding="utf-8"))
    kept = rows.raw_records(DOCS / "results" / "official.jsonl")
    assert kept
    assert {case: documented.get(case) for case in kept} == {case: rows.row(kept[case]) for case in kept}
    assert {case: problems(result) for case, result in kept.items() if problems(result)} == {}
