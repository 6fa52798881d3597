"""What docs/architecture.md says of the library's files: the list of twins is whole, and imports go one way."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import algoperf_kfac
from tests.contract.frameworks import NAMES

LIBRARY = Path(algoperf_kfac.__file__).parent
PAGE = Path(__file__).resolve().parents[2] / "docs" / "architecture.md"


def rows() -> list[list[str]]:
    """The table of twins: file in PyTorch, file in JAX, difference."""
    section = PAGE.read_text().partition("## Twin files")[2].partition("\n## ")[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line[:1] == "|"]
    return cells[2:]  # without head and rule


@pytest.mark.parametrize("framework", NAMES)
def test_every_file_is_in_the_list_of_twins(framework: str) -> None:
    folder = LIBRARY / framework
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py"))
    assert sorted(row[NAMES.index(framework)].strip("`") for row in rows() if row[NAMES.index(framework)]) == files


def test_twins_stand_side_by_side_with_what_differs() -> None:
    alone = [[row[i] for row in rows() if row[i] and not row[1 - i]] for i in (0, 1)]
    assert not set(alone[0]) & set(alone[1])
    assert all(difference and "\n" not in difference for *_, difference in rows())


def test_the_formulas_are_where_the_page_says() -> None:
    """Every function or class that the table of formulas names is in the file it names."""
    section = PAGE.read_text().partition("## Where each formula stands")[2].partition("\n## ")[0]
    lines = [line.split("|")[2:4] for line in section.splitlines() if line[:1] == "|"][2:]
    checked = 0
    for cells in lines:
        for framework, cell in zip(NAMES, cells, strict=True):
            for part in cell.split(";"):
                file, *names = re.findall(r"`([^`]+)`", part) or [""]
                if not file.endswith(".py"):
                    assert not names
                    continue
                folder = LIBRARY if "ground floor" in part else LIBRARY / framework
                defined = {
                    node.name
                    for node in ast.walk(ast.parse((folder / file).read_text()))
                    if isinstance(node, ast.FunctionDef | ast.ClassDef)
                }
                assert {part for name in names for part in name.split(".")} <= defined, (file, names)
                checked += 1
    assert checked > 30


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports when it is imported itself."""
    statements = list(ast.parse(path.read_text()).body)
    for node in statements:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        for inner in ast.walk(node) if isinstance(node, ast.If | ast.Try) else [node]:
            if isinstance(inner, ast.Import):
                yield from (alias.name for alias in inner.names)
            elif isinstance(inner, ast.ImportFrom) and inner.module is not None:
                yield inner.module
                yield from (f"{inner.module}.{alias.name}" for alias in inner.names)


def modules() -> dict[str, Path]:
    found = {}
    for path in LIBRARY.rglob("*.py"):
        parts = path.relative_to(LIBRARY.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def test_no_import_closes_a_circle() -> None:
    """But for what `from package import module` asks of the package, which is being imported then."""
    files = modules()
    graph = {}
    for name, path in files.items():
        known = {other for other in imported(path) if other in files} - {name}
        graph[name] = {other for other in known if not any(longer.startswith(f"{other}.") for longer in known)}
    assert list(graphlib.TopologicalSorter(graph).static_order())


def rooms() -> list[set[str]]:
    """The rooms of a half in the page's order: names of files and of folders."""
    section = PAGE.read_text().partition("## What each room may know")[2].partition("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line[:1] == "|"][3:]  # head, rule, ground floor
    return [{name.rstrip("/") for name in re.findall(r"`([^`]+)`", cell)} for cell in cells]


@pytest.mark.parametrize("framework", NAMES)
def test_a_room_knows_those_above_it(framework: str) -> None:
    number = {name: i for i, names in enumerate(rooms()) for name in names}
    half = f"algoperf_kfac.{framework}."
    files = modules()

    def room(module: str) -> int:
        return number[module.removeprefix(half).partition(".")[0]]

    for name, path in files.items():
        for other in imported(path):
            if name.startswith(half) and other.startswith(half) and other in files:
                assert room(other) <= room(name), f"{name} imports {other}"


@pytest.mark.parametrize("framework", NAMES)
def test_no_half_knows_the_other(framework: str) -> None:
    other = {"pytorch": ("jax", "algoperf_kfac.jax"), "jax": ("torch", "algoperf_kfac.pytorch")}[framework]
    for path in (LIBRARY / framework).rglob("*.py"):
        assert not [name for name in imported(path) if name.startswith(other)], path


def test_the_ground_floor_knows_no_framework() -> None:
    halves = ("torch", "jax", "flax", "optax", "numpy", "algoperf_kfac.pytorch", "algoperf_kfac.jax")
    for path in LIBRARY.glob("*.py"):
        assert not [name for name in imported(path) if name.startswith(halves)], path
