"""Studies and cells: the best trial of a study, and the median over the studies of a submission on a workload."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd

from scoring.judge.columns import OF_CELLS, Floats, median_of
from scoring.judge.rules import Rules
from scoring.judge.trials import STATES

COLUMNS = ("submission", "workload", "framework", "cost", "low", "high", "values", "present", "hits", "state")


def studies(reached: pd.DataFrame, rules: Rules) -> pd.DataFrame:
    """One row per study of a submission on a workload: its best trial by cost, ties by time and then by number.

    Under rules that limit the trials of a study, those of the lowest numbers count. Without a hit the trial that
    came closest speaks for the study.
    """
    table = reached
    keys = ["submission", "workload", "study"]
    if rules.trials:
        table = table[table.groupby(keys)["trial"].rank(method="first") <= rules.trials]
    order = {state: k for k, state in enumerate(STATES)}
    table = table.assign(
        _price=table["cost"].fillna(np.inf),
        _state=table["state"].map(order),
        _far=table["distance"].fillna(np.inf),
    )
    table = table.sort_values([*keys, "_price", "time", "_far", "_state", "trial"], kind="stable")
    best = table.drop_duplicates(keys).set_index(keys)
    best["trials"] = table.groupby(keys, sort=False).size()
    return best.drop(columns=["_price", "_state", "_far"]).reset_index()


def cells(by_study: pd.DataFrame, rules: Rules, column: str = "cost") -> pd.DataFrame:
    """One row per submission and workload: the median over studies, misses and missing studies being infinite.

    Columns: framework, cost (the median), low, high (over studies), values (all of them, padded with infinity),
    present, hits, state, and the medians of ``columns.OF_CELLS``.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for k, key in enumerate(zip(by_study["submission"], by_study["workload"], strict=True)):
        groups.setdefault(key, []).append(k)
    costs = by_study[column].to_numpy(dtype=float)
    states, frameworks = by_study["state"].to_numpy(), by_study["framework"].to_numpy()
    medians = {name: by_study[name].to_numpy(dtype=float) for name in OF_CELLS}
    rows = []
    for (submission, workload), mine in sorted(groups.items()):
        found = np.where(np.isnan(costs[mine]), np.inf, costs[mine])
        padded = np.concatenate([found, np.full(max(rules.studies - len(mine), 0), np.inf)])
        row: dict[str, object] = {
            "submission": submission,
            "workload": workload,
            "framework": ", ".join(sorted(set(frameworks[mine]))),
            "cost": float(median_of(padded)),
            "low": padded.min(),
            "high": padded.max(),
            "values": tuple(np.sort(padded)),
            "present": len(mine),
            "hits": int((states[mine] == "hit").sum()),
            "state": _state(Counter(states[mine].tolist()), len(padded)),
        }
        rows.append(row | {name: _known_median(values[mine]) for name, values in medians.items()})
    return pd.DataFrame(rows, columns=[*COLUMNS, *OF_CELLS])


def completed(table: pd.DataFrame, submissions: Iterable[str], rules: Rules) -> pd.DataFrame:
    """Cells for every submission on every scored workload; missing ones hold no data and count as misses."""
    have = set(zip(table["submission"], table["workload"], strict=True))
    misses = tuple([np.inf] * max(rules.studies, 1))
    blank = {"framework": "", "cost": np.inf, "low": np.inf, "high": np.inf, "values": misses}
    blank |= {"present": 0, "hits": 0, "state": "no data"} | dict.fromkeys(OF_CELLS, np.nan)
    rows = [
        {"submission": name, "workload": workload, **blank}
        for name in submissions
        for workload in rules.scored
        if (name, workload) not in have
    ]
    return pd.DataFrame([*table.to_dict("records"), *rows], columns=list(table.columns))


def _known_median(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(median_of(known)) if len(known) else np.nan


def _state(counts: Mapping[str, int], studies: int) -> str:
    """What keeps the median from being a hit: what would make it one, or else the most frequent outcome."""
    needed = studies // 2 + 1
    hits = counts.get("hit", 0)
    for state in ("hit", "unfinished", "over budget"):
        if (hits if state == "hit" else hits + counts.get(state, 0)) >= needed:
            return state
    others = {state: counts[state] for state in STATES[1:] if state in counts}
    # Studies that are missing altogether decide only where there is nothing else.
    return max(others, key=lambda state: others[state], default="no data")
