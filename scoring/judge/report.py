"""The report on a few runs: steps and time to target per workload and algorithm, against a reference."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from scoring.errors import InputError
from scoring.frames import lookup, records
from scoring.judge import bootstrap, trials
from scoring.judge.targets import Rules, rules_for, with_targets
from scoring.oddities import Oddities, merge, summary
from scoring.read.logs import Logs
from scoring.show import text
from scoring.show.text import Table

MEASURES = ("steps", "time")
# How `labels` names a submission that was run in both frameworks.
LABELLED = re.compile(r"(?P<submission>.+) \((?P<framework>jax|pytorch)\)")


@dataclass(frozen=True)
class Report:
    """Everything the report shows.

    Attributes:
      summary: one row per workload and algorithm, numbers only; a miss is infinite, an undefined ratio missing.
      studies: one row per study: its best trial.
      trials: one row per trial.
      reference: what all ratios are to; empty if there is none, or one for each framework.
      references: algorithm -> its reference, where each framework has its own.
    """

    summary: pd.DataFrame
    studies: pd.DataFrame
    trials: pd.DataFrame
    rules: Rules
    reference: str
    oddities: pd.DataFrame
    references: Mapping[str, str] = field(default_factory=dict)

    def reference_of(self, algorithm: str) -> str:
        """What the ratios of an algorithm are to, empty for none."""
        return self.references.get(algorithm, self.reference)


def build(
    logs: Logs,
    version: str = "auto",
    ruleset: str = "auto",
    reference: str | None = None,
    studies: int = 0,
    goals: dict[str, float] | None = None,
) -> Report:
    """Judge the runs. ``studies`` > 0 makes missing studies misses; ``goals`` sets other targets."""
    odd = Oddities()
    rules = replace(rules_for(logs.trials, version, ruleset, odd), studies=studies, trials=0)
    if goals:
        rules = with_targets(rules, goals)
    logs = replace(logs, trials=logs.trials.assign(submission=labels(logs.trials, odd)))
    reached = trials.reach(logs, rules)
    if reached.empty:
        raise InputError("no trial of a workload with a known target")
    best = trials.studies(reached, rules)
    names = sorted(best["submission"].unique())
    own = _references(best, names, reference)
    chosen = "" if own else _reference(names, reference)
    missing(best, studies, odd)
    table = summarise(reached, rules, chosen, own)
    return Report(table, best, reached, rules, chosen, merge(logs.oddities, odd.table()), own)


def labels(table: pd.DataFrame, odd: Oddities) -> list[str]:
    """The submission of each trial, with its framework where one workload was run in two."""
    alike = table.drop_duplicates(["submission", "workload", "framework"])
    mixed = sorted(set(alike.loc[alike.duplicated(["submission", "workload"]), "submission"]))
    for name in mixed:
        odd.add("note", name, "mixed frameworks", "one workload in both", "shown as two algorithms")
    rows = zip(table["submission"], table["framework"], strict=True)
    return [f"{submission} ({framework})" if submission in mixed else submission for submission, framework in rows]


def _reference(names: list[str], wanted: str | None) -> str:
    if wanted is None:
        like = [name for name in names if "nadamw" in name.lower()]
        return "nadamw" if "nadamw" in names else like[0] if len(like) == 1 else ""
    if wanted and wanted not in names:
        raise InputError(f"--reference={wanted}: no such algorithm; there are {', '.join(names)}")
    return wanted


def _references(best: pd.DataFrame, names: list[str], wanted: str | None) -> dict[str, str]:
    """The reference of each algorithm, in its framework, if the reference was run in two; else nothing.

    An algorithm whose framework has no reference gets none, as one that was run in several.
    """
    base = "nadamw" if wanted is None else wanted
    if not base or base in names or not any(f"{base} ({framework})" in names for framework in ("jax", "pytorch")):
        return {}
    found = {}
    for name, frameworks in best.groupby("submission")["framework"].unique().items():
        label = f"{base} ({frameworks[0]})"
        found[str(name)] = label if len(frameworks) == 1 and label in names else ""
    return found


def missing(best: pd.DataFrame, studies: int, odd: Oddities) -> None:
    """Report studies and workloads that one algorithm lacks and another has."""
    names = best["submission"].unique()
    for workload, part in best.groupby("workload"):
        most = max(studies, int(part.groupby("submission")["study"].nunique().max()))
        for name in names:
            have = int((part["submission"] == name).sum())
            if have == 0:
                odd.add("warning", str(name), "missing workload", str(workload), "shown as no data")
            elif have < most:
                action = "missing ones count as misses" if studies else "the median is over those present"
                odd.add("warning", str(name), "missing study", f"{workload}: {have} of {most}", action, most - have)


def summarise(
    reached: pd.DataFrame, rules: Rules, reference: str = "", references: Mapping[str, str] | None = None
) -> pd.DataFrame:
    """One row per workload and algorithm, every algorithm on every workload, those of one reference together."""
    base = {name: (references or {}).get(name, reference) for name in reached["submission"].unique()}
    parts = {}
    for measure in MEASURES:
        # Each measure has its own best trial of a study: the fewest steps need not be the least time.
        by_study = trials.studies(reached.assign(cost=reached[measure]), rules)
        parts[measure] = trials.cells(by_study, rules).set_index(["workload", "submission"])
    everyone = sorted(reached["submission"].unique())
    batch = reached.groupby(["workload", "submission"])["batch_size"].median()
    rows = []
    for workload in sorted(reached["workload"].unique()):
        for name in sorted(everyone, key=lambda one: (base[one], one != base[one], one)):
            row: dict[str, object] = {"workload": workload, "algorithm": name}
            key = (workload, name)
            if key not in parts["time"].index:
                rows.append(row | {"state": "no data", "studies": 0, "hits": 0})
                continue
            cell = lookup(parts["time"], key)
            row |= {"state": cell["state"], "studies": cell["present"], "hits": cell["hits"]}
            for measure in MEASURES:
                row |= _measure(measure, parts[measure], key, (workload, base[name]))
            row |= {"best": cell["best"], "ms_per_step": cell["ms_per_step"], "batch_size": batch.get(key, np.nan)}
            rows.append(row)
    table = pd.DataFrame(rows)
    pace = table.set_index(["workload", "algorithm"])["ms_per_step"]
    keys = pd.MultiIndex.from_arrays([table["workload"], table["algorithm"].map(base)])
    other = pace.reindex(keys)
    table["ms_ratio"] = table["ms_per_step"] / other.to_numpy()
    return table.reindex(columns=COLUMNS)


COLUMNS = ["workload", "algorithm", "state", "studies", "hits"]
COLUMNS += [
    f"{measure}{suffix}"
    for measure in MEASURES
    for suffix in ("", "_low", "_high", "_ci_low", "_ci_high", "_ratio", "_ratio_ci_low", "_ratio_ci_high")
]
COLUMNS += ["best", "ms_per_step", "ms_ratio", "batch_size"]


def _measure(measure: str, table: pd.DataFrame, key: tuple[str, str], other: tuple[str, str]) -> dict[str, float]:
    """Median, spread and interval of one measure, and its ratio to the reference."""
    cell = lookup(table, key)
    draws = _draws(cell, key)
    low, high = bootstrap.interval(draws)
    found = {"": cell["cost"], "_low": cell["low"], "_high": cell["high"], "_ci_low": low, "_ci_high": high}
    if other in table.index:
        base = lookup(table, other)
        if key == other:
            found |= dict.fromkeys(("_ratio", "_ratio_ci_low", "_ratio_ci_high"), 1.0 if base["hits"] else np.nan)
        else:
            with np.errstate(invalid="ignore"):
                found["_ratio"] = np.float64(cell["cost"]) / np.float64(base["cost"])
                quotients = draws / _draws(base, other)
            # Neither reached the target in some draw: no statement about the quotient is possible.
            if not np.isnan(quotients).any():
                found["_ratio_ci_low"], found["_ratio_ci_high"] = bootstrap.interval(quotients)
            if not np.isfinite(base["cost"]):
                found["_ratio"] = np.nan
    return {f"{measure}{suffix}": float(value) for suffix, value in found.items()}


def _draws(cell: pd.Series, key: tuple[str, str]) -> bootstrap.Floats:
    return bootstrap.medians(cell["values"], bootstrap.REPLICATES, bootstrap.SEED, "\0".join(key))


def tables(report: Report) -> list[Table]:
    """The report in words: one table per workload."""
    found = []
    for workload, part in report.summary.groupby("workload", sort=True):
        target = report.rules.targets[str(workload)]
        headers = [
            "algorithm",
            "reached",
            "steps to target",
            "ratio",
            "time to target",
            "ratio",
            target.metric,
            "ms/step",
            *(["batch"] if part["batch_size"].notna().any() else []),
        ]
        direction = "at least" if target.higher_is_better else "at most"
        caption = f"{workload}: {target.column} {direction} {target.value:g}"
        table = Table(caption, headers, left=(0,))
        for _, row in part.iterrows():
            table.rows.append(_row(row, report, str(workload))[: len(headers)])
        table.note = (
            "Medians over studies (least to most). Ratios are to "
            + (" and ".join(sorted(set(report.references.values()) - {""})) or report.reference or "no reference")
            + (", each for its framework" if report.references else "")
            + "; below 1 is better. The metric is the median best value."
        )
        found.append(table)
    return found


def _row(row: pd.Series, report: Report, workload: str) -> list[str]:
    name = row["algorithm"] + (" (reference)" if row["algorithm"] == report.reference_of(row["algorithm"]) else "")
    if not row["studies"]:
        return [name, "0 of 0", "no data", "–", "no data", "–", "–", "–", "–"]
    cells = [name, f"{row['hits']} of {max(row['studies'], report.rules.studies)}"]
    for measure, show in (("steps", text.steps), ("time", text.seconds)):
        if np.isfinite(row[measure]):
            cells.append(text.spread(row[measure], row[f"{measure}_low"], row[f"{measure}_high"], show))
        else:
            cells.append(_miss(row, report, workload))
        cells.append(_ratio(row, measure))
    numbers = (text.number(row["best"]), text.number(row["ms_per_step"], 3), text.steps(row["batch_size"]))
    return [*cells, *numbers]


def _miss(row: pd.Series, report: Report, workload: str) -> str:
    """Why the median study did not reach the target."""
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


def _ratio(row: pd.Series, measure: str) -> str:
    ratio = row[f"{measure}_ratio"]
    if np.isnan(ratio):
        return "–"
    low, high = row[f"{measure}_ratio_ci_low"], row[f"{measure}_ratio_ci_high"]
    if not np.isfinite(ratio):
        return "miss"
    return (
        f"{ratio:.2f}"
        if np.isnan(low) or low == high
        else f"{ratio:.2f} [{low:.2f}, {high:.2f}]".replace("inf", "miss")
    )


def interval_table(report: Report) -> Table:
    """How far the medians and ratios would move with other studies."""
    headers = ["workload", "algorithm", "steps", "ratio of steps", "time", "ratio of time"]
    table = Table("95 % bootstrap intervals over studies", headers, left=(0, 1))
    for _, row in report.summary[report.summary["studies"] > 0].iterrows():
        cells = [row["workload"], row["algorithm"]]
        for measure, show in (("steps", text.steps), ("time", text.seconds)):
            for name, write in ((measure, show), (f"{measure}_ratio", _two_places)):
                low, high = row[f"{name}_ci_low"], row[f"{name}_ci_high"]
                cells.append("–" if np.isnan(low) else f"{write(low)} to {write(high)}")
        table.rows.append(cells)
    table.note = "A ratio has no interval if neither algorithm reached the target in some replicate."
    return table


def _two_places(value: float) -> str:
    return f"{value:.2f}" if np.isfinite(value) else text.number(value)


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
    table = Table("Studies, each with its best trial", headers, left=(0, 1, 2, 4))
    rows = report.studies.sort_values(["workload", "submission", "study"])
    for _, row in rows.iterrows():
        cells = [
            row["workload"],
            row["submission"],
            row["study"],
            f"{row['trial']} of {row['trials']}",
            row["state"],
        ]
        numbers = [text.steps(row["steps"]), text.seconds(row["time"]), text.number(row["best"])]
        table.rows.append([*cells, *numbers, text.steps(row["last_step"]), text.number(row["ms_per_step"], 3)])
    return table


def framework_table(report: Report) -> Table | None:
    """PyTorch and JAX side by side for what was run in both, None if nothing was."""
    headers = [
        "workload",
        "algorithm",
        "steps, PyTorch",
        "steps, JAX",
        "JAX / PyTorch",
        "best, PyTorch",
        "best, JAX",
        "ms/step, PyTorch",
        "ms/step, JAX",
    ]
    table = Table("PyTorch and JAX", headers, left=(0, 1))
    rows = {(row["workload"], row["algorithm"]): row for _, row in report.summary.iterrows() if row["studies"]}
    for (workload, name), torch in rows.items():
        match = LABELLED.fullmatch(name)
        jax = rows.get((workload, f"{match['submission']} (jax)")) if match else None
        if match is None or match["framework"] != "pytorch" or jax is None:
            continue
        pair = (torch, jax)
        steps = [text.steps(row["steps"]) if np.isfinite(row["steps"]) else "miss" for row in pair]
        ratio = jax["steps"] / torch["steps"] if "miss" not in steps else np.nan
        cells = [workload, match["submission"], *steps, "–" if np.isnan(ratio) else _two_places(ratio)]
        cells += [text.number(row["best"]) for row in pair]
        table.rows.append([*cells, *(text.number(row["ms_per_step"], 3) for row in pair)])
    table.note = "Medians over studies. In JAX the time to target and the time of a step hold the compilation."
    return table if table.rows else None


def oddity_table(found: pd.DataFrame) -> Table:
    """The findings by kind."""
    short = summary(found)
    table = Table("Oddities in the logs", ["level", "what", "places", "rows", "example"], left=(0, 1, 4))
    table.rows = [[row.level, row.what, str(row.places), str(row.rows), row.example] for row in records(short)]
    table.note = "The whole list is in oddities.csv." if len(short) else "Nothing odd was found."
    return table
