"""What the JSON files beside a trial's measurements say about it: one row of the table of trials."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np

from scoring.oddities import Oddities
from scoring.read.layout import TrialFolder

# Columns of the table of trials, and the names in meta_data (behind "workload.") they come from.
META = {
    "metric": "target_metric_name",
    "target": "validation_target_value",
    "test_target": "test_target_value",
    "lower_is_better": "lower_is_better",
    "budget": "max_allowed_runtime_sec",
    "step_hint": "step_hint",
    "eval_period": "eval_period_time_sec",
    "eval_period_steps": "eval_period_steps",
}
NUMBERS = ("target", "test_target", "budget", "step_hint", "eval_period", "eval_period_steps")
BATCH_SIZES = ("batch_size", "global_batch_size", "workload.batch_size", "workload.global_batch_size")

Facts = dict[str, object]


def describe(trial: TrialFolder, odd: Oddities) -> Facts:
    """One row of the trials table. Of several starts of a run the first file speaks: the settings are the same."""
    meta: Facts = {}
    flags: Facts = {}
    for prefix, target in (("meta_data_", meta), ("flags_", flags)):
        for name, entry in trial.named(prefix)[:1]:
            target.update(_json(entry.read, trial.where, name, odd))
    hparams = _beside(trial, "hparams.json", odd)
    if not meta and "eval_measurements.csv" in trial.files:
        detail = "target and budget must come from the data files"
        odd.add("note", trial.where, "no meta_data", detail, "read without")
    row: Facts = {
        "submission": trial.submission,
        "study": trial.study,
        "workload": trial.workload,
        "framework": trial.framework or _framework(flags),
        "trial": trial.trial,
        "hyperparameters": json.dumps(hparams, sort_keys=True) if hparams else "",
        "where": trial.where,
        "usual": trial.usual,
        "submission_path": str(flags.get("submission_path") or ""),
    }
    for column, name in META.items():
        row[column] = meta.get(f"workload.{name}")
    for column in NUMBERS:
        row[column] = number(row[column])
    if np.isfinite(number(row["eval_period_steps"])):
        row["eval_period"] = np.nan  # a run that evaluates by steps keeps no period in seconds
    row["metric"] = row["metric"] if isinstance(row["metric"], str) else ""
    lower = row["lower_is_better"]
    row["lower_is_better"] = ("yes" if lower else "no") if isinstance(lower, bool) else ""
    row["max_global_steps"] = number(flags.get("max_global_steps"))
    # The embedded runner says where a run ended, which may be where its schedule did.
    row["ended_at"] = number(_beside(trial, "outcome.json", odd).get("global_step"))
    row["ruleset"] = str(flags.get("tuning_ruleset") or "")
    row["seed"] = str(meta.get("rng_seed", flags.get("rng_seed", "")))
    sizes = [source[name] for source in (hparams, flags, meta) for name in BATCH_SIZES if name in source]
    row["batch_size"] = number(sizes[0]) if sizes else np.nan
    return row


def _beside(trial: TrialFolder, name: str, odd: Oddities) -> Facts:
    """What a file of this name says; nothing where there is none."""
    return _json(trial.files[name].read, trial.where, name, odd) if name in trial.files else {}


def number(value: object) -> float:
    """A number out of JSON; NaN for what is none."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return np.nan


def _framework(flags: Facts) -> str:
    """The framework of a workload folder without a suffix, if the flags name it."""
    stated = flags.get("framework")
    return stated if stated in ("jax", "pytorch") else ""


def _json(read_bytes: Callable[[], bytes], where: str, name: str, odd: Oddities) -> Facts:
    try:
        value = json.loads(read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        odd.add("warning", where, "unreadable JSON", f"{name}: {type(error).__name__}", "read as if absent")
        return {}
    if not isinstance(value, dict):
        odd.add("warning", where, "unreadable JSON", f"{name}: not an object", "read as if absent")
        return {}
    return value
