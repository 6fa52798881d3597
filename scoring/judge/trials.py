"""Trials: when the target was reached within the budget, or how far it came."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pandas as pd

from commands.errors import UserError
from scoring.frames import records
from scoring.judge.columns import COLUMNS, NAMES, Floats, Run, median_of
from scoring.judge.frameworks import labelled
from scoring.judge.rules import Rules
from scoring.read.logs import Logs

# From best to worst news.
STATES = ("hit", "unfinished", "over budget", "missed", "no data")
COSTS = {"time": "time", "steps": "step"}
KEEP = ("trial_id", "submission", "study", "workload", "framework", "trial", "hyperparameters", "evaluations")


def reach(logs: Logs, rules: Rules, cost: str = "time") -> pd.DataFrame:
    """One row per trial of a workload with a target: what names it, and every column of ``columns.COLUMNS``.

    Args:
      logs: what was read.
      rules: targets and budgets.
      cost: ``time``, ``steps``, or any numeric column of the evaluations.

    Raises:
      UserError: there is no such column.
    """
    price = COSTS.get(cost, cost)
    numeric = {str(name) for name in logs.evals.columns if logs.evals[name].dtype == "float64"}
    if price not in numeric:
        raise UserError(f"no column {price!r} to use as the cost: {', '.join(map(str, logs.evals.columns[6:]))}")
    trials = labelled(logs.trials)
    table = trials[trials["workload"].isin(list(rules.targets))].reset_index(drop=True)
    evals = logs.evals[logs.evals["believed"].to_numpy()]
    ids = evals["trial_id"].to_numpy()
    starts, stops = (np.searchsorted(ids, table["trial_id"].to_numpy(), side) for side in ("left", "right"))
    arrays = {name: evals[name].to_numpy() for name in numeric}
    rows = []
    for k, trial in enumerate(records(table)):
        run = _run(rules, trial, arrays, slice(int(starts[k]), int(stops[k])), price)
        rows.append([column.of(run) for column in COLUMNS])
    result = pd.DataFrame(rows, columns=list(NAMES))
    return pd.concat([table[list(KEEP)], result], axis=1)


def _run(rules: Rules, trial: object, arrays: dict[str, Floats], rows: slice, price: str) -> Run:
    workload = str(trial.workload)  # type: ignore[attr-defined]
    target, budget = rules.targets[workload], rules.budget(workload)
    time, step = arrays["time"][rows], arrays["step"][rows]
    count = rows.stop - rows.start
    value = arrays[target.column][rows] if target.column in arrays else np.full(count, np.nan)
    gain = value if target.higher_is_better else -value
    goal = target.value if target.higher_is_better else -target.value
    known = ~np.isnan(gain)
    best = int(np.argmax(np.where(known, gain, -np.inf))) if known.any() else -1
    hits = np.flatnonzero(gain >= goal)
    inside = len(hits) > 0 and time[hits[0]] <= budget
    # A run ends by itself where it says so, at its flags' limit, or at the hint, which is the embedded runner's.
    limits = (trial.ended_at, trial.max_global_steps, target.step_hint)  # type: ignore[attr-defined]
    period = float(median_of(np.diff(time))) if count > 1 else np.nan
    limit = next((one for one in limits if not np.isnan(one)), np.inf)
    if not count:
        state = "no data"
    elif len(hits):
        state = "hit" if inside else "over budget"
    else:
        state = "missed" if _ended(time, step, known, budget, limit, period) else "unfinished"
    batch = float(trial.batch_size)  # type: ignore[attr-defined]
    return Run(target, budget, batch, arrays, rows, int(hits[0]) if inside else -1, best, state, price, period)


def _ended(
    time: Floats, step: Floats, known: npt.NDArray[np.bool_], budget: float, limit: float, period: float
) -> bool:
    """Whether a run without a hit had ended: at its limits, with less than one evaluation to go, or on NaN."""
    if not known.any() and len(known) > 1:
        return True
    return bool(time[-1] + (0.0 if np.isnan(period) else period) >= budget or step[-1] >= limit or not known[-1])


def with_normalised(logs: Logs, rules: Rules, reference: str) -> tuple[Logs, frozenset[str]]:
    """The logs with a column ``normalised``: steps times the reference's median ms per step on the workload.

    It prices every submission's steps on the reference's hardware. The workloads in which the reference has no time
    per step come second: there nobody has a price.

    Raises:
      UserError: the reference has no trial at all.
    """
    reached = reach(logs, rules)
    pace = reached[reached["submission"] == reference].groupby("workload")["ms_per_step"].median().dropna()
    if pace.empty:
        raise UserError(f"no submission {reference!r} to take the time of a step from: name one with --reference")
    seconds = logs.evals["workload"].astype(object).map(pace / 1e3).astype(float)
    priced = replace(logs, evals=logs.evals.assign(normalised=logs.evals["step"] * seconds))
    return priced, frozenset(rules.scored) - set(pace.index)
