"""Performance profiles and scores, integrated exactly, and geometric-mean speedups."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from commands.errors import UserError
from scoring.judge.columns import Floats
from scoring.judge.rules import Rules

MAX_TAU = 4.0


@dataclass(frozen=True)
class Grid:
    """Costs as an array [..., submission, workload] with the names of the last two axes, base workloads first."""

    submissions: tuple[str, ...]
    workloads: tuple[str, ...]
    values: Floats


def grid(cells: pd.DataFrame, rules: Rules, column: str = "cost") -> Grid:
    """The medians as an array; a submission without a workload has infinity there."""
    names = tuple(sorted(cells["submission"].unique()))
    table = cells.pivot(index="submission", columns="workload", values=column)
    table = table.reindex(index=list(names), columns=list(rules.scored)).fillna(np.inf)
    return Grid(names, rules.scored, table.to_numpy(dtype=float))


def credited(values: Floats, rules: Rules, unit: Floats | None = None) -> Floats:
    """Base costs [..., submission, base] after the held-out rule; without credit they are infinite.

    A held-out cell counts only if its base was reached; a cell above 4 times the unit of its column (the least of
    the group, or a reference's cost) counts as a miss; a base cell needs its held-out cell.
    """
    values = values.copy()
    order = list(rules.scored)
    pairs = [(order.index(base), order.index(name)) for name, base in rules.held_out.items() if name in order]
    for base, variant in pairs:
        missed = ~np.isfinite(values[..., base])
        values[..., variant] = np.where(missed, np.inf, values[..., variant])
    best = values.min(axis=-2, keepdims=True) if unit is None else unit
    with np.errstate(invalid="ignore"):
        values = np.where(values > MAX_TAU * best, np.inf, values)
    for base, variant in pairs:
        missed = ~np.isfinite(values[..., variant])
        values[..., base] = np.where(missed, np.inf, values[..., base])
    return values[..., : len(rules.base)]


def ratios(values: Floats, rules: Rules, unit: Floats | None = None) -> Floats:
    """Credited cost over the least of the group, or over ``unit`` [..., 1, workload]; infinite without credit."""
    base = credited(values, rules, unit)
    best = base.min(axis=-2, keepdims=True) if unit is None else unit[..., : len(rules.base)]
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(base), base / best, np.inf)


def exact(ratio: Floats) -> Floats:
    """The integral of the performance profile over [1, 4], divided by 3.

    The profile, the share of workloads with ratio at most tau, is a step function: each workload adds (4 - r) / 3,
    between 0 and 1.
    """
    result: Floats = np.clip((MAX_TAU - ratio) / (MAX_TAU - 1.0), 0.0, 1.0).mean(axis=-1)
    return result


def relative(ratio: Floats) -> Floats:
    """The same against a fixed reference, whose ratios may be below 1: the integral over [0, 4], divided by 3.

    A workload still adds (4 - r) / 3, so that the reference itself scores 1 and one twice as fast 7 / 6.
    """
    result: Floats = (np.clip(MAX_TAU - ratio, 0.0, MAX_TAU) / (MAX_TAU - 1.0)).mean(axis=-1)
    return result


def reference_unit(cells: pd.DataFrame, rules: Rules, reference: str, penalty: pd.Series) -> Floats:
    """The reference's costs [1, workload], its misses at the penalty, as a fixed measure for all others."""
    table = grid(cells, rules)
    if reference not in table.submissions:
        raise UserError(f"no submission {reference!r}: there are {', '.join(table.submissions)}")
    own = table.values[table.submissions.index(reference)]
    filled: Floats = np.where(np.isfinite(own), own, penalty.reindex(list(rules.scored)).to_numpy(dtype=float))
    return filled[None, :]


def scores(cells: pd.DataFrame, rules: Rules, unit: Floats | None = None) -> pd.Series:
    """The exact score of each submission, best first; relative to the group, or to ``unit``."""
    table = grid(cells, rules)
    integral = exact if unit is None else relative
    result = pd.Series(integral(ratios(table.values, rules, unit)), index=list(table.submissions), name="score")
    return result.sort_index().sort_values(ascending=False, kind="stable")


def profiles(cells: pd.DataFrame, rules: Rules, unit: Floats | None = None) -> dict[str, tuple[Floats, Floats]]:
    """For each submission the corners of its profile: tau up to 4 and the share of workloads from there on.

    Tau starts at 1, or at the least ratio against a fixed reference if that is less.
    """
    table = grid(cells, rules)
    ratio = ratios(table.values, rules, unit)
    start = min(1.0, float(ratio.min(initial=1.0)))
    found = {}
    for name, own in zip(table.submissions, ratio, strict=True):
        tau = np.unique(np.concatenate([[start, 1.0], own[own <= MAX_TAU], [MAX_TAU]]))
        found[name] = (tau, (own[None, :] <= tau[:, None]).mean(axis=1))
    return found


def penalties(reached: pd.DataFrame, rules: Rules, cost: str = "time") -> pd.Series:
    """What a miss counts as in a geometric mean: by time the budget plus a second.

    By any other cost: one more than the most any trial of the workload came to, or than the step hint.
    """
    found = {}
    for workload in rules.scored:
        if cost == "time":
            found[workload] = rules.budget(workload) + 1.0
            continue
        mine = reached[reached["workload"] == workload]
        seen = [mine.loc[np.isfinite(mine["cost"]), "cost"].max()]
        if cost == "steps":
            seen += [mine["last_step"].max(), rules.targets[workload].step_hint]
        found[workload] = np.nanmax([*seen, 0.0]) + 1.0
    return pd.Series(found, dtype=float)


def speedups(values: Floats, reference: Floats, penalty: Floats) -> Floats:
    """Reference's cost over each submission's: geometric mean over [..., workload], misses at the penalty."""
    own = np.where(np.isfinite(values), values, penalty)
    other = np.where(np.isfinite(reference), reference, penalty)
    with np.errstate(divide="ignore", invalid="ignore"):
        result: Floats = np.exp(np.log(other / own).mean(axis=-1))
    return result
