"""Where each submission of a set of official logs stands by time, by steps, and under relaxed targets."""

from __future__ import annotations

import numpy as np
import pandas as pd

from scoring.judge import leaderboard, sweep
from scoring.judge.columns import BY_NAME
from scoring.judge.leaderboard import Leaderboard
from scoring.pages.page import Page, Section
from scoring.read.logs import Logs
from scoring.show import leaderboard_tables, sweep_tables, text
from scoring.show.text import NOTHING, Table


def build(logs: Logs, version: str = "auto", ruleset: str = "auto", command: str = "") -> Page:
    """The page from logs of one version.

    Args:
      logs: what was read.
      version, ruleset: see ``versions.rules_for``.
      command: what makes the page, to be named on it.
    """
    official = leaderboard.build(logs, version, ruleset, official=True)
    by_time = leaderboard.build(logs, version, ruleset, shares=sweep.SHARES)
    by_steps = leaderboard.build(logs, version, ruleset, cost="steps")
    board = by_time
    names = len(board.ranking)
    lead = [
        f"{names} submissions on {len(board.rules.base)} workloads: {board.rules.title}, {board.rules.studies} "
        "studies; a cell is the median over studies, a miss is infinite. Made by",
        f"    {command}",
        "A run of your own is placed in these tables, without the logs, by "
        "`python -m scoring leaderboard RUNS --against=published` (`--cost=steps` where the hardware differs, "
        "`--workloads=present` where it ran some of the workloads).",
    ]
    relaxed = [sweep_tables.sweep_table(board), sweep_tables.newly_reached_table(board)]
    sections = [
        Section("Scores", tables=[_ranks(official, by_time, by_steps)]),
        Section(
            "By time", tables=[leaderboard_tables.cost_table(by_time), leaderboard_tables.ratio_table(by_time)]
        ),
        Section(
            "By steps", tables=[leaderboard_tables.cost_table(by_steps), leaderboard_tables.ratio_table(by_steps)]
        ),
        Section("Under relaxed targets", tables=[table for table in relaxed if table is not None]),
        Section(
            "Workloads",
            tables=[
                _workloads(by_time),
                _matrix(by_time, "ms_per_step", "Milliseconds per step"),
                _matrix(by_time, "share", "Share of the budget used"),
                _matrix(by_time, "eval_share", "Share of the total time spent in evaluations"),
                leaderboard_tables.distance_table(by_time),
            ],
        ),
    ]
    title = f"The published submissions of {board.rules.title.split(',')[0]}"
    return Page(title, leaderboard_tables.verdict(official), lead, sections)


def _ranks(official: Leaderboard, by_time: Leaderboard, by_steps: Leaderboard) -> Table:
    """One row per submission: its scores by both procedures and both costs."""
    table = Table(
        "Scores (and ranks) by the official procedure and by the exact rules",
        [
            "submission",
            "framework",
            "official",
            "exact, time",
            "95 % interval",
            "exact, steps",
            "reached",
            "credited",
        ],
        left=(0, 1),
    )
    odd = leaderboard_tables.odd_steps(by_steps)
    for name in official.ranking.index:
        time, steps = by_time.ranking.loc[name], by_steps.ranking.loc[name]
        cells = [str(name), str(time["framework"])]
        cells += [f"{row['score']:.4f} ({row['rank']:.0f})" for row in (official.ranking.loc[name], time)]
        cells += [
            text.between(time["score_low"], time["score_high"]),
            f"{steps['score']:.4f} ({steps['rank']:.0f}{'‡' if name in odd else ''})",
        ]
        table.rows.append([*cells, f"{time['reached']:.0f}", f"{time['credited']:.0f}"])
    flagged = " ‡ Its steps are not of the usual size: steps do not compare." if odd else ""
    ranks = pd.DataFrame({"time": by_time.ranking["rank"], "steps": by_steps.ranking["rank"]}).rank()
    correlation = float(ranks.corr().to_numpy()[0, 1])
    table.note = (
        "Official: the published procedure, to the digit. Exact: a missing study is a miss, no grid, budgets "
        "checked. Reached: workloads whose median study reached the target; credited: of those, within 4 times the "
        f"best. Spearman correlation of the exact ranks by time and by steps: {correlation:.2f}.{flagged}"
    )
    return table


def _workloads(board: Leaderboard) -> Table:
    """What each workload asks for, who was best, and how coarse its times are."""
    table = Table(
        "What each workload asks for, and the best median",
        [
            "workload",
            "target",
            "budget",
            "evaluation period",
            "reached by",
            "best",
            "time",
            "steps",
            "period of time",
        ],
        left=(0, 1, 5),
    )
    for workload in board.rules.base:
        target = board.rules.targets[workload]
        direction = "at least" if target.higher_is_better else "at most"
        mine = board.cells[board.cells["workload"] == workload]
        hits = mine[np.isfinite(mine["cost"])]
        row = [
            workload,
            f"{target.metric} {direction} {target.value:g}",
            text.seconds(board.rules.budget(workload)),
        ]
        row += [text.seconds(target.eval_period), str(len(hits))]
        if hits.empty:
            closest = mine.sort_values("best", ascending=not target.higher_is_better, kind="stable").iloc[0]
            row += [f"nobody ({closest['submission']}: {text.number(closest['best'])})", *[NOTHING] * 3]
        else:
            best = hits.sort_values(["cost", "submission"], kind="stable").iloc[0]
            studies = board.studies[
                (board.studies["workload"] == workload) & (board.studies["submission"] == best["submission"])
            ]
            row += [
                str(best["submission"]),
                text.seconds(best["cost"]),
                text.steps(float(studies["steps"].median())),
            ]
            row += [text.percent(target.eval_period / best["cost"])]
        table.rows.append(row)
    table.note = (
        "The last column is the evaluation period as a share of the best time: a gain below it is invisible. Where "
        "nobody reached the target, the closest median over studies of the best metric."
    )
    return table


def _matrix(board: Leaderboard, column: str, caption: str) -> Table:
    """A column of the cells, submissions by workloads."""
    table = Table(caption + ", median over studies", leaderboard_tables.headers(board))
    values = board.cells.pivot(index="submission", columns="workload", values=column)
    show = text.KINDS[BY_NAME[column].kind]
    for name in board.ranking.index:
        table.rows.append([str(name), *(show(float(values.loc[name, w])) for w in board.rules.base)])
    return table
