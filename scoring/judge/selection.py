"""Which workloads count, and which submission the others are compared with."""

from __future__ import annotations

from dataclasses import replace

from commands.errors import UserError
from scoring.judge.frameworks import named
from scoring.judge.rules import Rules
from scoring.read.logs import Logs

BASELINES = ("nadamw", "baseline", "prize_qualification_baseline", "nadamw_baselinev05")
REMEDY = "name a data file with --benchmark"


def select(rules: Rules, workloads: str, logs: Logs) -> Rules:
    """The rules over a named subset: base, qualification, present, or a list of workloads separated by commas.

    ``present`` are all workloads that occur and have a target, but for held-out variants, which only decide credit.

    Raises:
      UserError: a name is unknown, no workload has a target, or the version has no qualification set.
    """
    there = set(logs.trials["workload"])
    if not rules.targets:
        raise UserError(f"no workload of these logs has a target ({', '.join(sorted(there))}): {REMEDY}")
    if workloads == "base":
        return rules
    if workloads == "qualification":
        if not rules.qualification:
            raise UserError("these workloads have no qualification set: name workloads, or --workloads=present")
        return rules.restricted(rules.qualification)
    if workloads == "present":
        names = [name for name in rules.targets if name in there - set(rules.held_out) - set(rules.unscored)]
        if not names:
            raise UserError(f"no workload of these logs is scored ({', '.join(sorted(there))}): {REMEDY}")
    else:
        names = [name.strip() for name in workloads.split(",") if name.strip()]
    # A workload of our own, known from meta_data only, may be scored beside the official ones.
    extra = tuple(name for name in names if name in rules.targets and name not in rules.base)
    return replace(rules, base=rules.base + extra).restricted(names)


def choose_reference(names: list[str], wanted: str | None, scored: set[str]) -> str:
    """The submission that speedups are over, "" for none.

    Args:
      names: all rows.
      wanted: what a user named, None for a baseline.
      scored: the rows with a trial of a scored workload.

    Raises:
      UserError: there is no such row, or one for each framework.
    """
    if wanted:
        return named(wanted, names, "--reference")
    return "" if wanted == "" else next((name for name in BASELINES if name in scored), "")
