"""The leaderboard: scores with intervals, ranks, speedups, and for each cell what it is or why it is a miss."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from scoring.errors import InputError
from scoring.frames import lookup, records
from scoring.judge import bootstrap, parity, report, score, trials
from scoring.judge.lint import lint, step_outliers
from scoring.judge.targets import Rules, rules_for
from scoring.oddities import Oddities, merge
from scoring.read.logs import Logs
from scoring.show import text
from scoring.show.text import Table

BASELINES = ("nadamw", "baseline", "prize_qualification_baseline")


@dataclass(frozen=True)
class Leaderboard:
    """Everything the leaderboard shows.

    Attributes:
      ranking: by submission, best first: rank, score, and, under the exact rules, the intervals and speedups.
      cells: one row per submission and base workload: those of trials.cells, and ratio and reason ("" if credited).
      trials, studies: the tables the cells come from.
      profiles: the corners of each submission's performance profile.
    """

    ranking: pd.DataFrame
    cells: pd.DataFrame
    trials: pd.DataFrame
    studies: pd.DataFrame
    profiles: dict[str, tuple[score.Floats, score.Floats]]
    rules: Rules
    reference: str
    relative: bool
    cost: str
    official: bool
    oddities: pd.DataFrame


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
) -> Leaderboard:
    """Score all submissions as one group, or (``relative``) against the fixed costs of ``reference``."""
    odd = Oddities()
    rules = select(rules_for(logs.trials, version, ruleset, odd), workloads, logs)
    names = sorted(logs.trials["submission"].unique())
    chosen = _reference(names, reference, logs.trials[logs.trials["workload"].isin(list(rules.scored))])
    if relative and not chosen:
        raise InputError("--relative_to=reference needs --reference=NAME")
    if cost == "normalised":
        logs = trials.with_normalised(logs, rules, chosen)
    reached = trials.reach(logs, rules, cost)
    if not reached["workload"].isin(list(rules.scored)).any():
        raise InputError(f"no trial of any of {', '.join(rules.scored)}: nothing to score")
    scored = reached[reached["workload"].isin(list(rules.scored))]
    if cost != "time":
        odd.rows += step_outliers(scored)
    by_study = trials.studies(scored, rules)
    cells = trials.completed(trials.cells(by_study, rules), names, rules)
    penalty = score.penalties(scored, rules, cost)
    unit = score.reference_unit(cells, rules, chosen, penalty) if relative else None
    if official:
        found_cells = parity.cells(parity.studies(logs, rules, cost), rules)
        raw_cells = cells.drop(columns="cost").merge(found_cells, on=["submission", "workload"], how="left")
        raw_cells["cost"] = raw_cells["cost"].fillna(np.inf)
        ranking = parity.scores(logs, rules, cost).to_frame()
        details = explain(raw_cells, rules, None)
        profiles = score.profiles(raw_cells, rules)
    else:
        ranking = _ranking(cells, rules, unit, penalty, chosen, replicates)
        details = explain(cells, rules, unit)
        profiles = score.profiles(cells, rules, unit)
    ranking.insert(0, "rank", ranking["score"].rank(ascending=False, method="min").astype(int))
    found = merge(lint(logs, rules, reached), odd.table())
    return Leaderboard(ranking, details, scored, by_study, profiles, rules, chosen, relative, cost, official, found)


def raw(board: Leaderboard) -> report.Report:
    """The report on the same trials: steps, time and best metric per workload and submission, without profiles."""
    summary = report.summarise(board.trials, board.rules, board.reference)
    return report.Report(summary, board.studies, board.trials, board.rules, board.reference, board.oddities)


def select(rules: Rules, workloads: str, logs: Logs) -> Rules:
    """The rules over a named subset: base, qualification, present, or a list of workloads separated by commas."""
    if workloads == "base":
        return rules
    if workloads == "qualification":
        if not rules.qualification:
            raise InputError("these workloads have no qualification set")
        return rules.restricted(rules.qualification)
    present = set(logs.trials["workload"])
    if workloads == "present":
        return rules.restricted(name for name in rules.base if name in present)
    names = [name.strip() for name in workloads.split(",") if name.strip()]
    # A workload of our own, known from meta_data only, may be scored beside the official ones.
    extra = tuple(name for name in names if name in rules.targets and name not in rules.base)
    return replace(rules, base=rules.base + extra).restricted(names)


def _reference(names: list[str], wanted: str | None, scored: pd.DataFrame) -> str:
    if wanted and wanted not in names:
        raise InputError(f"--reference={wanted}: no such submission; there are {', '.join(names)}")
    return wanted or next((name for name in BASELINES if name in set(scored["submission"])), "")


def _ranking(
    cells: pd.DataFrame,
    rules: Rules,
    unit: score.Floats | None,
    penalty: pd.Series,
    reference: str,
    replicates: int,
) -> pd.DataFrame:
    ranking = score.scores(cells, rules, unit).to_frame()
    grid = score.grid(cells, rules)
    filled = penalty.reindex(list(rules.scored)).to_numpy(dtype=float)

    def drawn_unit(draws: score.Floats) -> score.Floats:
        own = draws[:, [grid.submissions.index(reference)], :]
        return np.where(np.isfinite(own), own, filled)

    intervals = bootstrap.group(cells, rules, None if unit is None else drawn_unit, replicates)
    ranking = ranking.join(intervals)
    if reference:
        base = grid.values[:, : len(rules.base)]
        own = base[grid.submissions.index(reference)]
        gain = score.speedups(base, own, filled[: len(rules.base)])
        ranking["speedup"] = pd.Series(gain, index=list(grid.submissions))
        ranking = ranking.join(bootstrap.speedup_interval(cells, rules, reference, filled, replicates))
    return ranking


def explain(cells: pd.DataFrame, rules: Rules, unit: score.Floats | None) -> pd.DataFrame:
    """Each submission on each base workload: its ratio, or the reason why it has no credit there."""
    grid = score.grid(cells, rules)
    ratio = score.ratios(grid.values, rules, unit)
    best = grid.values.min(axis=0) if unit is None else unit[0]
    indexed = cells.set_index(["submission", "workload"])
    variants = {base: name for name, base in rules.held_out.items()}
    order = list(rules.scored)
    rows = []
    for i, submission in enumerate(grid.submissions):
        for j, workload in enumerate(rules.base):
            reason = _reason(grid.values[i, j], best[j], (submission, workload), indexed)
            if not reason and not np.isfinite(ratio[i, j]):
                variant = variants.get(workload, "")
                k = order.index(variant) if variant else -1
                inner = _reason(grid.values[i, k], best[k], (submission, variant), indexed) if variant else ""
                reason = (
                    f"held-out {variant}: {inner or 'over 4 times the best'}"
                    if variant
                    else "over 4 times the best"
                )
            row = {"submission": submission, "workload": workload, "ratio": ratio[i, j], "reason": reason}
            rows.append(row)
    table = pd.DataFrame(rows)
    return table.merge(cells, on=["submission", "workload"], how="left")


def _reason(cost: float, best: float, key: tuple[str, str], cells: pd.DataFrame) -> str:
    if np.isfinite(cost):
        return "" if not cost > score.MAX_TAU * best else "over 4 times the best"
    if key not in cells.index or not lookup(cells, key)["present"]:
        return "no data"
    cell = lookup(cells, key)
    reason = "never reached" if cell["state"] in ("missed", "hit") else str(cell["state"])
    if cell["hits"]:
        part = f"reached in {cell['hits']} of {len(cell['values'])} studies"
        reason = part if reason == "never reached" else f"{part}; {reason}"
    if cell["present"] < len(cell["values"]):
        reason += f"; {len(cell['values']) - cell['present']} studies missing"
    return reason


def speedup_table(board: Leaderboard) -> pd.DataFrame:
    """Reference's cost over each submission's, submissions by base workloads; NaN where the submission misses."""
    costs = board.cells.pivot(index="submission", columns="workload", values="cost")[list(board.rules.base)]
    if board.reference not in costs.index:
        return pd.DataFrame()
    penalty = score.penalties(board.trials, board.rules, board.cost)
    own = costs.loc[board.reference].to_numpy(dtype=float)
    own = np.where(np.isfinite(own), own, penalty.reindex(list(costs.columns)).to_numpy(dtype=float))
    gains = pd.DataFrame(own / costs.to_numpy(), index=costs.index, columns=costs.columns)
    return gains.where(np.isfinite(costs)).reindex(board.ranking.index)


def ranking_table(board: Leaderboard) -> Table:
    """The ranked table."""
    headers = ["submission", "rank", "score"]
    intervals = "score_low" in board.ranking
    if intervals:
        headers += ["95 % interval", "rank interval", "first in"]
    if "speedup" in board.ranking:
        headers += [f"speedup over {board.reference}", "95 % interval"]
    what = {"time": "time to target", "steps": "steps to target"}.get(board.cost, board.cost)
    rule = "official procedure" if board.official else "exact rules"
    against = f"against {board.reference}" if board.relative else "within the group"
    base = ", ".join(board.rules.base)
    caption = f"AlgoPerf {board.rules.version}, {board.rules.ruleset} tuning, {what}, {rule}, {against}"
    table = Table(caption, headers, left=(0,))
    for name, row in board.ranking.iterrows():
        cells = [str(name), f"{row['rank']:.0f}", f"{row['score']:.4f}"]
        if intervals:
            cells += [f"{row['score_low']:.2f} to {row['score_high']:.2f}"]
            cells += [f"{row['rank_low']:.0f} to {row['rank_high']:.0f}", text.percent(row["first"])]
        if "speedup" in board.ranking:
            cells += [f"{row['speedup']:.2f}", f"{row['speedup_low']:.2f} to {row['speedup_high']:.2f}"]
        table.rows.append(cells)
    table.note = f"Workloads: {base}."
    if intervals:
        table.note += " Intervals are 95 % bootstrap intervals over studies; 'first in' is a share of replicates."
    return table


def heat_texts(board: Leaderboard) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Ratios and short words for the heat map, submissions by base workloads in order of rank."""
    short = board.cells.assign(
        text=[
            f"{ratio:.2f}" if np.isfinite(ratio) else _short(reason)
            for ratio, reason in zip(board.cells["ratio"], board.cells["reason"], strict=True)
        ]
    )
    order = list(board.ranking.index)
    found = [
        short.pivot(index="submission", columns="workload", values=column).loc[order, list(board.rules.base)]
        for column in ("ratio", "text")
    ]
    return found[0], found[1]


def _short(reason: str) -> str:
    for start, word in (("held-out", "held-out"), ("over 4", "> 4x"), ("no data", "no data")):
        if reason.startswith(start):
            return word
    if reason.startswith("reached in"):
        return reason.split(" studies")[0].removeprefix("reached in ")
    return {"over budget": "budget", "unfinished": "unfinished"}.get(reason.split(";")[0], "miss")


def misses_table(board: Leaderboard) -> Table:
    """Every base workload a submission gets no credit for, and why."""
    headers = ["submission", "workload", "reason", "reached", "best", "to target", "budget used"]
    table = Table("Misses and their reasons", headers, left=(0, 1, 2))
    shares = board.trials.groupby(["submission", "workload"])[["distance", "share"]].agg(
        {"distance": "min", "share": "max"}
    )
    for name in board.ranking.index:
        for row in records(board.cells[(board.cells["submission"] == name) & (board.cells["reason"] != "")]):
            key = (name, row.workload)
            distance, share = shares.loc[key] if key in shares.index else (np.nan, np.nan)
            hits = getattr(row, "hits", np.nan)
            best = getattr(row, "best", np.nan)
            reached = f"{hits:.0f} of {len(row.values)}" if isinstance(getattr(row, "values", None), tuple) else "–"
            numbers = [text.number(best), text.number(max(distance, 0.0)), text.percent(share)]
            table.rows.append([str(name), row.workload, row.reason, reached, *numbers])
    table.note = "The distance to the target is that of the best trial; 0 means that some trial reached it."
    return table


def cost_table(board: Leaderboard) -> Table:
    """Medians of all submissions on all base workloads."""
    what = {"time": "Seconds to target", "steps": "Steps to target"}.get(board.cost, f"{board.cost} to target")
    table = Table(f"{what}, median over studies", ["submission", *board.rules.base], left=(0,))
    costs = board.cells.pivot(index="submission", columns="workload", values="cost")
    for name in board.ranking.index:
        table.rows.append([str(name), *(text.number(costs.loc[name, w]) for w in board.rules.base)])
    return table


def comparison_tables(logs: Logs, rules: Rules, cost: str) -> list[Table]:
    """Official and exact scores with what each difference of procedure adds, and the medians that change."""
    found = parity.compare(logs, rules, cost)
    table = Table("Official procedure against exact rules", ["submission", *found.columns], left=(0,))
    for name, row in found.iterrows():
        steps = [f"{value:+.4f}" if abs(value) >= 5e-5 else "·" for value in row.iloc[1:-1]]
        table.rows.append([str(name), f"{row['official']:.4f}", *steps, f"{row['exact']:.4f}"])
    changed = Table("Medians that differ", ["submission", "workload", "official", "exact", "why"], left=(0, 1, 4))
    for row in records(parity.changed_cells(logs, rules, cost)):
        changed.rows.append([row.submission, row.workload, f"{row.official:.1f}", f"{row.exact:.1f}", row.why])
    changed.note = "" if changed.rows else "No median differs."
    return [table, changed]
