"""The leaderboard: scores with intervals, ranks, speedups, and for each cell what it is or why it is a miss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from commands.errors import UserError
from scoring.judge import bootstrap, cells, parity, published, reasons, score, sweep, trials
from scoring.judge.columns import Floats
from scoring.judge.frameworks import labelled
from scoring.judge.lint import lint
from scoring.judge.rules import Rules
from scoring.judge.selection import choose_reference, select
from scoring.judge.versions import rules_for
from scoring.oddities import Oddities, merge
from scoring.read.logs import Logs


@dataclass(frozen=True)
class Leaderboard:
    """Everything the leaderboard shows.

    Attributes:
      ranking: by submission, best first: rank, score, reached (base workloads whose median study reached the
        target), credited, framework, under the exact rules intervals and speedups, other_rank by steps or time.
      cells: one row per submission and base workload: those of cells.cells, and ratio and reason ("" if credited).
      trials, studies: the tables the cells come from.
      profiles: the corners of each submission's performance profile.
      speedups: the reference's cost over each submission's, submissions by base workloads; NaN where it missed.
      reference_missed: the base workloads on which the reference itself missed and counts at the penalty.
      sweep: scores under relaxed targets, if asked for.
      published: the submissions whose numbers were shipped, not read.
    """

    ranking: pd.DataFrame
    cells: pd.DataFrame
    trials: pd.DataFrame
    studies: pd.DataFrame
    profiles: Mapping[str, tuple[Floats, Floats]]
    speedups: pd.DataFrame
    reference_missed: tuple[str, ...]
    rules: Rules
    reference: str
    relative: bool
    cost: str
    official: bool
    oddities: pd.DataFrame
    sweep: sweep.Sweep | None = None
    published: frozenset[str] = frozenset()
    inputs: tuple[str, ...] = ()

    @property
    def procedure(self) -> str:
        """Which rules made the score."""
        return "official procedure" if self.official else "exact rules"


def build(
    logs: Logs,
    version: str = "auto",
    ruleset: str = "auto",
    workloads: str = "base",
    cost: str = "time",
    reference: str | None = None,
    relative: bool = False,
    official: bool = False,
    replicates: int = bootstrap.REPLICATES,
    studies: int = 0,
    relaxations: Mapping[str, float] | None = None,
    against: str = "",
    shares: Sequence[float] = (),
) -> Leaderboard:
    """Score all submissions as one group, or (``relative``) against the fixed costs of ``reference``.

    Args:
      logs: what was read.
      version, ruleset, studies: see ``versions.rules_for``.
      workloads: ``base``, ``qualification``, ``present``, or names separated by commas.
      cost: ``time``, ``steps``, ``normalised``, or a numeric column of the evaluations.
      reference: the submission speedups are over; by default a baseline, if there is one; "" for none.
      official: the official procedure instead of the exact rules.
      replicates: of the bootstrap.
      relaxations: share by which targets are made easier, see ``Rules.relaxed``.
      against: ``published`` puts the shipped numbers of published submissions into the group.
      shares: relaxations of all targets under which the group is scored as well.

    Raises:
      UserError: a name is unknown, nothing is left to score, or two wishes exclude each other.
    """
    if relative and official:
        raise UserError("--relative_to=reference is not part of the official procedure: leave out --parity")
    if against and official:
        raise UserError("--against=published scores by the exact rules: leave out --parity, or give the logs")
    if shares and (against or relative or cost == "normalised"):
        raise UserError("--sweep goes with none of --against, --relative_to=reference, --cost=normalised")
    odd = Oddities()
    rules = select(rules_for(logs.trials, version, ruleset, odd, studies), workloads, logs)
    if relaxations:
        rules = rules.relaxed(relaxations)
    names = sorted(labelled(logs.trials)["submission"].unique())
    unpriced: frozenset[str] = frozenset()
    extra = _published(rules, cost, names) if against else None
    everyone = names if extra is None else sorted({*names, *extra["submission"]})
    chosen = choose_reference(everyone, reference, _with_trials(logs, rules, extra))
    if relative and not chosen:
        raise UserError("--relative_to=reference needs --reference=NAME")
    if cost == "normalised":
        logs, unpriced = trials.with_normalised(logs, rules, chosen)
    reached = trials.reach(logs, rules, cost)
    if not reached["workload"].isin(list(rules.scored)).any():
        raise UserError(
            f"no trial of any of {', '.join(rules.scored)}: nothing to score; --workloads=present takes all"
        )
    found = merge(lint(logs, rules, reached), odd.table())
    if extra is not None:
        reached = pd.concat([reached, extra], ignore_index=True)
    scored = reached[reached["workload"].isin(list(rules.scored))]
    judged = _judge(logs, rules, cost, scored, everyone, official)
    penalty = score.penalties(scored, rules, cost)
    unit = score.reference_unit(judged.cells, rules, chosen, penalty) if relative else None
    values = parity.of_cells(judged.cells, rules) if official else score.scores(judged.cells, rules, unit)
    details = reasons.explain(judged.cells, rules, unit, unpriced)
    ranking = _ranking(values, details)
    if not official:
        ranking = ranking.join(_intervals(judged.cells, rules, unit, penalty, chosen, replicates))
    speedups, missed = _speedups(details, rules, chosen, penalty)
    if chosen and not official:
        ranking = ranking.join(_mean_speedups(judged.cells, rules, chosen, penalty, replicates))
    if cost in ("time", "steps") and not relative:
        ranking["other_rank"] = _other_rank(logs, rules, cost, scored, everyone, official)
    swept = None
    if shares:
        swept = sweep.sweep(rules, lambda easier: _rescored(logs, easier, cost, everyone, official), shares)
    return Leaderboard(
        ranking,
        details,
        scored,
        judged.studies,
        score.profiles(judged.cells, rules, unit),
        speedups.reindex(ranking.index),
        missed,
        rules,
        chosen,
        relative,
        cost,
        official,
        found,
        swept,
        frozenset() if extra is None else frozenset(extra["submission"]),
        logs.inputs,
    )


@dataclass(frozen=True)
class _Judged:
    studies: pd.DataFrame
    cells: pd.DataFrame


def _judge(
    logs: Logs, rules: Rules, cost: str, scored: pd.DataFrame, names: Sequence[str], official: bool
) -> _Judged:
    """Studies and cells under one of the two procedures; every submission has a cell for every workload."""
    if official:
        by_study = parity.studies(logs, rules, cost, reached=scored)
        table = parity.cells(by_study, rules)
    else:
        by_study = cells.studies(scored, rules)
        table = cells.cells(by_study, rules)
    return _Judged(by_study, cells.completed(table, names, rules))


def _rescored(
    logs: Logs, rules: Rules, cost: str, names: Sequence[str], official: bool
) -> tuple[pd.Series, pd.DataFrame]:
    reached = trials.reach(logs, rules, cost)
    scored = reached[reached["workload"].isin(list(rules.scored))]
    table = _judge(logs, rules, cost, scored, names, official).cells
    return (parity.of_cells(table, rules) if official else score.scores(table, rules)), table


def _other_rank(
    logs: Logs, rules: Rules, cost: str, scored: pd.DataFrame, names: Sequence[str], official: bool
) -> pd.Series:
    """The rank by steps if the cost is time, and the other way round."""
    other = "steps" if cost == "time" else "time"
    table = _judge(logs, rules, other, scored.assign(cost=scored[other]), names, official).cells
    values = parity.of_cells(table, rules) if official else score.scores(table, rules)
    return values.rank(ascending=False, method="min").astype(int)


def _published(rules: Rules, cost: str, names: Sequence[str]) -> pd.DataFrame:
    table = published.load(rules, cost)
    table = table[table["workload"].isin(list(rules.scored))]
    clash = table["submission"].isin(names)
    return table.assign(submission=table["submission"].where(~clash, table["submission"] + " (published)"))


def _with_trials(logs: Logs, rules: Rules, extra: pd.DataFrame | None) -> set[str]:
    table = labelled(logs.trials)
    mine = set(table.loc[table["workload"].isin(list(rules.scored)), "submission"])
    return mine | (set() if extra is None else set(extra["submission"]))


def _ranking(values: pd.Series, details: pd.DataFrame) -> pd.DataFrame:
    ranking = values.to_frame()
    ranking.insert(0, "rank", ranking["score"].rank(ascending=False, method="min").astype(int))
    by_name = details.groupby("submission")
    ranking["reached"] = details["cost"].lt(np.inf).groupby(details["submission"]).sum()
    ranking["credited"] = details["reason"].eq("").groupby(details["submission"]).sum()
    ranking["present"] = details["present"].gt(0).groupby(details["submission"]).sum()
    ranking["framework"] = by_name["framework"].agg(
        lambda column: ", ".join(sorted({part for name in column for part in str(name).split(", ") if part}))
    )
    return ranking


def _intervals(
    table: pd.DataFrame,
    rules: Rules,
    unit: Floats | None,
    penalty: pd.Series,
    reference: str,
    replicates: int,
) -> pd.DataFrame:
    grid = score.grid(table, rules)
    filled = penalty.reindex(list(rules.scored)).to_numpy(dtype=float)

    def drawn_unit(draws: Floats) -> Floats:
        own = draws[:, [grid.submissions.index(reference)], :]
        return np.where(np.isfinite(own), own, filled)

    found = bootstrap.group(table, rules, None if unit is None else drawn_unit, replicates)
    # One study says nothing about the spread of studies.
    found = found.astype(float)
    found.loc[sorted(bootstrap.single(table) & set(found.index))] = np.nan
    return found


def _speedups(
    details: pd.DataFrame, rules: Rules, reference: str, penalty: pd.Series
) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """By submission and base workload, and the workloads on which the reference counts at the penalty."""
    costs = details.pivot(index="submission", columns="workload", values="cost")[list(rules.base)]
    if not reference:
        return pd.DataFrame(index=costs.index), ()
    own = costs.loc[reference].to_numpy(dtype=float)
    missed = tuple(name for name, cost in zip(rules.base, own, strict=True) if not np.isfinite(cost))
    own = np.where(np.isfinite(own), own, penalty.reindex(list(costs.columns)).to_numpy(dtype=float))
    gains = pd.DataFrame(own / costs.to_numpy(dtype=float), index=costs.index, columns=costs.columns)
    return gains.where(np.isfinite(costs)), missed


def _mean_speedups(
    table: pd.DataFrame, rules: Rules, reference: str, penalty: pd.Series, replicates: int
) -> pd.DataFrame:
    """Geometric means with intervals; a submission that ran none of the workloads has none."""
    grid = score.grid(table, rules)
    filled = penalty.reindex(list(rules.base)).to_numpy(dtype=float)
    base = grid.values[:, : len(rules.base)]
    gain = score.speedups(base, base[grid.submissions.index(reference)], filled)
    found = bootstrap.speedup_interval(
        table, rules, reference, penalty.reindex(list(rules.scored)).to_numpy(dtype=float), replicates
    )
    found.insert(0, "speedup", pd.Series(gain, index=list(grid.submissions)))
    single = bootstrap.single(table)
    if reference in single:
        single = set(grid.submissions)
    found.loc[sorted(single), ["speedup_low", "speedup_high"]] = np.nan
    present = table[table["workload"].isin(list(rules.base))].groupby("submission")["present"].sum()
    found.loc[[name for name in found.index if not present[name]]] = np.nan
    return found
