"""The page of a report: built once, written as HTML and Markdown."""

from __future__ import annotations

import numpy as np

from scoring.judge.frameworks import algorithm
from scoring.judge.lint import odd_steps
from scoring.judge.report import Report
from scoring.pages.page import Figure, Page, Section
from scoring.read.logs import Logs
from scoring.show import curves, report_tables, text
from scoring.show.palette import Style, styles
from scoring.show.panel import Panel


def build(report: Report, logs: Logs) -> Page:
    """Learning curves and tables of every workload, and what lies behind them."""
    look = look_of(report)
    sections = []
    for workload in sorted(report.summary["workload"].unique()):
        rows = panels(report, logs, str(workload), look)
        details = report_tables.details_table(report, str(workload))
        tables = [report_tables.costs_table(report, str(workload)), details]
        sections.append(Section(str(workload), [], curve_figures(str(workload), rows), tables))
    both = report_tables.framework_table(report)
    if both is not None:
        sections.append(Section("PyTorch and JAX", tables=[both]))
    sections.append(Section("Intervals", tables=[report_tables.interval_table(report)]))
    sections.append(Section("Every study", tables=[report_tables.study_table(report)]))
    sections.append(Section("Oddities", tables=[report_tables.oddity_table(report.oddities)]))
    return Page(
        "Steps and time to target",
        verdict(report),
        [*map(text.sentence, report.rules.assumed), lead(report)],
        sections,
    )


def look_of(report: Report) -> dict[str, Style]:
    """The style of every algorithm, references first."""
    names = sorted(report.summary["algorithm"].unique())
    known = report.summary[report.summary["framework"] != ""]
    frameworks = dict(zip(known["algorithm"], known["framework"], strict=True))
    references = sorted(set(report.references.values()) - {""}) or [report.reference]
    found = styles(names, references[0], frameworks)
    order = sorted(names, key=lambda one: (report.reference_of(one), one != report.reference_of(one), one))
    return {name: found[name] for name in order}


def panels(report: Report, logs: Logs, workload: str, look: dict[str, Style]) -> dict[str, list[Panel]]:
    """The learning curves of one workload against steps and time."""
    target = report.rules.targets[workload]
    chosen = report.studies[report.studies["workload"] == workload]
    found = curves.curves_of(logs.evals, chosen, target)
    return {axis: curves.panels(workload, target, found, look, axis) for axis in curves.AXES} if found else {}


def curve_figures(workload: str, rows: dict[str, list[Panel]]) -> list[Figure]:
    """Few algorithms share two panels side by side; many have one panel each, those against steps folded away."""
    if not rows:
        return []
    how = "studies thin, their median thick, a dot where a study reaches the target; a study that has ended keeps "
    how += "its value in the median"
    if len(rows["step"]) == 1:
        return [Figure(f"Learning curves on {workload}: {how}.", [*rows["step"], *rows["time"]])]
    how = f"one submission in colour over all others in grey, {how}"
    return [
        Figure(f"Learning curves on {workload} against time in seconds: {how}.", rows["time"]),
        Figure(f"Learning curves on {workload} against steps.", rows["step"], folded=True),
    ]


def verdict(report: Report) -> str:
    """One sentence: who needed least, by how much, and how sure that is."""
    parts = [_winner(report, str(name)) for name in sorted(report.summary["workload"].unique())]
    said = [part for part in parts if part]
    if not said:
        return "No algorithm reached a target in its median study."
    more = f"; {len(parts) - len(said)} workloads were reached by nobody" if len(said) < len(parts) else ""
    return (
        f"Fewest steps to target: {'; '.join(said[:4])}{f'; {len(said) - 4} more' if len(said) > 4 else ''}{more}."
    )


def _winner(report: Report, workload: str) -> str:
    part = report.summary[(report.summary["workload"] == workload) & np.isfinite(report.summary["steps"])]
    # A step that is a loop of updates wins nothing.
    odd = {name for name, where in odd_steps(report.oddities) if where == workload}
    part = part[~part["algorithm"].isin(odd)]
    if part.empty:
        return ""
    best = part.sort_values(["steps", "time"], kind="stable").iloc[0]
    ties = int((part["steps"] == best["steps"]).sum()) - 1
    ahead = f", by time ahead of {ties} with as many" if ties else ""
    name = f"{best['algorithm']} on {workload} ({text.steps(best['steps'])}{ahead}"
    reference = report.reference_of(best["algorithm"])
    ratio = best["steps_ratio"]
    if not reference or reference == best["algorithm"] or np.isnan(ratio):
        return name + ")"
    low, high = best["steps_ratio_ci_low"], best["steps_ratio_ci_high"]
    sure = "one study" if best["studies"] == 1 else f"95 % interval {text.between(low, high)}"
    return f"{name}, {text.ratio(ratio)} of {algorithm(reference)}'s, {sure})"


def lead(report: Report) -> str:
    """What was compared, under which rules."""
    studies = report.studies.groupby(["workload", "submission"])["study"].nunique()
    span = f"{studies.min()}" if studies.min() == studies.max() else f"{studies.min()} to {studies.max()}"
    span += " study" if span == "1" else " studies"
    references = sorted(set(report.references.values()) - {""}) or [report.reference]
    against = f", against {' and '.join(references)}" if references[0] else ""
    names = sorted(set(report.studies["submission"]))
    workloads = ", ".join(sorted(set(report.studies["workload"])))
    title = report.rules.title
    return (
        f"{text.sentence(title)}. {', '.join(names)} on {workloads}, {span} each{against}. "
        "A miss counts as infinite in every median. Brackets hold 95 % bootstrap intervals over studies."
    )
