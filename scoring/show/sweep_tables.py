"""Tables of relaxed targets: scores and ranks, and what is reached under them only."""

from __future__ import annotations

import pandas as pd

from scoring.judge.leaderboard import Leaderboard
from scoring.show.text import Table

# The relaxations, in per cent, that a table has room for.
SHOWN = (0, 1, 2, 3, 5, 7, 10, 15, 20)


def sweep_table(board: Leaderboard) -> Table | None:
    """Score and rank under relaxed targets, None if they were not asked for."""
    if board.sweep is None:
        return None
    scores, ranks = board.sweep.scores, board.sweep.ranks
    shares = [share for share in scores.columns if round(100 * float(share)) in SHOWN]
    shares = shares if len(shares) > 1 else list(scores.columns)
    headers = ["submission", *(_share(share) for share in shares)]
    caption = f"Score (and rank) if every target is relaxed by a share of its value; {board.rules.title}"
    table = Table(caption, headers)
    for name in scores.index:
        cells = [f"{scores.loc[name, share]:.4f} ({ranks.loc[name, share]})" for share in shares]
        table.rows.append([str(name), *cells])
    leaders = [f"{', '.join(map(str, names))} at {span}" for names, span in _leaders(ranks)]
    table.note = f"First: {'; '.join(leaders)}. sweep.csv has every share."
    return table


def _share(value: object) -> str:
    return f"{100 * float(str(value)):g} %"


def _leaders(ranks: pd.DataFrame) -> list[tuple[list[str], str]]:
    """Who comes first over which shares, in order."""
    runs: list[tuple[list[str], list[str]]] = []
    for share in ranks.columns:
        first = [str(name) for name in ranks.index[ranks[share] == 1]]
        if not runs or runs[-1][0] != first:
            runs.append((first, []))
        runs[-1][1].append(_share(share))
    return [(names, span[0] if len(span) == 1 else f"{span[0]} to {span[-1]}") for names, span in runs]


def newly_reached_table(board: Leaderboard) -> Table | None:
    """The workloads that are reached under relaxed targets only, by the least relaxation that does it."""
    if board.sweep is None:
        return None
    caption = f"Workloads reached under relaxed targets only; {board.rules.title}"
    table = Table(caption, ["workload", "relaxed by", "submissions"], left=(0, 2))
    for (workload, share), part in board.sweep.reached.groupby(["workload", "share"], sort=True):
        table.rows.append([str(workload), _share(share), ", ".join(map(str, part["submission"]))])
    table.note = "Each submission at the least share of the sweep at which its median study reaches the target."
    return table
