"""Results kept in the repository: a line of JSON for each, told apart by a key, the file whole at every moment."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from commands import atomic
from commands.errors import UserError

Key = Callable[[Mapping[str, Any]], str]


def read(path: Path, key: Key) -> dict[str, dict[str, Any]]:
    """All kept results by key.

    Raises:
        UserError: a line cannot be read.
    """
    found: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(path.read_text().splitlines() if path.is_file() else (), 1):
        try:
            result = json.loads(line)
            found[key(result)] = result
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number} cannot be read: {type(error).__name__}: {error}.") from None
    return found


def add(results: Iterable[dict[str, Any]], path: Path, key: Key) -> None:
    """Adds results; one of the same key is replaced."""
    kept = read(path, key) | {key(result): result for result in results}
    lines = [json.dumps(kept[name], sort_keys=True) for name in sorted(kept)]
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, "".join(f"{line}\n" for line in lines))
