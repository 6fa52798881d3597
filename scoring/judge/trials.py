"""Trials -> studies -> workloads: when the target was reached, or why it was not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pandas as pd

from scoring.errors import InputError
from scoring.judge.targets import Rules
from scoring.read.logs import Logs

# From best to worst news.
STATES = ("hit", "unfinished", "over budget", "missed", "no data")
COSTS = {"time": "time", "steps": "step"}


def reach(logs: Logs, rules: Rules, cost: str = "time") -> pd.DataFrame:
    """One row per trial of a workload with a target: the first hit inside the budget, or how far it came.

    Columns beside those that name the trial: state (see STATES), time, steps and cost at the hit (infinite without
    one), best (metric), best_time, best_step, distance (to the target, by the best), last_time, last_step,
    ms_per_step (from the first evaluation on), eval_period (median seconds between evaluations), share (of the
    budget used), share_to_target.
    """
    column = COSTS.get(cost, cost)
    if column not in logs.evals:
        raise InputError(f"no column {column!r} to use as the cost: {', '.join(map(str, logs.evals.columns[6:]))}")
    table = logs.trials[logs.trials["workload"].isin(list(rules.targets))].reset_index(drop=True)
    evals = logs.evals[logs.evals["believed"].to_numpy()]
    ids = evals["trial_id"].to_numpy()
    starts, stops = (np.searchsorted(ids, table["trial_id"].to_numpy(), side) for side in ("left", "right"))
    time, step = evals["time"].to_numpy(), evals["step"].to_numpy()
    price = evals[column].to_numpy(dtype=float)
    rows = []
    limits = np.full(len(table), np.inf)
    for workload, part in table.groupby("workload", sort=False):
        target = rules.targets[str(workload)]
        budget = rules.budget(str(workload))
        # A run ends by itself at its flags' limit, or at the hint, which is the embedded runner's.
        limits[part.index] = part["max_global_steps"].fillna(target.step_hint).fillna(np.inf)
        sign = 1.0 if target.higher_is_better else -1.0
        gain = sign * (evals[target.column].to_numpy() if target.column in evals else np.full(len(evals), np.nan))
        for k in part.index:
            mine = slice(starts[k], stops[k])
            rows.append(
                (k, *_one(gain[mine], sign * target.value, time[mine], step[mine], price[mine], budget, limits[k]))
            )
    names = ["row", "state", "time", "steps", "cost", "best", "best_time", "best_step", "last_time", "last_step"]
    result = pd.DataFrame(rows, columns=[*names, "eval_period", "ms_per_step"]).set_index("row").sort_index()
    signs = table["workload"].map({name: 1.0 if t.higher_is_better else -1.0 for name, t in rules.targets.items()})
    values = table["workload"].map({name: t.value for name, t in rules.targets.items()})
    result["best"] *= signs.astype(float)
    result["distance"] = signs.astype(float) * (values.astype(float) - result["best"])
    budgets = table["workload"].map({name: rules.budget(name) for name in rules.targets}).astype(float)
    result["share"] = result["last_time"] / budgets
    result["share_to_target"] = result["time"] / budgets
    keep = ["trial_id", "submission", "study", "workload", "framework", "trial", "hyperparameters", "batch_size"]
    return pd.concat([table[[*keep, "evaluations"]], result], axis=1)


def _one(
    gain: npt.NDArray[np.float64],
    goal: float,
    time: npt.NDArray[np.float64],
    step: npt.NDArray[np.float64],
    price: npt.NDArray[np.float64],
    budget: float,
    limit: float,
) -> tuple[object, ...]:
    """State, hit and progress of one trial; ``gain`` is the metric with its sign turned so that more is better."""
    if not len(gain):
        return ("no data", *[np.inf] * 3, *[np.nan] * 7)
    period = float(np.median(np.diff(time))) if len(time) > 1 else np.nan
    # From the first evaluation on: what comes before it holds compilation.
    pace = 1e3 * (time[-1] - time[0]) / (step[-1] - step[0]) if step[-1] > step[0] else np.nan
    known = ~np.isnan(gain)
    best = int(np.argmax(np.where(known, gain, -np.inf))) if known.any() else -1
    progress = (gain[best], time[best], step[best]) if best >= 0 else (np.nan,) * 3
    progress = (*progress, time[-1], step[-1], period, pace)
    hits = np.flatnonzero(gain >= goal)
    if len(hits) and time[hits[0]] <= budget:
        first = hits[0]
        paid = price[first] if np.isfinite(price[first]) else np.inf
        return ("hit", time[first], step[first], paid, *progress)
    if len(hits):
        state = "over budget"
    elif best < 0 and len(gain) > 1:
        state = "missed"
    else:
        # A run that stops with less than one evaluation to go, or on NaN, had ended.
        ended = time[-1] + (period if np.isfinite(period) else 0.0) >= budget or step[-1] >= limit or not known[-1]
        state = "missed" if ended else "unfinished"
    return (state, *[np.inf] * 3, *progress)


def with_normalised(logs: Logs, rules: Rules, reference: str) -> Logs:
    """The logs with a column ``normalised``: steps times the reference's median ms per step on the workload.

    It prices every submission's steps on the reference's hardware; a workload without a reference has no price.
    """
    reached = reach(logs, rules)
    pace = reached[reached["submission"] == reference].groupby("workload")["ms_per_step"].median()
    if pace.empty:
        raise InputError(f"no submission {reference!r} to take the time of a step from")
    seconds = logs.evals["workload"].astype(object).map(pace / 1e3).astype(float)
    return replace(logs, evals=logs.evals.assign(normalised=logs.evals["step"] * seconds))


def studies(reached: pd.DataFrame, rules: Rules) -> pd.DataFrame:
    """One row per study of a submission on a workload: its best trial by cost, ties by time and then by number.

    Under rules that limit the trials of a study, those of the lowest numbers count. A submission that ran a
    workload in two frameworks is judged by the one with more studies, then more trials, then by name.
    """
    table = _one_framework(reached)
    keys = ["submission", "workload", "study"]
    if rules.trials:
        table = table[table.groupby(keys)["trial"].rank(method="first") <= rules.trials]
    order = {state: k for k, state in enumerate(STATES)}
    table = table.assign(_state=table["state"].map(order), _far=table["distance"].fillna(np.inf))
    # Without a hit the trial that came closest speaks for the study.
    table = table.sort_values([*keys, "cost", "time", "_far", "_state", "trial"], kind="stable")
    best = table.groupby(keys, sort=False).first()
    best["trials"] = table.groupby(keys, sort=False).size()
    return best.drop(columns=["_state", "_far"]).reset_index()


def _one_framework(reached: pd.DataFrame) -> pd.DataFrame:
    keys = ["submission", "workload", "framework"]
    sizes = reached.groupby(keys).agg(studies=("study", "nunique"), trials=("trial", "size")).reset_index()
    sizes = sizes.sort_values(["studies", "trials", "framework"], ascending=[False, False, True], kind="stable")
    chosen = sizes.drop_duplicates(["submission", "workload"])[keys]
    return reached.merge(chosen, on=keys, how="inner")


def cells(by_study: pd.DataFrame, rules: Rules, column: str = "cost") -> pd.DataFrame:
    """One row per submission and workload: the median over studies, misses and missing studies being infinite.

    Columns: cost (the median), low, high (over studies), values (all of them, padded with infinity), present, hits,
    state, best (median over studies), ms_per_step (median).
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for k, key in enumerate(zip(by_study["submission"], by_study["workload"], strict=True)):
        groups.setdefault(key, []).append(k)
    costs, states = by_study[column].to_numpy(dtype=float), by_study["state"].to_numpy()
    best, pace = by_study["best"].to_numpy(dtype=float), by_study["ms_per_step"].to_numpy(dtype=float)
    rows = []
    for (submission, workload), mine in sorted(groups.items()):
        padded = np.concatenate([costs[mine], np.full(max(rules.studies - len(mine), 0), np.inf)])
        rows.append(
            {
                "submission": submission,
                "workload": workload,
                "cost": float(median_of(padded)),
                "low": padded.min(),
                "high": padded.max(),
                "values": tuple(np.sort(padded)),
                "present": len(mine),
                "hits": int(np.isfinite(costs[mine]).sum()),
                "state": _state(Counter(states[mine].tolist()), len(padded)),
                "best": _known_median(best[mine]),
                "ms_per_step": _known_median(pace[mine]),
            }
        )
    columns = ["submission", "workload", "cost", "low", "high", "values", "present", "hits", "state", "best"]
    return pd.DataFrame(rows, columns=[*columns, "ms_per_step"])


def completed(table: pd.DataFrame, submissions: Iterable[str], rules: Rules) -> pd.DataFrame:
    """Cells for every submission on every scored workload; missing ones hold no data and count as misses."""
    have = set(zip(table["submission"], table["workload"], strict=True))
    misses = tuple([np.inf] * max(rules.studies, 1))
    blank = {"cost": np.inf, "low": np.inf, "high": np.inf, "values": misses, "present": 0, "hits": 0}
    rows = [
        {
            "submission": name,
            "workload": workload,
            **blank,
            "state": "no data",
            "best": np.nan,
            "ms_per_step": np.nan,
        }
        for name in submissions
        for workload in rules.scored
        if (name, workload) not in have
    ]
    whole = [*table.to_dict("records"), *rows]
    return pd.DataFrame(whole, columns=list(rows[0]) if rows else table.columns)


def _known_median(values: npt.NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else np.nan


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


def median_of(values: npt.NDArray[np.float64], axis: int = -1) -> npt.NDArray[np.float64]:
    """The median with infinity for a miss: the mean of infinity and a number, or of two, is infinity."""
    ordered = np.sort(values, axis=axis)
    n = ordered.shape[axis]
    middle = np.take(ordered, [(n - 1) // 2, n // 2], axis=axis)
    result: npt.NDArray[np.float64] = middle.mean(axis=axis)
    return result
