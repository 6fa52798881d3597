"""Targets, budgets, step hints and held-out sets: from versioned data files, or from the runs' own meta_data."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scoring.errors import InputError
from scoring.frames import records
from scoring.oddities import Oddities

HIGHER_IS_BETTER = ("accuracy", "ssim", "bleu", "mean_average_precision")
VERSIONS = ("0.5", "0.6")
DATA = Path(__file__).parents[1] / "data"


@dataclass(frozen=True)
class Target:
    """What a workload asks for. ``budget`` is in seconds, without the ruleset's factor; unknown figures are NaN."""

    metric: str
    value: float
    higher_is_better: bool
    budget: float = np.inf
    step_hint: float = np.nan
    eval_period: float = np.nan

    @property
    def column(self) -> str:
        """The column of the evaluations that is compared with the target."""
        return f"validation/{self.metric}"

    def distance(self, value: float) -> float:
        """How far ``value`` is from the target, positive while it is not reached."""
        return self.value - value if self.higher_is_better else value - self.value


@dataclass(frozen=True)
class Rules:
    """One version of the benchmark under one ruleset.

    Attributes:
      targets: by workload, base and held-out.
      base: the workloads a score counts.
      held_out: variant -> the base workload whose credit depends on it.
      studies: how many studies the median is over; a missing one is a miss. 0: as many as a submission has.
      trials: how many trials of a study count, those of the lowest numbers; 0: all.
      unscored: workloads known to occur in logs of this version without counting.
    """

    version: str
    targets: Mapping[str, Target]
    base: tuple[str, ...]
    held_out: Mapping[str, str]
    studies: int = 0
    trials: int = 0
    ruleset: str = "external"
    budget_factor: float = 1.0
    unscored: tuple[str, ...] = ()
    qualification: tuple[str, ...] = ()

    def budget(self, workload: str) -> float:
        """Seconds a run of ``workload`` may take under the ruleset."""
        return self.budget_factor * self.targets[workload].budget

    @property
    def scored(self) -> tuple[str, ...]:
        """Base workloads and, behind them, their held-out variants."""
        return (*self.base, *(name for name in self.held_out if self.held_out[name] in self.base))

    def restricted(self, workloads: Iterable[str]) -> Rules:
        """The same rules over some base workloads only, with their held-out variants.

        Raises:
          InputError: a name is no base workload of this version.
        """
        names = tuple(dict.fromkeys(workloads))
        unknown = [name for name in names if name not in self.base]
        if unknown or not names:
            raise InputError(f"unknown workload {', '.join(unknown)}: known are {', '.join(self.base)}")
        held_out = {name: base for name, base in self.held_out.items() if base in names}
        return replace(self, base=names, held_out=held_out)


def higher_is_better(metric: str) -> bool:
    """Whether a metric is to be reached from below; everything but the known few is a loss or an error."""
    return metric in HIGHER_IS_BETTER or metric.startswith(("accuracy", "top"))


def load(version: str, ruleset: str = "external") -> Rules:
    """The rules of an AlgoPerf version ("0.5", "0.6"), or of a data file of the same form."""
    path = DATA / f"algoperf_{version}.json" if version in VERSIONS else Path(version)
    try:
        data: dict[str, Any] = json.loads(path.read_text())
        targets = {
            name: Target(
                one["metric"],
                float(one["target"]),
                higher_is_better(one["metric"]),
                float(one["budget"]),
                float(one["step_hint"]),
                float(one["eval_period"]),
            )
            for name, one in data["workloads"].items()
        }
        return Rules(
            version=data["version"],
            targets=targets,
            base=tuple(data["base"]),
            held_out=data["held_out"],
            studies=data["studies"],
            trials=data["trials"][ruleset],
            ruleset=ruleset,
            budget_factor=data["budget_factor"][ruleset],
            unscored=tuple(data["unscored"]),
            qualification=tuple(data["qualification"]),
        )
    except FileNotFoundError:
        raise InputError(f"{version}: neither a known version ({', '.join(VERSIONS)}) nor a data file") from None
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"{path}: not a benchmark data file ({type(error).__name__}: {error})") from None


def detect(trials: pd.DataFrame) -> str | None:
    """The version whose budgets and hints the meta_data state; None if there is no official workload."""
    counts: dict[str, tuple[int, int]] = {}
    for position, version in enumerate(reversed(VERSIONS)):
        rules = load(version)
        known = trials[trials["workload"].isin(list(rules.targets))]
        agree = sum(
            row.budget == rules.targets[row.workload].budget
            and row.step_hint == rules.targets[row.workload].step_hint
            for row in records(known)
        )
        if len(known):
            counts[version] = (agree, -position)
    return max(counts, key=lambda version: counts[version]) if counts else None


def from_meta_data(
    trials: pd.DataFrame, odd: Oddities, known: Mapping[str, Target] | None = None
) -> dict[str, Target]:
    """Targets as the runs state them, for workloads no data file knows.

    If the trials of a workload disagree, the statement of most counts and the others are reported.
    """
    found: dict[str, Target] = {}
    columns = ["metric", "target", "lower_is_better", "budget", "step_hint", "eval_period"]
    for workload, part in trials.groupby("workload", sort=True):
        name = str(workload)
        if known and name in known:
            continue
        stated = part[(part["metric"] != "") & np.isfinite(part["target"])]
        if stated.empty:
            odd.add(
                "error", name, "unknown workload", "no data file and no meta_data states its target", "not scored"
            )
            continue
        kinds = stated.groupby(columns, dropna=False).size().sort_values(ascending=False, kind="stable")
        metric, value, lower, budget, hint, period = kinds.index[0]
        if len(kinds) > 1:
            detail = f"{len(kinds)} different sets of metric, target, budget and hint in the trials"
            odd.add("warning", name, "meta_data disagree", detail, f"the most frequent counts: {metric} {value:g}")
        upward = lower == "no" if lower else higher_is_better(metric)
        limit = budget if np.isfinite(budget) else np.inf
        found[name] = Target(metric, float(value), upward, float(limit), float(hint), float(period))
    return found


def rules_for(
    trials: pd.DataFrame, version: str = "auto", ruleset: str = "auto", odd: Oddities | None = None
) -> Rules:
    """The rules to judge ``trials`` by.

    ``auto`` takes the official version the meta_data agree with most; if no official workload occurs, every
    workload counts with the target its own meta_data states, over as many studies and trials as there are.
    """
    odd = odd if odd is not None else Oddities()
    if ruleset == "auto":
        stated = trials["ruleset"][trials["ruleset"].isin(["external", "self"])]
        ruleset = str(stated.mode().iloc[0]) if len(stated) else "external"
    chosen = detect(trials) if version == "auto" else version
    if chosen is None:
        found = from_meta_data(trials, odd)
        factor = 1.5 if ruleset == "self" else 1.0
        return Rules("embedded", found, tuple(found), {}, ruleset=ruleset, budget_factor=factor)
    rules = load(chosen, ruleset)
    others = trials[~trials["workload"].isin([*rules.targets, *rules.unscored])]
    if len(others):
        extra = from_meta_data(others, odd)
        rules = replace(rules, targets={**rules.targets, **extra})
    return rules


def with_targets(rules: Rules, values: Mapping[str, float]) -> Rules:
    """The same rules with other target values for some workloads."""
    unknown = [name for name in values if name not in rules.targets]
    if unknown:
        raise InputError(f"unknown workload {', '.join(unknown)}: known are {', '.join(rules.targets)}")
    changed = {name: replace(rules.targets[name], value=value) for name, value in values.items()}
    return replace(rules, targets={**rules.targets, **changed})
