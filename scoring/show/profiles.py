"""Figures of a leaderboard: scores with intervals, performance profiles, scores under relaxed targets."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from scoring.judge.leaderboard import Leaderboard
from scoring.show.curves import FEW
from scoring.show.palette import Style
from scoring.show.panel import Label, Line, Panel

ROW = 34.0  # pixels for one submission in the figure of scores


def scores(board: Leaderboard) -> Panel:
    """One line per submission, best on top: its score as a dot, the interval over studies as a bar."""
    ranking = board.ranking
    count = len(ranking)
    highest = max(1.0, float(ranking["score"].max()), float(ranking.get("score_high", ranking["score"]).max()))
    lines, dots, notes = [], [], []
    for k, (name, row) in enumerate(ranking.iterrows()):
        y = count - k - 0.78
        if "score_low" in ranking and np.isfinite(row["score_low"]):
            ends = np.array([row["score_low"], row["score_high"]])
            lines.append(Line(ends, np.array([y, y]), "c0", width=3.0, opacity=0.5, name=str(name)))
        dots.append(Label(float(row["score"]), y, f"{name}: {row['score']:.4f}", "c0"))
        notes.append(Label(0.0, y + 0.38, f"{name}  {row['score']:.4f}"))
    said = "; ".join(f"{name} {row['score']:.4f}" for name, row in ranking.iterrows())
    return Panel(
        "Score" + (" with 95 % interval over studies" if lines else ""),
        (0.0, 1.03 * highest),
        (0.0, float(count)),
        lines=lines,
        dots=dots,
        notes=notes,
        description=said,
        y_ticks=(),
        tall=ROW * count,
    )


def profiles(board: Leaderboard, look: Mapping[str, Style]) -> list[Panel]:
    """The share of workloads reached within tau times the best."""
    curves = {str(name): board.profiles[str(name)] for name in board.ranking.index}
    start = min(float(tau[0]) for tau, _ in curves.values())
    said = {name: f"{share[0]:.0%} at {tau[0]:.2g}, {share[-1]:.0%} at 4" for name, (tau, share) in curves.items()}
    unit = "the reference's cost" if board.relative else "the best cost"
    return _multiples(
        "Share of workloads reached within tau times " + unit,
        {name: Line(tau, share, "ink", steps=True, name=name) for name, (tau, share) in curves.items()},
        said,
        look,
        ((start - 0.03, 4.0), (-0.02, 1.03)),
        "tau",
    )


def relaxed(board: Leaderboard, look: Mapping[str, Style]) -> list[Panel]:
    """The score under relaxed targets."""
    if board.sweep is None:
        return []
    table = board.sweep.scores
    shares = 100 * np.array(table.columns, dtype=float)
    lines = {
        str(name): Line(shares, table.loc[name].to_numpy(dtype=float), "ink", name=str(name))
        for name in table.index
    }
    said = {
        name: f"score {line.y[0]:.4f} at 0 %, {line.y[-1]:.4f} at {shares[-1]:g} %" for name, line in lines.items()
    }
    high = float(table.to_numpy().max())
    return _multiples(
        "Score if every target is relaxed",
        lines,
        said,
        look,
        ((0.0, float(shares[-1])), (0.0, 1.05 * high)),
        "per cent",
    )


def _multiples(
    title: str,
    lines: Mapping[str, Line],
    said: Mapping[str, str],
    look: Mapping[str, Style],
    ranges: tuple[tuple[float, float], tuple[float, float]],
    x_label: str,
) -> list[Panel]:
    """One panel with names at the lines for a few, for many one each with the others in grey."""
    x_range, y_range = ranges
    if len(lines) <= FEW:
        drawn = [_in(line, look[name].colour, look[name].dash) for name, line in lines.items()]
        labels = [
            Label(float(x_range[1]), float(line.y[-1]), name, look[name].colour, look[name].dash)
            for name, line in lines.items()
        ]
        description = "; ".join(f"{name}: {words}" for name, words in said.items())
        return [Panel(title, x_range, y_range, x_label, lines=drawn, labels=labels, description=description)]
    behind = [_in(line, "grey", "", 1.0, 0.7) for line in lines.values()]
    return [
        Panel(
            name,
            x_range,
            y_range,
            lines=[_in(line, "c0", "", 2.4)],
            background=behind,
            description=f"{title}: {said[name]}",
            small=True,
        )
        for name, line in lines.items()
    ]


def _in(line: Line, colour: str, dash: str, width: float = 2.0, opacity: float = 1.0) -> Line:
    return Line(line.x, line.y, colour, dash, width, opacity, line.steps, line.name)
