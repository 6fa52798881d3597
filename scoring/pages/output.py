"""What the commands write: tables as Markdown and CSV, pages with figures. The same logs give the same bytes."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pandas as pd

from scoring.errors import InputError
from scoring.judge import leaderboard as leaderboard_module
from scoring.judge import report as report_module
from scoring.judge.leaderboard import Leaderboard
from scoring.judge.report import Report
from scoring.read.logs import Logs
from scoring.show import text


def folder(path: str) -> Path:
    """The folder to write to, made if need be.

    Raises:
      InputError: it cannot be made or written to.
    """
    try:
        found = Path(path)
        found.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=found):
            return found
    except OSError as error:
        raise InputError(f"--output_dir={path}: {error.strerror}") from None


def write(path: Path, content: str | bytes) -> None:
    """Write a file in one piece: a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path}: {error.strerror}") from None


def csv(table: pd.DataFrame) -> str:
    """A table as CSV; infinity stands for a miss, an empty field for nothing."""
    return str(table.to_csv(index=False, lineterminator="\n"))


def write_report(result: Report, logs: Logs, path: Path) -> None:
    """report.md, report.html, curves.png, curves.svg, and the tables behind them as CSV."""
    from scoring.pages import html
    from scoring.show import figures

    names = sorted(result.summary["algorithm"].unique())
    look = figures.styles(names, result.reference)
    order = sorted(names, key=lambda one: (result.reference_of(one), one != result.reference_of(one), one))
    look = {name: look[name] for name in order}
    panels = []
    for workload in sorted(result.summary["workload"].unique()):
        target = result.rules.targets[workload]
        chosen = result.studies[result.studies["workload"] == workload]
        panels.append((workload, target, figures.curves_of(logs.evals, chosen, target)))
    found = report_module.tables(result)
    lead = [lead_text(result)]
    sections = []
    for k, (table, panel) in enumerate(zip(found, panels, strict=True)):
        drawn = figures.svg(figures.learning_curves([panel], look), f"f{k}")
        caption = f"Learning curves on {panel[0]}: studies (thin), their median (thick), the target (dotted)."
        sections.append(html.Section(panel[0], [], [(drawn, caption)], [table]))
    both = report_module.framework_table(result)
    if both is not None:
        sections.append(html.Section("PyTorch and JAX", [], [], [both]))
    sections.append(html.Section("Intervals", [], [], [report_module.interval_table(result)]))
    sections.append(html.Section("Every study", [], [], [report_module.study_table(result)]))
    sections.append(html.Section("Oddities", [], [], [report_module.oddity_table(result.oddities)]))
    whole = figures.learning_curves(panels, look)
    title = "Steps and time to target"
    parts = [f"# {title}", "", lead[0], "", "![Learning curves](curves.png)", ""]
    rest = [report_module.interval_table(result), report_module.study_table(result)]
    rest = rest if both is None else [both, *rest]
    for table in [*found, *rest, report_module.oddity_table(result.oddities)]:
        parts += [text.markdown(table), ""]
    write(path / "report.html", html.page(title, lead, sections))
    write(path / "curves.png", figures.png(whole))
    write(path / "curves.svg", figures.svg(whole, "curves", theme=False))
    write(path / "report.md", "\n".join(parts))
    write(path / "table.csv", csv(result.summary))
    write(path / "trials.csv", csv(result.trials))
    write(path / "evaluations.csv", csv(logs.evals.drop(columns="trial_id")))
    write(path / "oddities.csv", csv(result.oddities))


def lead_text(result: Report) -> str:
    """One sentence on what was compared."""
    studies = result.studies.groupby(["workload", "submission"])["study"].nunique()
    span = f"{studies.min()}" if studies.min() == studies.max() else f"{studies.min()} to {studies.max()}"
    span += " study" if span == "1" else " studies"
    references = sorted(set(result.references.values()) - {""}) or [result.reference]
    against = f", against {' and '.join(references)}" if references[0] else ""
    names = sorted(set(result.studies["submission"]))
    workloads = ", ".join(sorted(set(result.studies["workload"])))
    return (
        f"{', '.join(names)} on {workloads}, {span} each{against}. "
        "A miss counts as infinite in every median. Brackets hold 95 % bootstrap intervals over studies."
    )


def write_leaderboard(board: Leaderboard, logs: Logs, path: Path) -> None:
    """leaderboard.html, .md, .json, and ranking, cells, per-workload table, trials and oddities as CSV."""
    from scoring.pages import html
    from scoring.show import figures

    names = list(board.ranking.index)
    look = figures.styles(names, board.reference)
    look = {name: look[name] for name in names}
    ranking = leaderboard_module.ranking_table(board)
    costs, misses = leaderboard_module.cost_table(board), leaderboard_module.misses_table(board)
    raw = leaderboard_module.raw(board)
    tables = report_module.tables(raw)
    odd = report_module.oddity_table(board.oddities)
    drawn = figures.svg(figures.profile_figure(board.profiles, look), "profiles")
    profile = (
        drawn,
        "The share of workloads on which the target is reached within tau times the best.",
    )
    drawn = figures.svg(figures.heat_map(*leaderboard_module.heat_texts(board)), "heat")
    heat = (drawn, "Cost as a multiple of the best; words where there is no credit.")
    sections = [
        html.Section("Ranking", [], [], [ranking]),
        html.Section("Performance profiles", [], [profile], []),
        html.Section("Submissions by workload", [], [heat], [costs]),
    ]
    gains = leaderboard_module.speedup_table(board)
    if len(gains) > 1:
        drawn = figures.svg(figures.bars(gains, look, board.reference), "bars")
        sections.append(
            html.Section("Speedup by workload", [], [(drawn, f"Speedup over {board.reference} by workload.")], [])
        )
    sections.append(html.Section("Misses", [], [], [misses]))
    for k, table in enumerate(tables):
        workload = table.caption.split(":")[0]
        target = board.rules.targets[workload]
        chosen = board.studies[board.studies["workload"] == workload]
        curves = figures.curves_of(logs.evals, chosen, target)
        drawn = figures.svg(figures.learning_curves([(workload, target, curves)], look), f"f{k}")
        caption = f"Learning curves on {workload}: the best trial of each study (thin) and their median (thick)."
        sections.append(html.Section(workload, [], [(drawn, caption)], [table]))
    sections.append(html.Section("Oddities", [], [], [odd]))
    title = f"Leaderboard, AlgoPerf {board.rules.version}"
    lead = [f"{ranking.caption}. {len(names)} submissions, {len(board.rules.base)} workloads."]
    parts = [f"# {title}", "", *lead, ""]
    for table in [ranking, costs, misses, *tables, odd]:
        parts += [text.markdown(table), ""]
    write(path / "leaderboard.html", html.page(title, lead, sections))
    write(path / "leaderboard.md", "\n".join(parts))
    write(path / "leaderboard.json", as_json(board))
    write(path / "ranking.csv", csv(board.ranking.rename_axis("submission").reset_index()))
    write(path / "cells.csv", csv(board.cells.drop(columns="values", errors="ignore")))
    write(path / "table.csv", csv(raw.summary))
    write(path / "trials.csv", csv(board.trials))
    write(path / "oddities.csv", csv(board.oddities))


def as_json(board: Leaderboard) -> str:
    """Ranking and cells for machines. JSON has no infinity: a miss is null."""
    ranking = board.ranking.rename_axis("submission").reset_index()
    cells = board.cells.drop(columns="values", errors="ignore")
    data = {
        "benchmark": board.rules.version,
        "ruleset": board.rules.ruleset,
        "procedure": "official" if board.official else "exact",
        "cost": board.cost,
        "reference": board.reference or None,
        "relative_to": board.reference if board.relative else "group",
        "workloads": list(board.rules.base),
        "ranking": json.loads(ranking.to_json(orient="records", double_precision=15)),
        "cells": json.loads(cells.to_json(orient="records", double_precision=15)),
        "oddities": {
            level: int((board.oddities["level"] == level).sum()) for level in ("error", "warning", "note")
        },
    }
    return json.dumps(data, indent=1) + "\n"
