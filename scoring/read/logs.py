"""Read run directories, submission directories, directories of submissions, and archives into one tidy table."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from scoring.errors import InputError
from scoring.oddities import Oddities
from scoring.read import cache, sanity
from scoring.read.folders import Folder, folders, signature
from scoring.read.layout import TrialFolder, distinct, find_trials
from scoring.read.parse import METRIC, parse

NAMES = ("submission", "study", "workload", "framework", "trial", "hyperparameters")
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
FLAGS = ("max_global_steps", "tuning_ruleset")
BATCH_SIZES = ("batch_size", "global_batch_size", "workload.batch_size", "workload.global_batch_size")


@dataclass(frozen=True)
class Logs:
    """What was read.

    Attributes:
      evals: one row per evaluation: submission, study, workload, framework, trial, hyperparameters (JSON), step,
        time (seconds of accumulated submission time), the other clocks, believed, and one column per metric, such
        as ``validation/accuracy``. Rows of one trial stand together, in the order of steps.
      trials: one row per trial folder, with what its meta_data and flags say; ``trial_id`` joins the two.
      oddities: everything odd met on the way: level, where, what, detail, action, count.
    """

    evals: pd.DataFrame
    trials: pd.DataFrame
    oddities: pd.DataFrame


def read(roots: Iterable[str | os.PathLike[str]], use_cache: bool = True) -> Logs:
    """The logs below ``roots``: directories at any level from a trial up, or archives.

    Raises:
      InputError: a root does not exist, or holds no trial.
    """
    odd = Oddities()
    found = [(str(root), folders(root, odd)) for root in roots]
    key = cache.key([root for root, _ in found], [line for _, part in found for line in signature(part)])
    stored = cache.load(key) if use_cache else None
    if stored is None:
        evals, trials = _read(found, odd)
        if use_cache:
            cache.store(key, evals, trials, odd.rows)
    else:
        evals, trials, rows = stored
        odd.rows = rows
    return Logs(_named(evals, trials), trials, odd.table())


def _read(found: list[tuple[str, list[Folder]]], odd: Oddities) -> tuple[pd.DataFrame, pd.DataFrame]:
    groups = []
    for root, part in found:
        # A trial or workload given by itself is judged by its own name; only what it lies in is missing.
        trials = find_trials(part, odd)
        if not trials:
            raise InputError(f"{root}: holds no trial (<workload>_<framework>/trial_<i>/eval_measurements.csv)")
        groups.append(trials)
    trials = distinct(groups, odd)
    table = pd.DataFrame([_describe(trial, odd) for trial in trials])
    table.insert(0, "trial_id", np.arange(len(table)))
    where = [trial.where for trial in trials]
    evals = sanity.check(parse(_contents(trials, odd), odd), where, odd)
    counts = np.bincount(evals["trial_id"].to_numpy()[evals["believed"].to_numpy()], minlength=len(trials))
    table["evaluations"] = counts
    _metric_columns(evals, table, odd)
    return evals, table


def _contents(trials: list[TrialFolder], odd: Oddities) -> Iterator[tuple[int, str, bytes]]:
    for trial_id, trial in enumerate(trials):
        entry = trial.files.get("eval_measurements.csv")
        if entry is None:
            odd.add("error", trial.where, "no measurements", "no eval_measurements.csv", "the trial has no data")
            continue
        try:
            yield trial_id, trial.where, entry.read()
        except OSError as error:
            odd.add("error", trial.where, "unreadable", str(error.strerror), "the trial has no data")


def _describe(trial: TrialFolder, odd: Oddities) -> dict[str, Any]:
    """One row of the trials table. Of several starts of a run the first file speaks: the settings are the same."""
    meta: dict[str, Any] = {}
    flags: dict[str, Any] = {}
    for prefix, target in (("meta_data_", meta), ("flags_", flags)):
        for name, entry in trial.named(prefix)[:1]:
            target.update(_json(entry.read, trial.where, name, odd))
    hparams: dict[str, Any] = {}
    if "hparams.json" in trial.files:
        hparams = _json(trial.files["hparams.json"].read, trial.where, "hparams.json", odd)
    if not meta and "eval_measurements.csv" in trial.files:
        odd.add(
            "note", trial.where, "no meta_data", "target and budget must come from the data files", "read without"
        )
    row: dict[str, Any] = {
        "submission": trial.submission,
        "study": trial.study,
        "workload": trial.workload,
        "framework": trial.framework,
        "trial": trial.trial,
        "hyperparameters": json.dumps(hparams, sort_keys=True) if hparams else "",
        "where": trial.where,
    }
    for column, name in META.items():
        row[column] = meta.get(f"workload.{name}")
    for column in ("target", "test_target", "budget", "step_hint", "eval_period", "eval_period_steps"):
        row[column] = _number(row[column])
    if np.isfinite(row["eval_period_steps"]):
        row["eval_period"] = np.nan  # a run that evaluates by steps keeps no period in seconds
    row["metric"] = row["metric"] if isinstance(row["metric"], str) else ""
    row["lower_is_better"] = {True: "yes", False: "no"}.get(row["lower_is_better"], "")
    row["max_global_steps"] = _number(flags.get("max_global_steps"))
    row["ruleset"] = str(flags.get("tuning_ruleset") or "")
    row["seed"] = str(meta.get("rng_seed", flags.get("rng_seed", "")))
    sizes = [source[name] for source in (hparams, flags, meta) for name in BATCH_SIZES if name in source]
    row["batch_size"] = _number(sizes[0]) if sizes else np.nan
    return row


def _json(read_bytes: Any, where: str, name: str, odd: Oddities) -> dict[str, Any]:
    try:
        value = json.loads(read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        odd.add("warning", where, "unreadable JSON", f"{name}: {type(error).__name__}", "read as if absent")
        return {}
    if not isinstance(value, dict):
        odd.add("warning", where, "unreadable JSON", f"{name}: not an object", "read as if absent")
        return {}
    return value


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return np.nan


def _metric_columns(evals: pd.DataFrame, trials: pd.DataFrame, odd: Oddities) -> None:
    """Report trials whose target metric is missing, as a column or here and there."""
    for metric, part in trials[trials["metric"] != ""].groupby("metric"):
        ids = part["trial_id"].to_numpy()
        column = f"validation/{metric}"
        mine = np.isin(evals["trial_id"].to_numpy(), ids) & evals["believed"].to_numpy()
        missing = mine.copy() if column not in evals else mine & np.isnan(evals[column].to_numpy())
        if not missing.any():
            continue
        bad = np.bincount(evals["trial_id"].to_numpy()[missing], minlength=len(trials))
        for trial_id in np.flatnonzero(bad):
            where = trials["where"].iloc[trial_id]
            if bad[trial_id] == trials["evaluations"].iloc[trial_id]:
                odd.add("error", where, "no target metric", f"{column} is nowhere a number", "the trial cannot hit")
            else:
                odd.add("note", where, "missing metric", f"{column} is no number", "no hit there", bad[trial_id])


def _named(evals: pd.DataFrame, trials: pd.DataFrame) -> pd.DataFrame:
    """The evaluations with the names of their trials, as categories: a few bytes a row."""
    ids = evals["trial_id"].to_numpy()
    names = {}
    for name in NAMES:
        if name == "trial":
            names[name] = pd.Series(trials[name].to_numpy()[ids], dtype="int32")
        else:
            whole = pd.Categorical(trials[name])
            names[name] = pd.Series(pd.Categorical.from_codes(whole.codes[ids], dtype=whole.dtype))
    return pd.concat([pd.DataFrame(names), evals], axis=1)


def metrics_of(evals: pd.DataFrame) -> list[str]:
    """The metric columns of a table of evaluations."""
    return [name for name in evals.columns if METRIC.fullmatch(str(name))]
