"""Results kept in the repository: a line of JSON for each, told apart by a key, the file whole at every moment."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from commands import atomic
from commands.errors import UserError

Key = Callable[[Mapping[str, Any]], str]
Case = TypeVar("Case")


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


class Book(Generic[Case]):
    """The results of cases: a result holds the fields of its case, which tell it apart, and what was measured.

    Args:
        case_type: a dataclass whose fields JSON can hold.
        path: the file.
    """

    def __init__(self, case_type: type[Case], path: Path) -> None:
        self._names = [field.name for field in dataclasses.fields(case_type)]  # type: ignore[arg-type]
        self.path = path
        self.results = read(path, self._key)

    def of(self, case: Case) -> dict[str, Any] | None:
        """The result of a case, if there is one."""
        return self.results.get(self._key(dataclasses.asdict(case)))  # type: ignore[call-overload]

    def missing(self, cases: Sequence[Case]) -> list[Case]:
        """Those without a result."""
        return [case for case in cases if self.of(case) is None]

    def add(self, case: Case, measured: Mapping[str, Any]) -> None:
        """Keeps what was measured of a case, in the place of what there was."""
        result = {**dataclasses.asdict(case), **measured}  # type: ignore[call-overload]
        add([result], self.path, self._key)
        self.results[self._key(result)] = result

    def values(self, name: str) -> list[Any]:
        """All that the results hold under a name, each once, sorted."""
        return sorted({result[name] for result in self.results.values() if name in result})

    def _key(self, found: Mapping[str, Any]) -> str:
        return json.dumps({name: found[name] for name in self._names})
