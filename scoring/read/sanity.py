"""Which rows and values are believed: the rules on impossible times, steps and metrics, each reported when applied.

Rows are marked, not deleted: ``believed`` is False for a row that counts for nothing under the exact rules.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from scoring.metrics import METRIC, RANGES
from scoring.oddities import Oddities

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

TIME_TOLERANCE = 1e-3  # seconds, beside one part in a thousand


def check(evals: pd.DataFrame, where: Sequence[str], odd: Oddities) -> pd.DataFrame:
    """The table of ``parse`` with ``time`` and ``believed``, in believed order; ``where[trial_id]`` names the file.

    Rows of a trial stay together. They keep the order of the file unless that is not the order of steps.
    """
    evals = evals.copy(deep=False)
    evals["time"] = _times(evals, where, odd)
    evals["believed"] = _possible_rows(evals, where, odd)
    _metrics(evals, where, odd)
    return _order(evals, where, odd)


def _each(
    evals: pd.DataFrame, bad: Bools, where: Sequence[str], odd: Oddities, texts: tuple[str, str, str, str]
) -> None:
    """One finding for each trial with bad rows."""
    if not bad.any():
        return
    level, what, detail, action = texts
    ids, first, counts = np.unique(evals["trial_id"].to_numpy()[bad], return_index=True, return_counts=True)
    lines = evals["row"].to_numpy()[bad][first] + 1
    for trial_id, line, count in zip(ids, lines, counts, strict=True):
        odd.add(level, where[trial_id], what, f"from line {line}{': ' if detail else ''}{detail}", action, count)


def _times(evals: pd.DataFrame, where: Sequence[str], odd: Oddities) -> Floats:
    """The score column, or the accumulated submission time where the two disagree or the score is missing."""
    score = evals["score"].to_numpy()
    accumulated = evals["submission_time"].to_numpy()
    with np.errstate(invalid="ignore"):
        apart = np.abs(score - accumulated) > np.maximum(TIME_TOLERANCE, 1e-3 * np.abs(accumulated))
    only_time = np.isnan(score) & ~np.isnan(accumulated)
    texts = ("warning", "score is not the accumulated time", "", "the accumulated submission time is used")
    _each(evals, apart, where, odd, texts)
    _each(evals, only_time, where, odd, ("warning", "no score", "", "the accumulated submission time is used"))
    only_score = np.isnan(accumulated) & ~np.isnan(score)
    _each(evals, only_score, where, odd, ("note", "no accumulated submission time", "", "the score is used"))
    return np.where(apart | only_time, accumulated, score)


def _possible_rows(evals: pd.DataFrame, where: Sequence[str], odd: Oddities) -> Bools:
    time, step = evals["time"].to_numpy(), evals["step"].to_numpy()
    dropped = "the row is dropped"
    with np.errstate(invalid="ignore"):
        no_time = ~np.isfinite(time)
        negative = time < 0
        zero = (time == 0) & (step > 0)
        no_step = ~np.isfinite(step)
        bad_step = (step < 0) | (~no_step & (step != np.floor(step)))
    _each(evals, no_time, where, odd, ("error", "no time", "neither a score nor a submission time", dropped))
    _each(evals, negative, where, odd, ("warning", "negative time", "", dropped))
    _each(evals, zero, where, odd, ("warning", "zero time", "after at least one step", dropped))
    _each(evals, no_step, where, odd, ("error", "no step", "global_step is missing or infinite", dropped))
    _each(evals, bad_step, where, odd, ("warning", "impossible step", "negative or not whole", dropped))
    possible: Bools = ~(no_time | negative | zero | no_step | bad_step)
    with np.errstate(invalid="ignore"):
        parts = evals["eval_time"].fillna(0).to_numpy() + evals["logging_time"].fillna(0).to_numpy() + time
        total = evals["total_time"].to_numpy()
        beyond = possible & (parts > total * 1.01 + 1.0)
    texts = ("warning", "times exceed the total", "submission + evaluation + logging > total_duration", "kept")
    _each(evals, beyond, where, odd, texts)
    return possible


def _metrics(evals: pd.DataFrame, where: Sequence[str], odd: Oddities) -> None:
    """Values no metric can have become missing; missing ones are counted where the file has the column at all."""
    for name in [name for name in evals.columns if METRIC.fullmatch(name)]:
        values = evals[name].to_numpy()
        metric = name.split("/", 1)[1]
        low, high = RANGES.get(metric, (-np.inf, np.inf))
        infinite = np.isinf(values)
        with np.errstate(invalid="ignore"):
            outside = ~infinite & ((values < low) | (values > high))
        if infinite.any() or outside.any():
            _each(evals, infinite, where, odd, ("warning", "infinite metric", name, "that value is missing"))
            detail = f"{name} outside [{low:g}, {high:g}]"
            _each(evals, outside, where, odd, ("warning", "impossible metric", detail, "that value is missing"))
            evals[name] = np.where(infinite | outside, np.nan, values)


def _order(evals: pd.DataFrame, where: Sequence[str], odd: Oddities) -> pd.DataFrame:
    """Settle repeated, unordered and overtaken rows of the few trials that have any."""
    trial = evals["trial_id"].to_numpy()
    step, time = evals["step"].to_numpy(), evals["time"].to_numpy()
    rows = np.flatnonzero(evals["believed"].to_numpy())
    same = trial[rows[1:]] == trial[rows[:-1]]
    suspect = same & ((np.diff(step[rows]) <= 0) | (np.diff(time[rows]) < 0))
    if not suspect.any():
        return evals
    believed = evals["believed"].to_numpy().copy()
    order = np.arange(len(evals))
    preemptions = evals["preemptions"].to_numpy()
    for trial_id in np.unique(trial[rows[1:]][suspect]):
        start, stop = np.searchsorted(trial, [trial_id, trial_id + 1])
        mine = rows[(rows >= start) & (rows < stop)]
        kept, moved = _settle(step[mine], time[mine], preemptions[mine], where[trial_id], odd)
        believed[mine] = False
        believed[mine[kept]] = True
        if moved:
            rest = np.setdiff1d(np.arange(start, stop), mine[kept])
            order[start:stop] = np.concatenate([mine[kept], rest])
    evals["believed"] = believed
    return evals.iloc[order].reset_index(drop=True)


def _settle(
    step: Floats, time: Floats, preemptions: Floats, where: str, odd: Oddities
) -> tuple[npt.NDArray[np.intp], bool]:
    """Positions of the rows to believe, in believed order, and whether that order is not the file's."""
    kept = np.arange(len(step))
    # What ran after the checkpoint was thrown away by a resume: only the branch that lived on counts.
    alive = np.ones(len(step), dtype=bool)
    for k in (np.flatnonzero(np.diff(step) < 0) + 1).tolist():
        if preemptions[k] > preemptions[k - 1] or _restarts(step, time, k):
            alive[:k] &= step[:k] < step[k]
    if not alive.all():
        kept = np.flatnonzero(alive)
        lost = len(step) - len(kept)
        odd.add("note", where, "resumed run", "steps jump back", "the overtaken rows are dropped", lost)
    sorted_rows = kept[np.lexsort((time[kept], step[kept]))]
    chain = sorted_rows[_longest_rise(time[sorted_rows])]
    if len(chain) < len(kept):
        what = "decreasing time" if (np.diff(step[kept]) >= 0).all() else "steps and times disagree"
        lost = len(kept) - len(chain)
        odd.add("warning", where, what, "", "the fewest rows that contradict the others are dropped", lost)
    moved = bool((np.diff(chain) < 0).any())
    if moved:
        odd.add("warning", where, "unordered steps", "", "the rows are put in the order of steps")
    repeated = np.concatenate([[False], np.diff(step[chain]) == 0])
    if repeated.any():
        odd.add("warning", where, "duplicate steps", "", "the first row of each step is kept", repeated.sum())
    return chain[~repeated], moved


def _restarts(step: Floats, time: Floats, k: int) -> bool:
    """Whether the clock runs on at row k while more than one row repeats earlier steps: no single wrong number."""
    reached = step[:k].max()
    return bool(time[k] >= time[k - 1] and k + 1 < len(step) and step[k] < step[k + 1] <= reached)


def _longest_rise(values: Floats) -> npt.NDArray[np.intp]:
    """Positions of a longest subsequence that never falls (patience sorting, n log n)."""
    tails: list[float] = []
    ends: list[int] = []
    before = np.full(len(values), -1)
    for position, value in enumerate(values.tolist()):
        pile = bisect_right(tails, value)
        before[position] = ends[pile - 1] if pile else -1
        if pile == len(tails):
            tails.append(value)
            ends.append(position)
        else:
            tails[pile], ends[pile] = value, position
    chain = []
    position = ends[-1] if ends else -1
    while position >= 0:
        chain.append(position)
        position = int(before[position])
    return np.array(chain[::-1], dtype=np.intp)


def missing_metrics(evals: pd.DataFrame, trials: pd.DataFrame, metrics: pd.Series, odd: Oddities) -> None:
    """Report trials whose target metric is missing, as a column or here and there.

    Args:
      evals, trials: as in ``Logs``, but that trials may be some of them only.
      metrics: the metric of each trial, "" where it is not known.
    """
    counts = dict(zip(trials["trial_id"], trials["evaluations"], strict=True))
    where = dict(zip(trials["trial_id"], trials["where"], strict=True))
    ids, believed = evals["trial_id"].to_numpy(), evals["believed"].to_numpy()
    for metric, part in trials[metrics != ""].groupby(metrics[metrics != ""]):
        column = f"validation/{metric}"
        mine = np.isin(ids, part["trial_id"].to_numpy()) & believed
        missing = mine if column not in evals else mine & np.isnan(evals[column].to_numpy())
        for trial_id, bad in zip(*np.unique(ids[missing], return_counts=True), strict=True):
            if bad == counts[trial_id]:
                detail = f"{column} is nowhere a number"
                odd.add("error", where[trial_id], "no target metric", detail, "the trial cannot hit")
            else:
                detail = f"{column} is no number in {bad} of {counts[trial_id]} evaluations"
                odd.add("error", where[trial_id], "missing metric", detail, "no hit there", bad)
