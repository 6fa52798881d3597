"""The report in words: a table per workload, and those behind it."""

from __future__ import annotations

import numpy as np
import pandas as pd

from scoring.frames import records
from scoring.judge import columns
from scoring.judge.frameworks import LABELLED
from scoring.judge.lint import odd_steps
from scoring.judge.report import Report
from scoring.judge.rules import Rules
from scoring.oddities import summary
from scoring.show import text
from scoring.show.text import NOTHING, Table


def heading(workload: str, rules: Rules) -> str:
    """What is asked for on a workload and under which rules, as the caption of each of its tables."""
    target = rules.targets[workload]
    direction = "at least" if target.higher_is_better else "at most"
    budget = rules.budget(workload)
    limit = f"budget {text.seconds(budget)}" if np.isfinite(budget) else "no budget"
    return f"{workload}: {target.column} {direction} {target.value:g}; {rules.title}, {limit}"


def tables(report: Report) -> list[Table]:
    """One table per workload: who reached the target, after how many steps and seconds."""
    return [costs_table(report, str(name)) for name in sorted(report.summary["workload"].unique())]


def costs_table(report: Report, workload: str) -> Table:
    """Steps and time to the target on one workload, with ratios to the reference."""
    part = report.summary[report.summary["workload"] == workload]
    main = [column for column in columns.placed("main") if part[column.name].notna().any()]
    metric = report.rules.targets[workload].metric
    headers = ["algorithm", "reached"]
    for column in columns.placed("costs"):
        headers += [column.heading, "ratio"]
    headers += [column.heading.format(metric=metric) for column in main]
    table = Table(heading(workload, report.rules), headers, left=(0,))
    odd = odd_steps(report.oddities)
    # Of several frameworks one may not have been run on this workload at all.
    idle = {*report.references.values()} & {*part.loc[part["studies"] == 0, "algorithm"]}
    absent: list[str] = []
    for _, row in part.iterrows():
        name = row["algorithm"]
        if name == report.reference_of(name):
            name += " (reference)"
        if not row["studies"] and report.reference_of(row["algorithm"]) in idle:
            absent.append(row["algorithm"])
            continue
        if not row["studies"]:
            gaps = ["no data", NOTHING] * len(columns.placed("costs")) + [NOTHING] * len(main)
            table.rows.append([name, "0 of 0", *gaps])
            continue
        cells = [name, f"{row['hits']} of {max(row['studies'], report.rules.studies)}"]
        for column in columns.placed("costs"):
            if np.isfinite(row[column.name]):
                low, high = row[f"{column.name}_low"], row[f"{column.name}_high"]
                mark = " ‡" if column.kind == "steps" and (row["algorithm"], workload) in odd else ""
                cells.append(text.spread(row[column.name], low, high, text.KINDS[column.kind]) + mark)
            else:
                cells.append(_miss(row, report, workload, column))
            cells.append(_ratio(row, column.name))
        table.rows.append(cells + [text.shown(column, row[column.name]) for column in main])
    references = " and ".join(sorted(set(report.references.values()) - {""})) or report.reference or "no reference"
    each = ", each for its framework" if report.references else ""
    table.note = (
        f"Medians over studies (least to most). Ratios are to {references}{each}; below 1 is better. "
        "The metric is the median best value."
    )
    if absent:
        table.note += f" Not run here: {', '.join(absent)}."
    if any(name == workload for _, name in odd):
        table.note += " ‡ Its steps are not of the usual size (see the oddities): steps do not compare."
    if report.rules.studies:
        table.note += f" {report.rules.studies} studies are due: one that is missing counts as a miss"
        fewer = part["studies"].max() < report.rules.studies
        table.note += f" (--studies={part['studies'].max()} judges by those there are)." if fewer else "."
    return table


def details_table(report: Report, workload: str) -> Table:
    """Evaluation periods, shares of the budget, and the metric on each split at the target."""
    part = report.summary[(report.summary["workload"] == workload) & (report.summary["studies"] > 0)]
    shown = [column for column in columns.placed("details") if part[column.name].notna().any()]
    metric = report.rules.targets[workload].metric
    headers = ["algorithm", *(column.heading.format(metric=metric) for column in shown)]
    table = Table(f"{heading(workload, report.rules)}; clocks, and the metrics at the target", headers)
    table.rows = [
        [row["algorithm"], *(text.shown(column, row[column.name]) for column in shown)]
        for _, row in part.iterrows()
    ]
    table.note = (
        "Medians over studies. A time to target is known no better than the evaluation period: a gain below "
        "that is invisible."
    )
    return table


def _miss(row: pd.Series, report: Report, workload: str, column: columns.Column) -> str:
    """Why the median study did not reach the target."""
    missing = report.rules.studies - int(row["studies"])
    if row["hits"] and missing > 0:
        low = text.KINDS[column.kind](row[f"{column.name}_low"])
        return f"{low} in {_studies(row['hits'])}; {_studies(missing)} missing"
    mine = report.studies[
        (report.studies["submission"] == row["algorithm"]) & (report.studies["workload"] == workload)
    ]
    best = text.number(row["best"])
    if row["state"] == "unfinished":
        return f"unfinished (best {best} at step {text.steps(float(mine['last_step'].median()))})"
    if row["state"] == "over budget":
        return f"over budget (best {best})"
    if row["state"] == "no data":
        return "no data"
    return f"not reached (best {best})"


def _studies(count: int) -> str:
    return f"{count} {'study' if count == 1 else 'studies'}"


def _ratio(row: pd.Series, measure: str) -> str:
    ratio = row[f"{measure}_ratio"]
    if np.isnan(ratio):
        return NOTHING
    low, high = row[f"{measure}_ratio_ci_low"], row[f"{measure}_ratio_ci_high"]
    if not np.isfinite(ratio):
        return "miss"
    if np.isnan(low) or low == high:
        return text.ratio(ratio)
    return f"{text.ratio(ratio)} [{text.ratio(low)}, {text.ratio(high)}]"


def interval_table(report: Report) -> Table:
    """How far the medians and ratios would move with other studies."""
    headers = ["workload", "algorithm", "steps", "ratio of steps", "time", "ratio of time"]
    table = Table(f"95 % bootstrap intervals over studies; {report.rules.title}", headers, left=(0, 1), sticky=2)
    for _, row in report.summary[report.summary["studies"] > 0].iterrows():
        cells = [row["workload"], row["algorithm"]]
        for column in columns.placed("costs"):
            write_cost = text.KINDS[column.kind]
            for name, write in ((column.name, write_cost), (f"{column.name}_ratio", text.ratio)):
                cells.append(text.between(row[f"{name}_ci_low"], row[f"{name}_ci_high"], write))
        table.rows.append(cells)
    table.note = (
        "Studies are drawn with replacement, 2,000 times. Of three studies a drawn median is the middle one with "
        "probability 13/27 and each end with 7/27: an interval then spans them all. A single study gives no "
        "interval, and a ratio has none if neither algorithm reached the target in some replicate."
    )
    return table


def study_table(report: Report) -> Table:
    """Every study with its best trial, hits and misses alike."""
    headers = [
        "workload",
        "algorithm",
        "study",
        "trial",
        "outcome",
        "steps",
        "time",
        "best",
        "last step",
        "ms/step",
    ]
    table = Table(f"Studies, each with its best trial; {report.rules.title}", headers, left=(0, 1, 2, 4), sticky=2)
    rows = report.studies.sort_values(["workload", "submission", "study"])
    named = [columns.BY_NAME[name] for name in ("state", "steps", "time", "best", "last_step", "ms_per_step")]
    for _, row in rows.iterrows():
        cells = [row["workload"], row["submission"], row["study"], f"{row['trial']} of {row['trials']}"]
        table.rows.append(cells + [text.shown(column, row[column.name]) for column in named])
    return table


def framework_table(report: Report) -> Table | None:
    """PyTorch and JAX side by side for what was run in both, None if nothing was."""
    headers = ["workload", "algorithm", "steps, PyTorch", "steps, JAX", "JAX / PyTorch"]
    headers += ["best, PyTorch", "best, JAX", "ms/step, PyTorch", "ms/step, JAX"]
    table = Table(f"PyTorch and JAX; {report.rules.title}", headers, left=(0, 1), sticky=2)
    rows = {(row["workload"], row["algorithm"]): row for _, row in report.summary.iterrows() if row["studies"]}
    for (workload, name), torch in rows.items():
        match = LABELLED.fullmatch(name)
        jax = rows.get((workload, f"{match['submission']} (jax)")) if match else None
        if match is None or match["framework"] != "pytorch" or jax is None:
            continue
        pair = (torch, jax)
        steps = [text.steps(row["steps"]) if np.isfinite(row["steps"]) else "miss" for row in pair]
        quotient = jax["steps"] / torch["steps"] if "miss" not in steps else np.nan
        cells = [workload, match["submission"], *steps, text.ratio(quotient)]
        cells += [text.number(row["best"]) for row in pair]
        table.rows.append([*cells, *(text.milliseconds(row["ms_per_step"]) for row in pair)])
    table.note = "Medians over studies. In JAX the time to target and the time of a step hold the compilation."
    return table if table.rows else None


def oddity_table(found: pd.DataFrame) -> Table:
    """The findings by kind."""
    short = summary(found)
    table = Table("Oddities in the logs", ["level", "what", "places", "rows", "example"], left=(0, 1, 4))
    table.rows = [[row.level, row.what, str(row.places), str(row.rows), row.example] for row in records(short)]
    table.note = "The whole list is in oddities.csv." if len(short) else "Nothing odd was found."
    return table


def columns_table() -> Table:
    """Documentation of the columns that trials, cells and CSV files share."""
    table = Table("Columns", ["column", "heading", "meaning"], left=(0, 1, 2))
    table.rows = [[column.name, column.heading, column.meaning] for column in columns.COLUMNS]
    return table
