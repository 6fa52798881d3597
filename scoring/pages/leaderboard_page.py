"""The page of a leaderboard: built once, written as HTML and Markdown."""

from __future__ import annotations

import pandas as pd

from scoring.judge import report
from scoring.judge.frameworks import algorithm
from scoring.judge.leaderboard import Leaderboard
from scoring.judge.selection import BASELINES
from scoring.pages import report_page
from scoring.pages.page import Figure, Page, Section
from scoring.read.logs import Logs
from scoring.show import leaderboard_tables, profiles, report_tables, sweep_tables, text
from scoring.show.palette import Style, styles
from scoring.show.text import Table


def build(board: Leaderboard, logs: Logs) -> Page:
    """Ranking, profiles, submissions by workload, reasons, and every workload's curves and tables."""
    look = _look(board)
    many = len(board.ranking) > profiles.FEW
    one_each = " One submission in colour over all others in grey." if many else ""
    ranking = leaderboard_tables.ranking_table(board)
    caption = "Scores; the bar is the 95 % interval over studies."
    sections = [
        Section("Ranking", [], [Figure(caption, [profiles.scores(board)])], [ranking]),
        Section(
            "Performance profiles",
            [],
            [
                Figure(
                    "Share of workloads reached within tau times the best." + one_each,
                    profiles.profiles(board, look),
                )
            ],
            [leaderboard_tables.profile_table(board)],
        ),
        Section(
            "Submissions by workload",
            tables=[leaderboard_tables.ratio_table(board), leaderboard_tables.cost_table(board)],
        ),
    ]
    gains = leaderboard_tables.speedup_table(board)
    if gains is not None:
        sections.append(Section("Speedup by workload", tables=[gains]))
    misses: list[Table] = [leaderboard_tables.misses_table(board), leaderboard_tables.distance_table(board)]
    sections.append(Section("Misses", tables=misses))
    sections += _relaxed(board, look, one_each)
    sections += _workloads(board, logs, look)
    sections.append(Section("Oddities", tables=[report_tables.oddity_table(board.oddities)]))
    title = f"Leaderboard, {board.rules.title.split(',')[0]}"
    lead = [
        *map(text.sentence, board.rules.assumed),
        f"{ranking.caption}. {len(board.ranking)} submissions on {len(board.rules.base)} workloads.",
    ]
    return Page(title, leaderboard_tables.verdict(board), lead, sections)


def _look(board: Leaderboard) -> dict[str, Style]:
    names = [str(name) for name in board.ranking.index]
    there = {algorithm(name) for name in names}
    # A baseline that was run in two frameworks is no reference of speedups, but looks like one in both.
    reference = board.reference or next((name for name in BASELINES if name in there), "")
    return styles(names, reference, dict(zip(names, board.ranking["framework"], strict=True)))


def _relaxed(board: Leaderboard, look: dict[str, Style], one_each: str) -> list[Section]:
    tables = [sweep_tables.sweep_table(board), sweep_tables.newly_reached_table(board)]
    if board.sweep is None:
        return []
    figure = Figure(
        "Score if every target is relaxed by a share of its value." + one_each, profiles.relaxed(board, look)
    )
    return [Section("Relaxed targets", [], [figure], [table for table in tables if table is not None])]


def raw(board: Leaderboard) -> report.Report:
    """The report on the same trials: steps, time and best metric per workload and submission, without profiles."""
    return report.of_trials(board.trials, board.studies, board.rules, board.reference, board.oddities)


def _workloads(board: Leaderboard, logs: Logs, look: dict[str, Style]) -> list[Section]:
    found = []
    under = raw(board)
    said = ["Steps, time and ratios by the exact rules."] if board.official else []
    for workload in board.rules.base:
        if workload not in set(under.summary["workload"]):
            continue
        rows = report_page.panels(under, logs, workload, look)
        tables = [report_tables.costs_table(under, workload), report_tables.details_table(under, workload)]
        found.append(Section(workload, said, report_page.curve_figures(workload, rows), tables))
    return found


def ranking_frame(board: Leaderboard) -> pd.DataFrame:
    """The ranking with the submission as a column, for files."""
    return board.ranking.rename_axis("submission").reset_index()
