"""The command that measures steps, compiled: what is run, what is said of it, and what is kept.

A backend that compiles nothing stands in for inductor, and the first steps alone are made.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import step_time

UNCOMPILED = "uncompiled: compiled_statistics=False"


def test_statistics_in_graphs_beside_those_that_run_uncompiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step_time, "SKIPPED", 1)
    page = tmp_path / "page.md"
    given = ["--compile=eager", "--workloads=mnist_vit", "--steps=2", f"--out={page}"]
    assert step_time.main(given) == 0
    head, table = page.read_text().split("\n\n| ")
    assert "--steps=2 --compile=eager" in head
    assert capsys.readouterr().out == f"| {table}"
    found = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert [row[1:4] for row in found] == [
        ["nadamw", "", ""],
        ["kfac_reduce", "4", "compiled"],
        ["kfac_reduce", "4", UNCOMPILED],
        ["kfac_expand", "8", "compiled"],
        ["kfac_expand", "8", UNCOMPILED],
        ["kfac_reduce", "1", "compiled"],
        ["kfac_reduce", "1", UNCOMPILED],
    ]
    assert found[0][5] == found[0][7] == "1.00"
    for row in found[1:]:
        assert row[4] == row[8]  # the first steps all take statistics


def test_models_in_jax_are_compiled_anyway(capsys: pytest.CaptureFixture[str]) -> None:
    assert step_time.main(["--framework=jax", "--compile"]) == 2
    assert capsys.readouterr().err == "error: --compile is for --framework=pytorch; leave it out.\n"
