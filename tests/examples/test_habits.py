"""The recipes run as they stand, one after the other, and the library has nothing to warn of."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import warnings
from pathlib import Path

import torch

CHECKOUT = Path(__file__).resolve().parents[2]
HABITS = (CHECKOUT / "docs/habits.md").read_text(encoding="utf-8")


def test_every_recipe_runs():
    torch.manual_seed(0)
    names: dict[str, object] = {}
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", HABITS, re.DOTALL | re.MULTILINE))
    assert len(blocks) > 20
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "K-FAC")
        for block in blocks:
            line = HABITS[: block.start()].count("\n") + 1
            # Empty lines in front, so that a failure names the line of the document.
            exec(compile("\n" * line + block[1], "docs/habits.md", "exec"), names)


def test_every_example_is_named():
    for path in (CHECKOUT / "examples").glob("[a-z]*.py"):
        if path.stem not in ("ten_lines", "jax_loop"):  # in README.md and library.md
            assert f"examples/{path.name}" in HABITS


def texts(node):
    """A string as it stands in the code, a blank for each placeholder; None of other expressions."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(texts(part) or " " for part in node.values)
    return None


def test_messages_are_those_of_the_library():
    """What the tables quote stands in the library, and each of its warnings stands in a table."""
    quoted = re.findall(r"`([^`]+)`", "\n".join(re.findall(r"^\| (`[^|]*`) \|", HABITS, re.MULTILINE)))
    assert len(quoted) > 20
    package = CHECKOUT / "algoperf_kfac"
    nodes = []
    for path in (*package.glob("*.py"), *(package / "pytorch").rglob("*.py")):
        nodes += ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    strings = [text for node in nodes if (text := texts(node)) is not None]
    assert [part for part in quoted if not any(part in text for text in strings)] == []
    calls = [node for node in nodes if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "warn"]
    made = [
        node
        for node in nodes
        if isinstance(node, ast.FunctionDef) and node.name in ("in_parts", "more_rows", "other_rows", "noise")
    ]
    returns = [node for function in made for node in ast.walk(function) if isinstance(node, ast.Return)]
    said = [*(call.args[0] for call in calls), *(node.value for node in returns)]
    warned = [text for node in said if (text := texts(node)) is not None]
    assert len(warned) >= 5
    assert [text for text in warned if not any(part in text for part in quoted)] == []


def test_recipes_are_complete_programs(tmp_path):
    """After the first block, one that needs no other runs in a process of its own."""
    blocks = re.findall(r"^```python\n(.*?)^```$", HABITS, re.DOTALL | re.MULTILINE)
    command = [sys.executable, "-c", blocks[0] + blocks[1]]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
