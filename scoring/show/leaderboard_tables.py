"""The leaderboard in words: the ranking and the tables behind it."""

from __future__ import annotations

import numpy as np
import pandas as pd

from scoring.frames import records
from scoring.judge import lint, published, reasons
from scoring.judge.leaderboard import Leaderboard
from scoring.judge.score import MAX_TAU
from scoring.show import text
from scoring.show.text import NOTHING, Table

COSTS = {"time": "time to target", "steps": "steps to target"}
UNITS = {"time": "Seconds to target", "steps": "Steps to target"}


def heading(board: Leaderboard) -> str:
    """Under which rules the score stands."""
    against = f"against {board.reference}" if board.relative else "within the group"
    cost = COSTS.get(board.cost, board.cost)
    return text.sentence(f"{board.rules.title}, {cost}, {board.procedure}, {against}")


def odd_steps(board: Leaderboard) -> set[str]:
    """The submissions whose steps are no updates of the usual size: their ranks by steps mean little."""
    scored = set(board.rules.scored)
    return {name for name, workload in lint.odd_steps(board.oddities) if workload in scored}


def verdict(board: Leaderboard) -> str:
    """One sentence: who is first by how much, and how sure that is."""
    ranking = board.ranking
    first = str(ranking.index[0])
    best = ranking["score"].iloc[0]
    if best == 0:
        return f"Nobody has a score: no target of {len(board.rules.base)} workloads was reached with credit."
    leaders = [str(name) for name in ranking.index[ranking["score"] == best]]
    where = f"{int(ranking['credited'].iloc[0])} of {len(board.rules.base)} workloads credited"
    if len(leaders) > 1:
        said = f"{' and '.join(leaders)} share the first place with a score of {best:.4f}"
    elif len(ranking) > 1:
        second, next_best = str(ranking.index[1]), ranking["score"].iloc[1]
        said = f"{first} is first with a score of {best:.4f} ({where}), {best - next_best:.4f} ahead of {second}"
    else:
        said = f"{first}, alone in its group, scores {best:.4f} ({where})"
    if "first" not in ranking or len(ranking) == 1:
        return f"{said}."
    if np.isnan(ranking["score_low"].iloc[0]):
        return f"{said}; how sure that is cannot be said where a workload was run in one study only."
    share = ranking["first"].iloc[0]
    return f"{said}; with other studies drawn from these it would be first in {text.percent(share)} of cases."


def ranking_table(board: Leaderboard) -> Table:
    """The ranked table, the score beside the name."""
    ranking = board.ranking
    count = len(board.rules.base)
    headers = ["submission", "score"]
    intervals = "score_low" in ranking
    if intervals:
        headers += ["95 % interval"]
    headers += ["rank"]
    if intervals:
        headers += ["rank interval", "first in"]
    if "other_rank" in ranking:
        headers += ["rank by steps" if board.cost == "time" else "rank by time"]
    headers += [f"reached of {count}", "credited"]
    if "speedup" in ranking:
        mark = "*" if board.reference_missed else ""
        headers += [f"speedup over {board.reference}{mark}", "95 % interval"]
    table = Table(heading(board), headers, left=(0,), sticky=2)
    odd = odd_steps(board)
    for name, row in ranking.iterrows():
        mark = "‡" if name in odd else ""
        cells = [_marked(str(name), board), f"{row['score']:.4f}"]
        if intervals:
            cells += [text.between(row["score_low"], row["score_high"])]
        cells += [f"{row['rank']:.0f}{mark if board.cost == 'steps' else ''}"]
        if intervals:
            known = not np.isnan(row["rank_low"])
            cells += [f"{row['rank_low']:.0f} to {row['rank_high']:.0f}" if known else NOTHING]
            cells += [text.percent(row["first"])]
        if "other_rank" in ranking:
            cells += [f"{row['other_rank']:.0f}{mark if board.cost == 'time' else ''}"]
        cells += [f"{row['reached']:.0f}", f"{row['credited']:.0f}"]
        if "speedup" in ranking:
            cells += [text.ratio(row["speedup"]), text.between(row["speedup_low"], row["speedup_high"])]
        table.rows.append(cells)
    table.note = " ".join(_notes(board, intervals))
    return table


def _marked(name: str, board: Leaderboard) -> str:
    return f"{name} †" if name in board.published and not name.endswith("(published)") else name


def _notes(board: Leaderboard, intervals: bool) -> list[str]:
    notes = [f"Workloads: {', '.join(board.rules.base)}."]
    if intervals:
        notes.append(
            "Intervals are 95 % bootstrap intervals over studies: of three studies a drawn median is the middle "
            "one with probability 13/27 and each end with 7/27. 'First in' is a share of replicates. Where a "
            "workload was run in one study only, there is no interval."
        )
    if board.relative:
        notes.append("The reference itself scores 1 where it reached all targets; above it is faster.")
    if board.reference_missed and "speedup" in board.ranking:
        notes.append(
            f"* {board.reference} missed {', '.join(board.reference_missed)} and counts there as just over its "
            "limit: the true speedup over it is larger."
        )
    if odd_steps(board) and ("other_rank" in board.ranking or board.cost == "steps"):
        notes.append("‡ Its steps are not of the usual size (see the oddities): steps do not compare.")
    if board.published:
        notes.append(
            f"† Published numbers that come with this package ({published.source(board.rules)}). Seconds compare "
            "on the same hardware only; steps with --cost=steps."
        )
    if "other_rank" in board.ranking and len(board.ranking) > 2:
        ranks = board.ranking[["rank", "other_rank"]].rank()
        # Ranks that are all alike have no correlation.
        if (ranks.nunique() > 1).all():
            correlation = float(ranks.corr().to_numpy()[0, 1])
            notes.append(f"Spearman correlation of the ranks by time and by steps: {correlation:.2f}.")
    return notes


def _grid(board: Leaderboard, column: str) -> pd.DataFrame:
    table = board.cells.pivot(index="submission", columns="workload", values=column)
    return table.loc[list(board.ranking.index), list(board.rules.base)]


def ratio_table(board: Leaderboard) -> Table:
    """Submissions by workloads: the cost as a multiple of the best, or in a word why there is no credit."""
    ratios, why = _grid(board, "ratio"), _grid(board, "reason")
    unit = board.reference if board.relative else "the best"
    what = COSTS.get(board.cost, board.cost)
    table = Table(f"{what.capitalize()} as a multiple of {unit}; {board.rules.title}", headers(board))
    table.note = "Words say why there is no credit; 1 of 3 is how many studies reached the target."
    for name in ratios.index:
        row = [str(name)]
        shades: list[float | None] = [None]
        for workload in ratios.columns:
            value = float(ratios.loc[name, workload])
            hit = np.isfinite(value)
            row.append(text.ratio(value) if hit else reasons.short(str(why.loc[name, workload])))
            shades.append(min(max((value - 1) / (MAX_TAU - 1), 0.0), 1.0) if hit else None)
        table.rows.append(row)
        table.shades.append(shades)
    return table


def headers(board: Leaderboard) -> list[str]:
    """The headings of a table of submissions by workloads."""
    return ["submission", *(short_name(name) for name in board.rules.base)]


def short_name(workload: str) -> str:
    """A workload's name without the data set where that is long."""
    return workload.removeprefix("librispeech_").removeprefix("imagenet_").removeprefix("finewebedu_")


def cost_table(board: Leaderboard) -> Table:
    """Medians of all submissions on all base workloads."""
    what = UNITS.get(board.cost, f"{board.cost} to target")
    table = Table(f"{what}, median over studies; {board.rules.title}", headers(board))
    costs = _grid(board, "cost")
    for name in costs.index:
        table.rows.append([str(name), *(text.number(float(costs.loc[name, w])) for w in costs.columns)])
    return table


def speedup_table(board: Leaderboard) -> Table | None:
    """Speedups over the reference on each workload, None without a reference."""
    if not board.reference:
        return None
    headers = ["submission"]
    headers += [short_name(w) + ("*" if w in board.reference_missed else "") for w in board.rules.base]
    table = Table(f"Speedup over {board.reference} by workload (above 1 is faster); {board.rules.title}", headers)
    for name, row in board.speedups.iterrows():
        cells, shades = [str(name)], [None]
        for workload, value in row.items():
            more = "> " if workload in board.reference_missed and np.isfinite(value) else ""
            cells.append(f"{more}{text.ratio(float(value))}" if np.isfinite(value) else "miss")
            # From twice as fast to half as fast.
            shades.append(float(np.clip(0.5 - 0.5 * np.log2(value), 0, 1)) if np.isfinite(value) else None)  # type: ignore[arg-type]
        table.rows.append(cells)
        table.shades.append(list(shades))
    if board.reference_missed:
        table.note = f"* {board.reference} missed the target there: the speedup is at least that over its limit."
    return table


def distance_table(board: Leaderboard) -> Table:
    """How far each miss was from the target: of the best trial, as a share of the target."""
    table = Table(
        f"Distance to the target where it was missed, in per cent of it; {board.rules.title}", headers(board)
    )
    table.note = (
        "Of the best trial; 0 means that some trial reached it, but not the median study or not within the budget. "
        "A dot is a hit, a dash no data."
    )
    closest = board.trials.groupby(["submission", "workload"])["distance"].min()
    costs = _grid(board, "cost")
    for name in costs.index:
        row, shades = [str(name)], [None]
        for workload in costs.columns:
            if np.isfinite(costs.loc[name, workload]):
                row.append("·")
                shades.append(None)
                continue
            share = closest.get((name, workload), np.nan) / abs(board.rules.targets[workload].value)
            known = np.isfinite(share)
            row.append(f"{100 * max(share, 0.0):.1f}" if known else NOTHING)
            # A tenth away from the target is as far as anything beyond.
            shades.append(float(np.clip(share / 0.1, 0, 1)) if known else None)  # type: ignore[arg-type]
        table.rows.append(row)
        table.shades.append(list(shades))
    return table


def misses_table(board: Leaderboard) -> Table:
    """For each submission the workloads without credit, grouped by the reason."""
    table = Table(
        f"Why there is no credit; {board.rules.title}", ["submission", "without credit", "reasons"], left=(0, 2)
    )
    for name in board.ranking.index:
        mine = board.cells[(board.cells["submission"] == name) & (board.cells["reason"] != "")]
        groups: dict[str, list[str]] = {}
        for row in records(mine):
            groups.setdefault(str(row.reason), []).append(short_name(str(row.workload)))
        said = " · ".join(f"{', '.join(names)}: {reason}" for reason, names in groups.items())
        table.rows.append([str(name), f"{len(mine)} of {len(board.rules.base)}", said or NOTHING])
    table.note = "cells.csv has one row for each submission and workload."
    return table


def profile_table(board: Leaderboard) -> Table:
    """The performance profiles as numbers: the share of workloads reached within tau times the best."""
    taus = (1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 4.0)
    caption = f"Share of workloads reached within tau times the best; {board.rules.title}"
    table = Table(caption, ["submission", *(f"{t:g}" for t in taus)])
    for name in board.ranking.index:
        tau, share = board.profiles[name]
        values = [share[np.searchsorted(tau, t, side="right") - 1] if t >= tau[0] else 0.0 for t in taus]
        table.rows.append([str(name), *(text.percent(float(value)) for value in values)])
    table.note = "profiles.csv has every corner."
    return table
