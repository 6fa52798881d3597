"""The official procedure, where it is deterministic, and the way from it to the exact rules, step by step."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from scoring.judge import score, trials
from scoring.judge.targets import Rules
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


def studies(logs: Logs, rules: Rules, cost: str = "time", how: Procedure = OFFICIAL) -> pd.DataFrame:
    """One row per study: its best trial and the cost of that trial's first hit, infinite without one."""
    price = "score" if cost == "time" and not how.believed else trials.COSTS.get(cost, cost)
    known = logs.evals["workload"].isin(list(rules.scored)).to_numpy()
    if how.believed:
        known = known & logs.evals["believed"].to_numpy()
        evals = logs.evals[known]
    else:
        evals = logs.evals[known].sort_values(["trial_id", "row"], kind="stable")
    first: list[pd.DataFrame] = []
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
    keys = ["submission", "workload", "study"]
    table = logs.trials[logs.trials["workload"].isin(list(rules.scored))]
    if how.believed and rules.trials:
        table = table[table.groupby([*keys, "framework"])["trial"].rank(method="first") <= rules.trials]
    if not how.missing:
        # A trial without a readable log does not exist for the official scorer, nor does a study of such trials.
        table = table[table["evaluations"] > 0]
    none = pd.DataFrame({"trial_id": [], "index": [], "cost": [], "time": []})
    found = table[[*keys, "trial_id"]].merge(pd.concat(first) if first else none, on="trial_id", how="left")
    order = ["cost", "time"] if how.by_time else ["index", "time"]
    found = found.sort_values([*keys, *order], kind="stable")  # NaN, no hit, comes last
    best = found.groupby(keys, sort=True).head(1).reset_index(drop=True)
    best["cost"] = best["cost"].fillna(np.inf)
    return best[[*keys, "trial_id", "cost"]]


def cells(by_study: pd.DataFrame, rules: Rules, how: Procedure = OFFICIAL) -> pd.DataFrame:
    """One row per submission and workload: the median over the studies."""
    rows = []
    for (submission, workload), part in by_study.groupby(["submission", "workload"], sort=True)["cost"]:
        values = part.to_numpy(dtype=float)
        if how.missing:
            values = np.concatenate([values, np.full(max(rules.studies - len(values), 0), np.inf)])
        rows.append({"submission": submission, "workload": workload, "cost": float(trials.median_of(values))})
    return pd.DataFrame(rows, columns=["submission", "workload", "cost"])


def scores(logs: Logs, rules: Rules, cost: str = "time", how: Procedure = OFFICIAL) -> pd.Series:
    """The score of each submission, best first."""
    table = score.grid(cells(studies(logs, rules, cost, how), rules, how), rules)
    ratio = score.ratios(table.values, rules)
    area = score.exact(ratio) if how.integral else trapezoid(ratio)
    result = pd.Series(area, index=list(table.submissions), name="score")
    return result.sort_index().sort_values(ascending=False, kind="stable")


def trapezoid(ratio: score.Floats) -> score.Floats:
    """The profile integrated over a grid of 100 values of tau on [1, 4], divided by 3."""
    tau = np.linspace(1.0, score.MAX_TAU, POINTS)
    share = (ratio[..., None] <= tau).mean(axis=-2)
    area: score.Floats = np.trapezoid(share, tau, axis=-1) / (score.MAX_TAU - 1.0)
    return area


def compare(logs: Logs, rules: Rules, cost: str = "time") -> pd.DataFrame:
    """Official score, what each step to the exact rules adds, and the exact score; best official score first."""
    how = OFFICIAL
    official = before = scores(logs, rules, cost, how)
    table = pd.DataFrame({"official": official})
    for name, step in STEPS.items():
        how = replace(how, **{step: True})
        after = scores(logs, rules, cost, how).reindex(table.index)
        table[name] = after - before.reindex(table.index)
        before = after
    table["exact"] = before
    return table


def changed_cells(logs: Logs, rules: Rules, cost: str = "time") -> pd.DataFrame:
    """Every submission and workload whose median differs between the two, and by which steps."""
    how = OFFICIAL
    before = cells(studies(logs, rules, cost, how), rules, how).set_index(["submission", "workload"])["cost"]
    table = pd.DataFrame({"official": before, "exact": before, "why": ""})
    for name, step in list(STEPS.items())[1:]:
        how = replace(how, **{step: True})
        after = cells(studies(logs, rules, cost, how), rules, how).set_index(["submission", "workload"])["cost"]
        table = table.reindex(table.index.union(after.index))
        old = table["exact"].fillna(np.inf)
        new = after.reindex(table.index).fillna(np.inf)
        differs = ~np.isclose(new, old, rtol=1e-12, atol=0) & (new != old)
        table.loc[differs, "why"] = (
            table.loc[differs, "why"].fillna("").map(lambda why: f"{why}; " if why else "") + name
        )
        table["exact"] = new
    table = table[(table["why"].fillna("") != "")]
    return table.reset_index()
