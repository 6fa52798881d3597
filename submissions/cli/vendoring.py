"""Copies a module with everything it imports from this repository into one package, with relative imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
OURS = ("algoperf_kfac", "submissions")
LOADS_BY_NAME = 'import_module(f"{__name__}.'  # what a package says that finds its own modules by their names


def vendor(module: str, name: str) -> dict[str, str]:
    """The package around a module, as text by path.

    Args:
        module: dotted name of the module, e.g. "submissions.kfac_reduce.pytorch.submission".
        name: what the module is called in the new package, where it lies at the top.

    Returns:
        Paths of Python files, relative to the package, and their contents. `algoperf_kfac.*` keeps its names,
        `submissions.*` loses its first part.

    Raises:
        ValueError: for an import that cannot be made relative, or of a file that is not there.
    """
    files: dict[str, str] = {"__init__.py": ""}
    for current, path in _closure(module).items():
        target = (name,) if current == module else _target(current)
        if not target:
            continue
        is_package = path.name == "__init__.py"
        text = path.read_text(encoding="utf-8")
        files["/".join(target) + ("/__init__.py" if is_package else ".py")] = _rewrite(
            text, list(_imports(text, current)), target if is_package else target[:-1]
        )
    return dict(sorted(files.items()))


def sources(module: str) -> list[Path]:
    """The files that `vendor` copies."""
    return sorted(_closure(module).values())


def _closure(module: str) -> dict[str, Path]:
    """A module, what it imports from this repository, and the packages around that."""
    found: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        current = waiting.pop()
        if current in found:
            continue
        path = _source(current)
        if path is None:
            raise ValueError(f"module {current} has no source file")
        found[current] = path
        text = path.read_text(encoding="utf-8")
        if LOADS_BY_NAME in text:
            waiting += [f"{current}.{file.stem}" for file in path.parent.glob("*.py") if file != path]
        for imported, names, _ in _imports(text, current):
            waiting.append(imported)
            waiting += [f"{imported}.{n}" for n in names if _source(f"{imported}.{n}") is not None]
        if current != module:
            parts = current.split(".")
            waiting += [".".join(parts[:i]) for i in range(1, len(parts))]
    return found


def _source(module: str) -> Path | None:
    base = CHECKOUT.joinpath(*module.split("."))
    return next((p for p in (base / "__init__.py", base.with_suffix(".py")) if p.is_file()), None)


def _target(module: str) -> tuple[str, ...]:
    parts = tuple(module.split("."))
    return parts[1:] if parts[0] == "submissions" else parts


def _imports(text: str, module: str) -> Iterator[tuple[str, list[str], int]]:
    """Imports of our own modules: the module, the names taken from it, and the line."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in OURS:
                    raise ValueError(f"{module}, line {node.lineno}: write `from ... import`, to become relative")
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in OURS:
            yield node.module, [alias.name for alias in node.names], node.lineno


def _rewrite(text: str, imports: list[tuple[str, list[str], int]], package: tuple[str, ...]) -> str:
    """The text with its imports relative to `package`, a path within the new package."""
    lines = text.splitlines(keepends=True)
    for module, _, number in imports:
        target = _target(module)
        shared = 0
        while shared < min(len(package), len(target)) and package[shared] == target[shared]:
            shared += 1
        relative = "." * (len(package) - shared + 1) + ".".join(target[shared:])
        old = f"from {module} import"
        if old not in lines[number - 1]:
            raise ValueError(f"the import of {module} is not written on one line: {lines[number - 1].strip()}")
        lines[number - 1] = lines[number - 1].replace(old, f"from {relative} import", 1)
    return "".join(lines)
