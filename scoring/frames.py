"""Rows of pandas tables as plain objects: the types of their fields are not known to a type checker."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd


def records(table: pd.DataFrame) -> Iterator[Any]:
    """The rows as objects with one attribute per column."""
    return iter(table.itertuples(index=False))


def lookup(table: pd.DataFrame, key: Any) -> Any:
    """The row of a unique index value, as a series of mixed types."""
    return table.loc[key]
