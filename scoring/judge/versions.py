"""Which rules hold: versions among the data files, told by workloads and budgets, or the runs' own meta_data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from scoring.errors import InputError
from scoring.facts import DATA, versions
from scoring.judge.rules import Rules, Target
from scoring.metrics import higher_is_better
from scoring.oddities import Oddities

DIRECTIONS = ("minimize", "maximize")
SELF_TUNING_FACTOR = 1.5  # since 0.6, and for targets files that do not say


def load(version: str, ruleset: str = "external") -> Rules:
    """The rules of an AlgoPerf version ("0.5", "0.6", "1.0"), or of a file.

    Args:
      version: a version, the path of a data file of ours, or of an official ``workload_targets.json``.
      ruleset: "external" or "self".

    Raises:
      InputError: there is no such version or file, or the file is neither of the two.
    """
    known = version in versions()
    path = DATA / f"algoperf_{version}.json" if known else Path(version)
    try:
        data = json.loads(path.read_text())
        if "base_workloads" in data:
            return _official(data, ruleset)
        return Rules(
            version=data["version"],
            targets={name: _target(one) for name, one in data["workloads"].items()},
            base=tuple(data["base"]),
            held_out=data["held_out"],
            studies=data["studies"],
            trials=data["trials"][ruleset],
            ruleset=ruleset,
            budget_factor=data["budget_factor"][ruleset],
            unscored=tuple(data["unscored"]),
            qualification=tuple(data["qualification"]),
        )
    except OSError:
        raise InputError(
            f"{version}: neither a known version ({', '.join(versions())}) nor a data file that can be read"
        ) from None
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        message = f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: not a benchmark data file, nor a workload_targets.json ({message})") from None


def _target(one: Mapping[str, object]) -> Target:
    return Target(
        metric=str(one["metric"]),
        value=_float(one["target"]),
        higher_is_better=_upward(one["direction"]),
        budget=_float(one["budget"]),
        step_hint=_float(one["step_hint"]),
        eval_period=_float(one["eval_period"]),
        test_value=_float(one["test_target"]),
    )


def _float(value: object) -> float:
    return np.nan if value is None else float(value)  # type: ignore[arg-type]


def _upward(direction: object) -> bool:
    if direction not in DIRECTIONS:
        raise ValueError(f"direction {direction!r} is none of {', '.join(DIRECTIONS)}")
    return direction == "maximize"


def _official(data: Mapping[str, object], ruleset: str) -> Rules:
    """An official workload_targets.json, whose version is told by its base workloads and hints, not by its label.

    What such files may lack (direction, budget, evaluation period) comes from the version they agree with.
    """
    stated: Mapping[str, Mapping[str, object]] = data["workloads"]  # type: ignore[assignment]
    base = tuple(map(str, data["base_workloads"]))  # type: ignore[call-overload]
    variants = tuple(map(str, data["held_out_workloads"]))  # type: ignore[call-overload]
    alike = [
        rules
        for rules in (load(version, ruleset) for version in reversed(versions()))
        if set(rules.base) == set(base) and set(rules.held_out) == set(variants)
    ]
    # 0.5's own official file carries the hints of 0.6: of several versions the hints decide, but need not agree.
    alike.sort(key=lambda rules: -sum(_agrees(rules, name, stated[name]) for name in base))
    known = alike[0] if alike else None
    targets = {}
    for name, one in stated.items():
        metric = str(one["target_metric_name"])
        before = known.targets.get(name) if known else None
        goal = one.get("target_metric_goal")
        budget = one.get("max_allowed_runtime_sec")
        targets[name] = Target(
            metric,
            _float(one["validation_target_value"]),
            _upward(goal) if goal is not None else higher_is_better(metric),
            _float(budget) if budget is not None else before.budget if before else np.inf,
            _float(one["step_hint"]),
            before.eval_period if before else np.nan,
            before.test_value if before else np.nan,
        )
    held_out = {name: next(one for one in base if name.startswith(one)) for name in variants}
    label = f"{data['benchmark_version']} (file)" if known is None else known.version
    unscored = tuple(name for name in targets if name not in (*base, *variants))
    assumed = []
    without = [name for name in (*base, *variants) if not np.isfinite(targets[name].budget)]
    if without:
        assumed.append(f"the targets file states no budget for {', '.join(without)}: none is applied there")
    if known is None:
        assumed.append("the targets file fits no known version: 3 studies are due, budgets as it states")
    return Rules(
        version=label,
        targets=targets,
        base=base,
        held_out=held_out,
        studies=known.studies if known else 3,
        trials=(known.trials if known else 5) if ruleset == "external" else 1,
        ruleset=ruleset,
        budget_factor=known.budget_factor if known else SELF_TUNING_FACTOR if ruleset == "self" else 1.0,
        unscored=unscored,
        qualification=tuple(name for name in (known.qualification if known else ()) if name in base),
        assumed=tuple(assumed),
    )


def _agrees(rules: Rules, name: str, one: Mapping[str, object]) -> bool:
    target = rules.targets[name]
    budget = one.get("max_allowed_runtime_sec", target.budget)
    return target.step_hint == one["step_hint"] and target.budget == budget


def agreement(trials: pd.DataFrame, rules: Rules) -> int:
    """How many trials ran a workload of this version and state its budget and hint."""
    budgets = trials["workload"].map({name: target.budget for name, target in rules.targets.items()})
    hints = trials["workload"].map({name: target.step_hint for name, target in rules.targets.items()})
    same_hint = (trials["step_hint"] == hints) | trials["step_hint"].isna()
    return int(((trials["budget"] == budgets) & same_hint).sum())


def detect(trials: pd.DataFrame) -> str | None:
    """The version most trials agree with, by their workloads, budgets and hints; None without official workloads.

    Where the meta_data decide nothing, the version that knows most of the workloads, and of those the newest.
    """
    best: tuple[tuple[int, int], str] | None = None
    for version in versions():
        rules = load(version)
        known = int(trials["workload"].isin([*rules.targets, *rules.unscored]).sum())
        rank = (agreement(trials, rules), known)
        if known and (best is None or rank >= best[0]):
            best = (rank, version)
    return best[1] if best else None


def from_meta_data(trials: pd.DataFrame, odd: Oddities) -> dict[str, Target]:
    """Targets as the runs state them, for workloads no data file knows.

    If the trials of a workload disagree, the statement of most counts and the others are reported.
    """
    found: dict[str, Target] = {}
    columns = ["metric", "target", "lower_is_better", "budget", "step_hint", "eval_period", "test_target"]
    for workload, part in trials.groupby("workload", sort=True):
        name = str(workload)
        stated = part[(part["metric"] != "") & np.isfinite(part["target"])]
        if stated.empty:
            detail = "no data file and no meta_data states its target"
            odd.add("error", name, "unknown workload", detail, "not scored")
            continue
        kinds = stated.groupby(columns, dropna=False).size().sort_values(ascending=False, kind="stable")
        metric, value, lower, budget, hint, period, test = kinds.index[0]
        if len(kinds) > 1:
            detail = f"{len(kinds)} different sets of metric, target, budget and hint in the trials"
            odd.add("warning", name, "meta_data disagree", detail, f"the most frequent counts: {metric} {value:g}")
        upward = lower == "no" if lower else higher_is_better(metric)
        limit = float(budget) if np.isfinite(budget) else np.inf
        found[name] = Target(metric, float(value), upward, limit, float(hint), float(period), float(test))
    return found


def rules_for(
    trials: pd.DataFrame,
    version: str = "auto",
    ruleset: str = "auto",
    odd: Oddities | None = None,
    studies: int = 0,
) -> Rules:
    """The rules to judge ``trials`` (of ``Logs``) by; whatever had to be assumed is among ``Rules.assumed``.

    ``auto`` takes the official version the meta_data agree with most; if no official workload occurs, every
    workload counts with the target its own meta_data states, over as many studies and trials as there are.
    ``studies`` > 0 is how many studies are due instead of the version's.
    """
    odd = odd if odd is not None else Oddities()
    chosen = detect(trials) if version == "auto" else version
    tuning, assumed = _ruleset(trials, ruleset, official=chosen is not None)
    if chosen is None:
        found = from_meta_data(trials, odd)
        factor = SELF_TUNING_FACTOR if tuning == "self" else 1.0
        rules = Rules("embedded", found, tuple(found), {}, ruleset=tuning, budget_factor=factor)
    else:
        rules = load(chosen, tuning)
        assumed += rules.assumed
        if version == "auto":
            rules, doubt = _checked(trials, rules)
            assumed = doubt + assumed
        others = trials[~trials["workload"].isin([*rules.targets, *rules.unscored])]
        rules = replace(rules, targets={**rules.targets, **from_meta_data(others, odd)})
    return replace(rules, assumed=assumed, studies=studies or rules.studies)


def _ruleset(trials: pd.DataFrame, wanted: str, official: bool) -> tuple[str, tuple[str, ...]]:
    """The tuning ruleset, and what was assumed to tell it."""
    if wanted != "auto":
        return wanted, ()
    stated = trials["ruleset"][trials["ruleset"].isin(["external", "self"])]
    if len(stated):
        chosen = str(stated.mode().iloc[0])
        others = int((stated != chosen).sum())
        said = f"{others} of {len(trials)} trials state another tuning ruleset than {chosen}, which is applied"
        return chosen, (said,) if others else ()
    if not official:
        return "external", ()
    most = int(trials.groupby(["submission", "workload", "framework", "study"]).size().max())
    chosen = "self" if most == 1 else "external"
    reason = "one trial a study" if most == 1 else f"up to {most} trials a study"
    return chosen, (f"no flags state the tuning ruleset: {chosen} is assumed from {reason} (--ruleset sets it)",)


def _checked(trials: pd.DataFrame, rules: Rules) -> tuple[Rules, tuple[str, ...]]:
    """The rules, with budgets and hints of the meta_data if fewer than half of the trials agree with them."""
    known = trials[trials["workload"].isin(_official_workloads())]
    agree = agreement(known, rules)
    if 2 * agree >= len(known):
        return rules, ()
    targets = dict(rules.targets)
    stated: list[str] = []
    for name, part in known[np.isfinite(known["budget"])].groupby("workload"):
        if name in targets:
            budget, hint = part.groupby(["budget", "step_hint"], dropna=False).size().idxmax()
            hint = hint if np.isfinite(hint) else targets[name].step_hint
            targets[name] = replace(targets[name], budget=float(budget), step_hint=float(hint))
            stated.append(str(name))
    source = "budget and hint come from meta_data" if stated else "no meta_data states a budget: the version's hold"
    said = f"only {agree} of {len(known)} trials agree with any version: targets of {rules.version}, {source}"
    return replace(rules, targets=targets), (said,)


def _official_workloads() -> set[str]:
    loaded = [load(version) for version in versions()]
    return {name for rules in loaded for name in (*rules.targets, *rules.unscored)}
