"""The official procedure, where it is deterministic, and the way from it to the exact rules, step by step."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from scoring.judge import cells as cells_module
from scoring.judge import score, trials
from scoring.judge.columns import Floats
from scoring.judge.rules import Rules
from scoring.read.logs import Logs

POINTS = 100


@dataclass(frozen=True)
class Procedure:
    """How a score is computed: by default the official procedure; each field set is one step to the exact rules.

    Attributes:
      integral: integrate the profile exactly, not by a trapezoid over 100 values of tau.
      by_time: the best trial of a study has the least cost, not the smallest evaluation index.
      believed: only believed rows, and only as many trials of a study as the ruleset allows.
      budget: a hit must lie inside the runtime budget.
      missing: a study that is missing is a miss; the median is not over those present alone.
    """

    integral: bool = False
    by_time: bool = False
    believed: bool = False
    budget: bool = False
    missing: bool = False


OFFICIAL = Procedure()
STEPS = {
    "exact integral": "integral",
    "trial by cost, not index": "by_time",
    "bad rows, extra trials": "believed",
    "runtime budget": "budget",
    "missing studies": "missing",
}


def studies(
    logs: Logs, rules: Rules, cost: str = "time", how: Procedure = OFFICIAL, reached: pd.DataFrame | None = None
) -> pd.DataFrame:
    """One row per study: its best trial, with the cost of its first hit (infinite without one) and its columns.

    ``reached`` is the table of ``trials.reach``, if it is there already.
    """
    reached = trials.reach(logs, rules, cost) if reached is None else reached
    first = _first_hits(logs, rules, cost, how)
    keys = ["submission", "workload", "study"]
    table = reached[reached["workload"].isin(list(rules.scored))]
    if how.believed and rules.trials:
        table = table[table.groupby(keys)["trial"].rank(method="first") <= rules.trials]
    if not how.missing:
        # A trial without a readable log does not exist for the official scorer, nor does a study of such trials.
        table = table[table["evaluations"] > 0]
    table = table.drop(columns=["cost", "time"]).merge(first, on="trial_id", how="left")
    order = ["cost", "time"] if how.by_time else ["index", "time"]
    table = table.sort_values([*keys, *order], kind="stable")  # NaN, no hit, comes last
    best = table.drop_duplicates(keys).reset_index(drop=True)
    hit = best["index"].notna()
    # Other outcomes than reached and not reached do not exist there.
    best["state"] = np.where(hit, "hit", np.where(best["evaluations"] > 0, "missed", "no data"))
    best["cost"] = best["cost"].where(hit, np.inf)
    best["trials"] = 1
    return best.drop(columns="index")


def _first_hits(logs: Logs, rules: Rules, cost: str, how: Procedure) -> pd.DataFrame:
    """The first hit of each trial that has one: trial_id, its index among the evaluations, cost, time."""
    price = "score" if cost == "time" and not how.believed else trials.COSTS.get(cost, cost)
    known = logs.evals["workload"].isin(list(rules.scored)).to_numpy()
    if how.believed:
        evals = logs.evals[known & logs.evals["believed"].to_numpy()]
    else:
        evals = logs.evals[known].sort_values(["trial_id", "row"], kind="stable")
    first = [pd.DataFrame({name: pd.Series(dtype=float) for name in ("trial_id", "index", "cost", "time")})]
    for workload, part in evals.groupby("workload", observed=True):
        target = rules.targets[str(workload)]
        if target.column not in part:
            continue
        value = part[target.column]
        hit = value >= target.value if target.higher_is_better else value <= target.value
        index = part.groupby("trial_id").cumcount()
        hits = part.assign(index=index, cost=part[price].astype(float))[hit.to_numpy()].drop_duplicates("trial_id")
        if how.budget:
            hits = hits[hits["time"] <= rules.budget(str(workload))]
        first.append(hits[["trial_id", "index", "cost", "time"]])
    return pd.concat([part for part in first if len(part)] or first)


def cells(by_study: pd.DataFrame, rules: Rules, how: Procedure = OFFICIAL) -> pd.DataFrame:
    """One row per submission and workload, as ``cells.cells``: the median over the studies."""
    return cells_module.cells(by_study, rules if how.missing else replace(rules, studies=0))


def scores(
    logs: Logs, rules: Rules, cost: str = "time", how: Procedure = OFFICIAL, reached: pd.DataFrame | None = None
) -> pd.Series:
    """The score of each submission, best first."""
    return of_cells(cells(studies(logs, rules, cost, how, reached), rules, how), rules, how)


def of_cells(table: pd.DataFrame, rules: Rules, how: Procedure = OFFICIAL) -> pd.Series:
    """The score of each submission with cells, best first."""
    grid = score.grid(table, rules)
    ratio = score.ratios(grid.values, rules)
    area = score.exact(ratio) if how.integral else trapezoid(ratio)
    result = pd.Series(area, index=list(grid.submissions), name="score")
    return result.sort_index().sort_values(ascending=False, kind="stable")


def trapezoid(ratio: Floats) -> Floats:
    """The profile integrated over a grid of 100 values of tau on [1, 4], divided by 3."""
    tau = np.linspace(1.0, score.MAX_TAU, POINTS)
    share = (ratio[..., None] <= tau).mean(axis=-2)
    area: Floats = np.trapezoid(share, tau, axis=-1) / (score.MAX_TAU - 1.0)
    return area


@dataclass(frozen=True)
class Comparison:
    """The way from the official procedure to the exact rules.

    Attributes:
      scores: by submission, best official score first: official, what each step adds, exact.
      medians: every submission and workload whose median differs: official, exact, and why.
    """

    scores: pd.DataFrame
    medians: pd.DataFrame


def compare(logs: Logs, rules: Rules, cost: str = "time") -> Comparison:
    """Take the steps from the official procedure to the exact rules one after the other."""
    reached = trials.reach(logs, rules, cost)
    how = OFFICIAL
    table = cells(studies(logs, rules, cost, how, reached), rules, how)
    before = of_cells(table, rules, how)
    index = ["submission", "workload"]
    medians = table.set_index(index)["cost"].to_frame("official")
    medians["exact"], medians["why"] = medians["official"], ""
    found = pd.DataFrame({"official": before})
    for name, step in STEPS.items():
        how = replace(how, **{step: True})
        table = cells(studies(logs, rules, cost, how, reached), rules, how)
        after = of_cells(table, rules, how).reindex(found.index)
        found[name] = after - before.reindex(found.index)
        before = after
        medians = _changed(medians, table.set_index(index)["cost"], name)
    found["exact"] = before
    return Comparison(found, medians[medians["why"] != ""].reset_index())


def _changed(medians: pd.DataFrame, after: pd.Series, name: str) -> pd.DataFrame:
    medians = medians.reindex(medians.index.union(after.index))
    old, new = medians["exact"].fillna(np.inf), after.reindex(medians.index).fillna(np.inf)
    differs = ~np.isclose(new, old, rtol=1e-12, atol=0) & (new != old)
    why = medians["why"].fillna("")
    medians["why"] = why.where(~differs, [f"{one}; {name}" if one else name for one in why])
    medians["exact"] = new
    return medians
