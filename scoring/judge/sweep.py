"""How the ranking changes when all targets are relaxed, and which workloads are then reached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from scoring.judge.rules import Rules

SHARES = tuple(k / 100 for k in range(21))


@dataclass(frozen=True)
class Sweep:
    """Scores over relaxations.

    Attributes:
      scores: by submission (best at the official targets first), one column for each share.
      reached: one row per submission and workload that is not reached at share 0 but at a later one: submission,
        workload, and the least such share.
    """

    scores: pd.DataFrame
    reached: pd.DataFrame

    @property
    def ranks(self) -> pd.DataFrame:
        """The rank at each share; equal scores share the better one."""
        return self.scores.rank(ascending=False, method="min").astype(int)


def sweep(
    rules: Rules, scored: Callable[[Rules], tuple[pd.Series, pd.DataFrame]], shares: Sequence[float] = SHARES
) -> Sweep:
    """Score the same runs under ever easier targets.

    Args:
      rules: the official ones.
      scored: rules -> the score of each submission, and its cells.
      shares: by how much every target is relaxed, on top of what ``rules`` relax.
    """
    columns: dict[float, pd.Series] = {}
    first: dict[tuple[str, str], float] = {}
    for share in sorted({0.0, *shares}):
        easier = rules.relaxed({"all": share}) if share else rules
        columns[share], cells = scored(easier)
        base = cells[cells["workload"].isin(list(rules.base)) & np.isfinite(cells["cost"])]
        for key in zip(base["submission"], base["workload"], strict=True):
            first.setdefault(key, share)
    table = pd.DataFrame(columns)
    table = table.loc[columns[0.0].index]
    rows = [(*key, share) for key, share in first.items() if share > 0]
    reached = pd.DataFrame(rows, columns=["submission", "workload", "share"])
    return Sweep(table, reached.sort_values(["share", "workload", "submission"]).reset_index(drop=True))
