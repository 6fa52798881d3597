"""The official scorer's ``workload_targets.json``, in its forms of 0.5, 0.6 and 1.0, as rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from scoring.judge.rules import Rules, Target
from scoring.metrics import higher_is_better

DIRECTIONS = ("minimize", "maximize")
SELF_TUNING_FACTOR = 1.5  # since 0.6, and for files that do not say


def number(value: object) -> float:
    """A number out of JSON, NaN for null."""
    return np.nan if value is None else float(value)  # type: ignore[arg-type]


def upward(direction: object) -> bool:
    """Whether a metric is to be maximized.

    Raises:
      ValueError: the direction is none.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction {direction!r} is none of {', '.join(DIRECTIONS)}")
    return direction == "maximize"


def rules(data: Mapping[str, object], ruleset: str, known_versions: Sequence[Rules]) -> Rules:
    """The rules of an official file, whose version is told by its base workloads and hints, not by its label.

    What such files may lack (direction, budget, evaluation period) comes from the version they agree with.

    Args:
      data: the file.
      ruleset: "external" or "self".
      known_versions: the versions there are data files for, under this ruleset, newest first.

    Raises:
      KeyError, TypeError, ValueError: the file is not of this form.
    """
    stated: Mapping[str, Mapping[str, object]] = data["workloads"]  # type: ignore[assignment]
    base = tuple(map(str, data["base_workloads"]))  # type: ignore[call-overload]
    variants = tuple(map(str, data["held_out_workloads"]))  # type: ignore[call-overload]
    alike = [one for one in known_versions if set(one.base) == set(base) and set(one.held_out) == set(variants)]
    # 0.5's own official file carries the hints of 0.6: of several versions the hints decide, but need not agree.
    alike.sort(key=lambda one: -sum(_agrees(one, name, stated[name]) for name in base))
    known = alike[0] if alike else None
    targets = {}
    for name, one in stated.items():
        metric = str(one["target_metric_name"])
        before = known.targets.get(name) if known else None
        goal = one.get("target_metric_goal")
        budget = one.get("max_allowed_runtime_sec")
        targets[name] = Target(
            metric,
            number(one["validation_target_value"]),
            upward(goal) if goal is not None else higher_is_better(metric),
            number(budget) if budget is not None else before.budget if before else np.inf,
            number(one["step_hint"]),
            before.eval_period if before else np.nan,
            before.test_value if before else np.nan,
        )
    held_out = {name: _base_of(name, base) for name in variants}
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


def _base_of(variant: str, base: Sequence[str]) -> str:
    for name in base:
        if variant.startswith(name):
            return name
    raise ValueError(f"held-out workload {variant} has no base workload")


def _agrees(rules: Rules, name: str, one: Mapping[str, object]) -> bool:
    target = rules.targets[name]
    budget = one.get("max_allowed_runtime_sec", target.budget)
    return target.step_hint == one["step_hint"] and target.budget == budget
