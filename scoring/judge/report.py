"""The report on a few runs: steps and time to target per workload and algorithm, against a reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from commands.errors import UserError
from scoring.frames import lookup
from scoring.judge import bootstrap, cells, trials
from scoring.judge.columns import OF_CELLS, Floats, placed
from scoring.judge.frameworks import algorithm
from scoring.judge.lint import lint
from scoring.judge.rules import Rules
from scoring.judge.versions import rules_for
from scoring.oddities import Oddities, merge
from scoring.read.logs import Logs

MEASURES = tuple(column.name for column in placed("costs"))
OF_MEASURE = ("", "_low", "_high", "_ci_low", "_ci_high", "_ratio", "_ratio_ci_low", "_ratio_ci_high")
# The columns of the summary; OF_CELLS are medians over studies.
COLUMNS = (
    *("workload", "algorithm", "framework", "state", "studies", "hits"),
    *(f"{measure}{suffix}" for measure in MEASURES for suffix in OF_MEASURE),
    *OF_CELLS,
    "ms_ratio",
)


@dataclass(frozen=True)
class Report:
    """Everything the report shows.

    Attributes:
      summary: one row per workload and algorithm, numbers only; a miss is infinite, an undefined ratio missing.
      studies: one row per study: its best trial.
      trials: one row per trial.
      rules: what they were judged by, the same as a leaderboard's.
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
    inputs: tuple[str, ...] = ()

    def reference_of(self, algorithm: str) -> str:
        """What the ratios of an algorithm are to, empty for none."""
        return self.references.get(algorithm, self.reference)


def build(
    logs: Logs,
    version: str = "auto",
    ruleset: str = "auto",
    reference: str | None = None,
    studies: int = 0,
    goals: Mapping[str, float] | None = None,
    relaxations: Mapping[str, float] | None = None,
) -> Report:
    """Judge the runs by the rules of a leaderboard.

    Args:
      logs: what was read.
      version, ruleset, studies: see ``versions.rules_for``.
      reference: the algorithm ratios are to; by default NadamW, if it is there; "" for none.
      goals: other validation targets by workload.
      relaxations: share by which targets are made easier, see ``Rules.relaxed``.

    Raises:
      UserError: no workload has a target, or a name is unknown.
    """
    odd = Oddities()
    rules = rules_for(logs.trials, version, ruleset, odd, studies)
    if goals:
        rules = rules.with_targets(goals)
    if relaxations:
        rules = rules.relaxed(relaxations)
    reached = trials.reach(logs, rules)
    if reached.empty:
        raise UserError("no trial of a workload with a known target: name a data file with --benchmark")
    best = cells.studies(reached, rules)
    names = sorted(best["submission"].unique())
    own = _references(best, names, reference)
    chosen = "" if own else _reference(names, reference)
    found = merge(lint(logs, rules, reached), odd.table())
    table = summarise(reached, rules, chosen, own)
    return Report(table, best, reached, rules, chosen, found, own, logs.inputs)


def _reference(names: list[str], wanted: str | None) -> str:
    if wanted is None:
        like = [name for name in names if "nadamw" in name.lower()]
        return "nadamw" if "nadamw" in names else like[0] if len(like) == 1 else ""
    if wanted and wanted not in names:
        raise UserError(f"--reference={wanted}: no such algorithm; there are {', '.join(names)}")
    return wanted


def _references(best: pd.DataFrame, names: list[str], wanted: str | None) -> dict[str, str]:
    """The reference of each algorithm, in its framework, if the reference was run in two; else nothing.

    An algorithm whose framework has no reference gets none, as one that was run in several.
    """
    base = "nadamw" if wanted is None else wanted
    if not base or base in names or not any(algorithm(name) == base for name in names):
        return {}
    found = {}
    for name, frameworks in best.groupby("submission")["framework"].unique().items():
        label = f"{base} ({frameworks[0]})"
        found[str(name)] = label if len(frameworks) == 1 and label in names else ""
    return found


def summarise(
    reached: pd.DataFrame, rules: Rules, reference: str = "", references: Mapping[str, str] | None = None
) -> pd.DataFrame:
    """One row per workload and algorithm, every algorithm on every workload, those of one reference together."""
    base = {name: (references or {}).get(name, reference) for name in reached["submission"].unique()}
    parts = {}
    for measure in MEASURES:
        # Each measure has its own best trial of a study: the fewest steps need not be the least time.
        by_study = cells.studies(reached.assign(cost=reached[measure]), rules)
        parts[measure] = cells.cells(by_study, rules).set_index(["workload", "submission"])
    everyone = sorted(reached["submission"].unique())
    rows = []
    for workload in sorted(reached["workload"].unique()):
        for name in sorted(everyone, key=lambda one: (base[one], one != base[one], one)):
            row: dict[str, object] = {"workload": workload, "algorithm": name}
            key = (workload, name)
            if key not in parts["time"].index:
                rows.append(row | {"framework": "", "state": "no data", "studies": 0, "hits": 0})
                continue
            cell = lookup(parts["time"], key)
            row |= {name: cell[name] for name in ("framework", "state", "hits", *OF_CELLS)}
            row["studies"] = cell["present"]
            for measure in MEASURES:
                row |= _measure(measure, parts[measure], key, (workload, base[name]))
            rows.append(row)
    table = pd.DataFrame(rows)
    pace = table.set_index(["workload", "algorithm"])["ms_per_step"]
    keys = pd.MultiIndex.from_arrays([table["workload"], table["algorithm"].map(base)])
    other = pace.reindex(keys)
    table["ms_ratio"] = table["ms_per_step"] / other.to_numpy()
    return table.reindex(columns=list(COLUMNS))


def _measure(measure: str, table: pd.DataFrame, key: tuple[str, str], other: tuple[str, str]) -> dict[str, float]:
    """Median, spread and interval of one measure, and its ratio to the reference; no interval from one study."""
    cell = lookup(table, key)
    draws = _draws(cell, key)
    low, high = bootstrap.interval(draws) if cell["present"] > 1 else (np.nan, np.nan)
    found = {"": cell["cost"], "_low": cell["low"], "_high": cell["high"], "_ci_low": low, "_ci_high": high}
    if other in table.index:
        base = lookup(table, other)
        several = cell["present"] > 1 and base["present"] > 1
        if key == other:
            found["_ratio"] = 1.0 if base["hits"] else np.nan
            if base["hits"] and several:
                found |= {"_ratio_ci_low": 1.0, "_ratio_ci_high": 1.0}
        else:
            with np.errstate(invalid="ignore"):
                found["_ratio"] = np.float64(cell["cost"]) / np.float64(base["cost"])
                quotients = draws / _draws(base, other)
            # Neither reached the target in some draw: no statement about the quotient is possible.
            if several and not np.isnan(quotients).any():
                found["_ratio_ci_low"], found["_ratio_ci_high"] = bootstrap.interval(quotients)
            if not np.isfinite(base["cost"]):
                found["_ratio"] = np.nan
    return {f"{measure}{suffix}": float(value) for suffix, value in found.items()}


def _draws(cell: pd.Series, key: tuple[str, str]) -> Floats:
    return bootstrap.medians(cell["values"], bootstrap.REPLICATES, bootstrap.SEED, "\0".join(key))


def of_trials(
    reached: pd.DataFrame, studies: pd.DataFrame, rules: Rules, reference: str, odd: pd.DataFrame
) -> Report:
    """The report on trials that were judged already, as a leaderboard shows it beneath its scores."""
    return Report(summarise(reached, rules, reference), studies, reached, rules, reference, odd)
