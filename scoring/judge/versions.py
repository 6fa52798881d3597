"""Which rules hold: versions among the data files, told by workloads and budgets, or the runs' own meta_data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from commands.errors import UserError
from scoring.facts import DATA, versions
from scoring.judge import targets_file
from scoring.judge.rules import Rules, Target
from scoring.judge.targets_file import SELF_TUNING_FACTOR, number, upward
from scoring.metrics import higher_is_better
from scoring.oddities import Oddities


def load(version: str, ruleset: str = "external") -> Rules:
    """The rules of an AlgoPerf version ("0.5", "0.6", "1.0"), or of a file.

    Args:
      version: a version, the path of a data file of ours, or of an official ``workload_targets.json``.
      ruleset: "external" or "self".

    Raises:
      UserError: there is no such version or file, or the file is neither of the two.
    """
    known = version in versions()
    path = DATA / f"algoperf_{version}.json" if known else Path(version)
    try:
        data = json.loads(path.read_text())
        if "base_workloads" in data:
            newest_first = [load(name, ruleset) for name in reversed(versions())]
            return targets_file.rules(data, ruleset, newest_first)
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
        raise UserError(
            f"{version}: neither a known version ({', '.join(versions())}) nor a data file that can be read"
        ) from None
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        message = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: not a benchmark data file, nor a workload_targets.json ({message})") from None


def _target(one: Mapping[str, object]) -> Target:
    return Target(
        metric=str(one["metric"]),
        value=number(one["target"]),
        higher_is_better=upward(one["direction"]),
        budget=number(one["budget"]),
        step_hint=number(one["step_hint"]),
        eval_period=number(one["eval_period"]),
        test_value=number(one["test_target"]),
    )


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
