"""What the commands write: pages, figures, and every table behind them as CSV, JSON and LaTeX."""

from __future__ import annotations

import hashlib
import json
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd

from scoring.judge.leaderboard import Leaderboard
from scoring.judge.report import Report
from scoring.judge.rules import Rules
from scoring.pages import html, latex, leaderboard_page, markdown, report_page
from scoring.pages.write import csv, remove, write
from scoring.read.logs import Logs
from scoring.show import leaderboard_tables, svg


def write_report(report: Report, logs: Logs, path: Path) -> None:
    """report.html, .md and .json, curves.png, curves.svg, and the tables behind them as CSV."""
    from scoring.show import png

    page = report_page.build(report, logs)
    look = report_page.look_of(report)
    rows = []
    for workload in sorted(report.summary["workload"].unique()):
        panels = report_page.panels(report, logs, str(workload), look)
        rows += [[*panels["step"][:1], *panels["time"][:1]]] if len(panels.get("step", [])) == 1 else []
    # With too many algorithms for one panel the file would not be legible, so there is none.
    if rows:
        page.pictures["curves.png"] = "Learning curves"
        write(path / "curves.png", png.draw(rows))
        write(path / "curves.svg", svg.alone(rows))
    else:
        remove(path, ("curves.png", "curves.svg"))
    write(path / "report.html", html.render(page))
    write(path / "report.md", markdown.render(page))
    write(path / "report.json", _json(_head(report.rules, report.inputs, report.oddities) | _results(report)))
    write(path / "table.csv", csv(report.summary))
    write(path / "studies.csv", csv(report.studies))
    write(path / "trials.csv", csv(report.trials))
    write(path / "evaluations.csv", csv(logs.evals.drop(columns="trial_id")))
    write(path / "oddities.csv", csv(report.oddities))


def _results(report: Report) -> dict[str, object]:
    return {"reference": report.reference or dict(report.references) or None, "table": _records(report.summary)}


def write_leaderboard(board: Leaderboard, logs: Logs, path: Path) -> None:
    """leaderboard.html, .md, .json and .tex, and ranking, cells, costs, profiles, speedups, ... as CSV."""
    page = leaderboard_page.build(board, logs)
    raw = leaderboard_page.raw(board)
    tables = [leaderboard_tables.ranking_table(board), leaderboard_tables.ratio_table(board)]
    write(path / "leaderboard.html", html.render(page))
    write(path / "leaderboard.md", markdown.render(page))
    write(path / "leaderboard.json", as_json(board))
    write(path / "leaderboard.tex", "\n".join(map(latex.render, tables)))
    write(path / "ranking.csv", csv(leaderboard_page.ranking_frame(board)))
    write(path / "cells.csv", csv(board.cells.drop(columns="values")))
    write(path / "costs.csv", csv(_matrix(board)))
    write(path / "profiles.csv", csv(_profiles(board)))
    write(path / "speedups.csv", csv(_speedups(board)))
    write(path / "table.csv", csv(raw.summary))
    write(path / "studies.csv", csv(board.studies))
    write(path / "trials.csv", csv(board.trials))
    write(path / "oddities.csv", csv(board.oddities))
    if board.sweep is not None:
        write(path / "sweep.csv", csv(_sweep(board)))
        write(path / "newly_reached.csv", csv(board.sweep.reached))
    else:
        remove(path, ("sweep.csv", "newly_reached.csv"))


def _matrix(board: Leaderboard) -> pd.DataFrame:
    """Submissions by workloads: the median cost, infinite for a miss."""
    costs = board.cells.pivot(index="submission", columns="workload", values="cost")
    return costs.loc[list(board.ranking.index), list(board.rules.base)].reset_index()


def _profiles(board: Leaderboard) -> pd.DataFrame:
    rows = [
        (name, float(tau), float(share))
        for name in board.ranking.index
        for tau, share in zip(*board.profiles[str(name)], strict=True)
    ]
    return pd.DataFrame(rows, columns=["submission", "tau", "share"])


def _speedups(board: Leaderboard) -> pd.DataFrame:
    """One row per submission and workload: the speedup over the reference, empty for a miss."""
    rows = [
        (name, workload, float(value), workload in board.reference_missed)
        for name, row in board.speedups.iterrows()
        for workload, value in row.items()
    ]
    return pd.DataFrame(rows, columns=["submission", "workload", "speedup", "reference_missed"])


def _sweep(board: Leaderboard) -> pd.DataFrame:
    if board.sweep is None:
        return pd.DataFrame()
    scores, ranks = board.sweep.scores, board.sweep.ranks
    rows = [
        (name, float(share), float(scores.loc[name, share]), int(ranks.loc[name, share]))
        for name in scores.index
        for share in scores.columns
    ]
    return pd.DataFrame(rows, columns=["submission", "share", "score", "rank"])


def as_json(board: Leaderboard) -> str:
    """Ranking and cells for machines, with what they rest on. JSON has no infinity: a miss is null."""
    data = _head(board.rules, board.inputs, board.oddities) | {
        "procedure": "official" if board.official else "exact",
        "cost": board.cost,
        "reference": board.reference or None,
        "reference_missed": list(board.reference_missed),
        "relative_to": board.reference if board.relative else "group",
        "published": sorted(board.published),
        "ranking": _records(leaderboard_page.ranking_frame(board)),
        "cells": _records(board.cells.drop(columns="values")),
    }
    return _json(data)


def _head(rules: Rules, inputs: tuple[str, ...], oddities: pd.DataFrame) -> dict[str, object]:
    targets = {
        name: {
            "metric": target.metric,
            "direction": "maximize" if target.higher_is_better else "minimize",
            "target": target.value,
            "budget_sec": _finite(rules.budget(name)),
            "step_hint": _finite(target.step_hint),
            "relaxed_by": rules.relaxations.get(name, 0.0),
        }
        for name, target in rules.targets.items()
    }
    return {
        "benchmark": rules.version,
        "ruleset": rules.ruleset,
        "assumed": list(rules.assumed),
        "budget_factor": rules.budget_factor,
        "studies": rules.studies or None,
        "trials": rules.trials or None,
        "workloads": list(rules.base),
        "held_out": dict(rules.held_out),
        "targets": targets,
        "inputs": list(inputs),
        "code": code_version(),
        "oddities": {level: int((oddities["level"] == level).sum()) for level in ("error", "warning", "note")},
    }


def code_version() -> str:
    """The version of the package, and a hash of the code that scores: the same hash, the same results."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parents[1].rglob("*")):
        if source.suffix in (".py", ".json"):
            digest.update(source.read_bytes())
    try:
        version = metadata.version("algoperf-kfac")
    except metadata.PackageNotFoundError:
        version = "unknown"
    return f"{version}+{digest.hexdigest()[:12]}"


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _records(table: pd.DataFrame) -> object:
    return json.loads(table.to_json(orient="records", double_precision=15))


def _json(data: object) -> str:
    return json.dumps(data, indent=1) + "\n"
