"""For each cell that was scored: its ratio to the best, or the reason why it has no credit."""

from __future__ import annotations

from collections.abc import Set

import numpy as np
import pandas as pd

from scoring.frames import lookup
from scoring.judge import score
from scoring.judge.columns import Floats
from scoring.judge.rules import Rules

OVER = "over 4 times the best"
NO_PRICE = "no price"


def explain(
    cells: pd.DataFrame, rules: Rules, unit: Floats | None = None, unpriced: Set[str] = frozenset()
) -> pd.DataFrame:
    """Each submission on each base workload, with its cell: ratio and reason ("" if credited).

    Args:
      cells: the cells the score was computed from.
      rules: their rules.
      unit: the fixed costs of a reference, as ``score.ratios`` takes them.
      unpriced: the workloads on which the cost is not defined for lack of a reference.
    """
    grid = score.grid(cells, rules)
    ratio = score.ratios(grid.values, rules, unit)
    best = grid.values.min(axis=0) if unit is None else unit[0]
    indexed = cells.set_index(["submission", "workload"])
    variants = {base: name for name, base in rules.held_out.items()}
    order = list(rules.scored)
    over = OVER if unit is None else OVER.replace("the best", "the reference")
    rows = []
    for i, submission in enumerate(grid.submissions):
        for j, workload in enumerate(rules.base):
            reason = _reason(grid.values[i, j], best[j], (submission, workload), indexed, over, unpriced)
            if not reason and not np.isfinite(ratio[i, j]):
                variant = variants.get(workload, "")
                k = order.index(variant)
                inner = _reason(grid.values[i, k], best[k], (submission, variant), indexed, over, unpriced)
                reason = f"held-out {variant}: {inner or over}"
            rows.append({"submission": submission, "workload": workload, "ratio": ratio[i, j], "reason": reason})
    return pd.DataFrame(rows).merge(cells, on=["submission", "workload"], how="left")


def _reason(
    cost: float, best: float, key: tuple[str, str], cells: pd.DataFrame, over: str, unpriced: Set[str]
) -> str:
    if np.isfinite(cost):
        return "" if not cost > score.MAX_TAU * best else over
    if key not in cells.index or not lookup(cells, key)["present"]:
        return "no data"
    cell = lookup(cells, key)
    if key[1] in unpriced:
        return f"{NO_PRICE}: the reference has no time per step here"
    if cell["state"] == "hit":
        return f"{NO_PRICE}: reached, but the cost is missing in the logs"
    # Where some study reached the target, others that are missing or without data are no reason of their own.
    plain = ("missed", "no data") if cell["hits"] else ("missed",)
    reason = "never reached" if cell["state"] in plain else str(cell["state"])
    if cell["hits"]:
        part = f"reached in {cell['hits']} of {len(cell['values'])} studies"
        reason = part if reason == "never reached" else f"{part}; {reason}"
    missing = len(cell["values"]) - cell["present"]
    if missing > 0:
        reason += f"; {missing} {'study' if missing == 1 else 'studies'} missing"
    return reason


def short(reason: str) -> str:
    """A reason in a word or two, for a cell of a figure."""
    for start, word in (("held-out", "held-out"), ("over 4", "> 4x"), ("no data", "no data"), (NO_PRICE, NO_PRICE)):
        if reason.startswith(start):
            return word
    if reason.startswith("reached in"):
        return reason.split(" studies")[0].removeprefix("reached in ")
    return {"over budget": "over budget", "unfinished": "unfinished"}.get(reason.split(";")[0], "miss")
