"""The shape of the package: imports go one way, the interface works as documented, columns stand in one list."""

from __future__ import annotations

import ast
import doctest
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import scoring
from scoring.judge import cells, columns, leaderboard, report, trials, versions
from scoring.read import logs
from scoring.show import report_tables, text
from tests.scoring.official import ROOT
from tests.scoring.trees import official_meta, official_rows, write_official, write_trial

PACKAGE = ROOT / "scoring"
# Each room may import itself and those before it.
ROOMS = ("read", "judge", "show", "pages")


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("scoring"):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {part for name in names for part in name.split(".")[1:2]}
    return found & set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_one_way(room: str) -> None:
    allowed = set(ROOMS[: ROOMS.index(room) + 1])
    for path in (PACKAGE / room).glob("*.py"):
        assert imported(path) <= allowed, path


def test_what_every_room_uses_knows_no_room() -> None:
    for name in ("facts", "frames", "metrics", "oddities"):
        assert not imported(PACKAGE / f"{name}.py")


def test_the_documented_example() -> None:
    result = doctest.testmod(scoring)
    assert result.failed == 0
    assert result.attempted >= 6


def test_there_is_one_class_of_errors() -> None:
    classes = [
        node.name
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and re.search("Error|Exception", " ".join(map(ast.unparse, node.bases)))
    ]
    assert not classes, "commands.errors.UserError is the one"


def test_the_public_names_exist() -> None:
    for name in scoring.__all__:
        assert getattr(scoring, name).__doc__


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> logs.Logs:
    root = tmp_path_factory.mktemp("runs")
    return scoring.read(write_official(root, {"a": {"ogbg": [900.0] * 3}, "b": {"ogbg": [None] * 3}}, "1.0"))


def test_every_column_is_in_every_table(runs: logs.Logs) -> None:
    rules = versions.rules_for(runs.trials)
    reached = trials.reach(runs, rules)
    assert list(reached.columns) == [*trials.KEEP, *columns.NAMES]
    table = cells.cells(cells.studies(reached, rules), rules)
    assert list(table.columns) == [*cells.COLUMNS, *columns.OF_CELLS]
    board = leaderboard.build(runs, workloads="ogbg", replicates=20)
    assert set(columns.OF_CELLS) <= set(board.cells.columns)
    assert set(columns.OF_CELLS) <= set(report.build(runs).summary.columns)


def test_a_column_is_one_entry(tmp_path: Path) -> None:
    """One more entry in the list, in a copy of the package, shows in every file without another edit."""
    shutil.copytree(PACKAGE, tmp_path / "scoring", ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "scoring" / "judge" / "columns.py"
    entry = 'Column("first_step", "first step", "steps", "where it began", lambda run: run.at("step", 0), "main"),'
    text_before = path.read_text()
    assert text_before.count(")\nNAMES = ") == 1
    path.write_text(text_before.replace(")\nNAMES = ", f"    {entry}\n)\nNAMES = "))
    write_official(tmp_path / "logs", {"a": {"ogbg": [900.0] * 3}}, "1.0")
    line = [sys.executable, "-m", "scoring", "report", "logs", "--output_dir=out"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "first step" in done.stdout
    for name in ("trials.csv", "studies.csv", "table.csv"):
        assert "first_step" in (tmp_path / "out" / name).read_text().splitlines()[0]
    for name in ("report.html", "report.md"):
        assert "first step" in (tmp_path / "out" / name).read_text()
    assert "first_step" in (tmp_path / "out" / "report.json").read_text()


def test_a_version_is_one_file(tmp_path: Path) -> None:
    """A data file beside the others is a version: listed, loaded, and told by its budgets."""
    shutil.copytree(PACKAGE, tmp_path / "scoring", ignore=shutil.ignore_patterns("__pycache__"))
    data = json.loads((PACKAGE / "data" / "algoperf_1.0.json").read_text()) | {"version": "1.10"}
    data["workloads"]["ogbg"] |= {"budget": 777, "step_hint": 88}
    (tmp_path / "scoring" / "data" / "algoperf_1.10.json").write_text(json.dumps(data))
    meta = official_meta("ogbg", "1.0") | {"max_allowed_runtime_sec": 777, "step_hint": 88}
    write_trial(tmp_path / "logs" / "a" / "ogbg_jax" / "trial_1", "ogbg", official_rows("ogbg", 90.0, "1.0"), meta)
    code = "import scoring; print(*scoring.versions(), scoring.rules_for(scoring.read('logs')).version)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["0.5", "0.6", "1.0", "1.10", "1.10"], done.stderr


def test_medians_on_the_tidy_table(runs: logs.Logs) -> None:
    """The rules, read off the table of evaluations alone."""
    rules = versions.rules_for(runs.trials)
    target = rules.targets["ogbg"]
    evals = runs.evals[runs.evals["believed"]]
    hits = evals[(evals[target.column] >= target.value) & (evals["time"] <= rules.budget("ogbg"))]
    first = hits.groupby(["submission", "study"], observed=True)["time"].min()
    expected = first.groupby("submission", observed=True).median().to_dict()
    table = cells.cells(cells.studies(trials.reach(runs, rules), rules), rules)
    assert table[table["cost"] < float("inf")].set_index("submission")["cost"].to_dict() == expected


def test_documentation_lists_the_columns() -> None:
    """docs/scoring.md holds the list as the code has it."""
    documented = (ROOT / "docs" / "scoring.md").read_text()
    table = text.markdown(report_tables.columns_table()).split("\n\n", 1)[1]
    assert table in documented
