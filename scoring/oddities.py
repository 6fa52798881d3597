"""Everything odd met while reading and judging logs: where, what, and what was done about it."""

from __future__ import annotations

from dataclasses import dataclass, field

import pandas as pd

LEVELS = ("note", "warning", "error")
COLUMNS = ("level", "where", "what", "detail", "action", "count")


@dataclass
class Oddities:
    """A growing list of findings; ``table()`` hands it on, sorted, as a pandas table.

    Levels: a ``note`` changes nothing, a ``warning`` cost some rows or may mislead, an ``error`` cost a trial.
    """

    rows: list[tuple[str, str, str, str, str, int]] = field(default_factory=list)

    def add(self, level: str, where: str, what: str, detail: str, action: str, count: int = 1) -> None:
        """Record one finding. ``count`` is the number of rows or files concerned."""
        if level not in LEVELS:
            raise ValueError(f"unknown level {level!r}: one of {LEVELS}")
        self.rows.append((level, where, what, detail, action, int(count)))

    def table(self) -> pd.DataFrame:
        """The findings, worst first, in an order that does not depend on the order of discovery."""
        rank = {level: -k for k, level in enumerate(LEVELS)}
        rows = sorted(set(self.rows), key=lambda row: (rank[row[0]], row[2], row[1], row[3]))
        return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"count": "int64"})


def merge(*tables: pd.DataFrame) -> pd.DataFrame:
    """Several tables of findings as one, sorted and without repetitions."""
    found = Oddities()
    for table in tables:
        found.rows.extend(tuple(row) for row in table[list(COLUMNS)].itertuples(index=False))
    return found.table()


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """How often each kind of finding occurs: level, what, places, rows, and one example."""
    columns = ["level", "what", "places", "rows", "example"]
    if table.empty:
        return pd.DataFrame(columns=columns)
    rank = {level: -k for k, level in enumerate(LEVELS)}
    rows = [
        (level, what, len(part), int(part["count"].sum()), f"{part['where'].iloc[0]}: {part['detail'].iloc[0]}")
        for (level, what), part in table.groupby(["level", "what"], sort=False)
    ]
    rows.sort(key=lambda row: (rank[str(row[0])], str(row[1])))
    return pd.DataFrame(rows, columns=columns)
