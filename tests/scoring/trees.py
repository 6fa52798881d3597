"""Makes run directories as the runner leaves them, with learning curves that look like real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

META: dict[str, dict[str, Any]] = {
    "mnist_vit": {
        "target_metric_name": "accuracy",
        "validation_target_value": 0.93,
        "test_target_value": 0.92,
        "lower_is_better": False,
        "step_hint": 400,
        "max_allowed_runtime_sec": 600,
        "eval_period_time_sec": 5,
        "eval_period_steps": 10,
    },
    "bible_lm": {
        "target_metric_name": "loss",
        "validation_target_value": 1.7,
        "test_target_value": 1.72,
        "lower_is_better": True,
        "step_hint": 600,
        "max_allowed_runtime_sec": 900,
        "eval_period_time_sec": 5,
        "eval_period_steps": 10,
    },
}


def curve(
    workload: str, speed: float, seed: int = 0, steps: int | None = None, ms: float = 120.0, every: int = 10
) -> pd.DataFrame:
    """The eval_measurements of one trial; ``speed`` scales how fast the metric approaches its limit."""
    meta = META[workload]
    generator = np.random.default_rng(seed)
    last = steps or meta["step_hint"]
    step = np.concatenate([[1], np.arange(every, last + 1, every)]).astype(float)
    progress = 1 - np.exp(-4 * speed * step / meta["step_hint"])
    noise = generator.normal(0, 0.003, len(step))
    time = np.cumsum(np.diff(step, prepend=0) * ms / 1e3 * generator.uniform(0.95, 1.05, len(step)))
    if meta["target_metric_name"] == "accuracy":
        value = np.clip(0.1 + 0.86 * progress + noise, 0, 1)
        metrics = {"accuracy": value, "loss": 2.3 - 2 * progress}
    else:
        value = 4.2 - 2.7 * progress + noise
        metrics = {"loss": value}
    columns: dict[str, npt.NDArray[np.float64]] = {
        "accumulated_eval_time": 0.3 * np.arange(1, len(step) + 1),
        "accumulated_logging_time": 0.01 * np.arange(len(step)),
        "accumulated_submission_time": time,
        "global_step": step.astype(int),
        "preemption_count": np.zeros(len(step), dtype=int),
        "score": time,
        "total_duration": time + 0.31 * np.arange(1, len(step) + 1) + 1.0,
    }
    for split, shift in (("test", 0.005), ("train", -0.005), ("validation", 0.0)):
        for name, values in metrics.items():
            columns[f"{split}/{name}"] = values if split == "validation" else np.abs(values + shift).clip(0, 10)
        if split != "train":
            columns[f"{split}/num_examples"] = np.full(len(step), 1000)
        if metrics.keys() >= {"accuracy"}:
            columns[f"{split}/accuracy"] = columns[f"{split}/accuracy"].clip(0, 1)
    return pd.DataFrame({name: columns[name] for name in sorted(columns)})


def write_trial(
    folder: Path, workload: str, rows: pd.DataFrame | None, meta: dict[str, Any] | None = None, **hparams: float
) -> Path:
    """One trial directory. ``rows=None`` leaves out the measurements."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "hparams.json").write_text(json.dumps(hparams or {"learning_rate": 1e-3, "beta2": 0.999}))
    known = META.get(workload, {}) if meta is None else meta
    (folder / "meta_data_0.json").write_text(
        json.dumps({f"workload.{key}": value for key, value in known.items()} | {"rng_seed": 1})
    )
    (folder / "flags_0.json").write_text(json.dumps({"workload": workload, "tuning_ruleset": "external"}))
    if rows is not None:
        rows.to_csv(folder / "eval_measurements.csv", index=False)
    return folder


def write_runs(
    root: Path, speeds: dict[str, float], studies: int = 3, workloads: tuple[str, ...] = ("mnist_vit", "bible_lm")
) -> Path:
    """``root/<algorithm>/study_<j>/<workload>_pytorch/trial_1`` for algorithms of the given speeds."""
    for number, (name, speed) in enumerate(speeds.items()):
        for study in range(studies):
            for workload in workloads:
                rows = curve(workload, speed, seed=10 * number + study, ms=100.0 + 20 * number)
                write_trial(root / name / f"study_{study}" / f"{workload}_pytorch" / "trial_1", workload, rows)
    return root


def plain(workload: str = "bible_lm", rows: int = 10, slope: float = 0.04, ms: float = 1000.0) -> pd.DataFrame:
    """Ten evaluations whose figures are easy to check: bible_lm reaches 1.7 at step 70 after 70 s."""
    step = np.arange(10, 10 * rows + 1, 10)
    time = step * ms / 1e3
    return pd.DataFrame(
        {
            "accumulated_eval_time": 1.0 * np.arange(1, rows + 1),
            "accumulated_logging_time": np.zeros(rows),
            "accumulated_submission_time": time,
            "global_step": step,
            "preemption_count": np.zeros(rows, dtype=int),
            "score": time,
            "total_duration": time + np.arange(1, rows + 1) + 5.0,
            "train/loss": 4.2 - slope * step,
            "validation/loss": 4.2 - slope * step,
            "validation/num_examples": np.full(rows, 1000),
        }
    )


def official_meta(workload: str, version: str = "0.5") -> dict[str, Any]:
    """The meta_data an official run of a workload writes."""
    path = Path(__file__).resolve().parents[2] / "scoring" / "data" / f"algoperf_{version}.json"
    known = json.loads(path.read_text())["workloads"][workload]
    return {
        "target_metric_name": known["metric"],
        "validation_target_value": known["target"],
        "test_target_value": known["test_target"],
        "step_hint": known["step_hint"],
        "max_allowed_runtime_sec": known["budget"],
        "eval_period_time_sec": known["eval_period"],
    }


def official_rows(workload: str, hit: float | None, version: str = "0.5", misses: int = 2) -> pd.DataFrame:
    """A trial that reaches its target at time ``hit`` after some misses, or runs to the end of its budget."""
    meta = official_meta(workload, version)
    target = meta["validation_target_value"]
    upward = meta["target_metric_name"] in ("accuracy", "ssim", "bleu", "mean_average_precision")
    worse = target * (0.9 if upward else 1.1)
    end = hit if hit is not None else 0.999 * meta["max_allowed_runtime_sec"]
    time = np.linspace(end / (misses + 1), end, misses + 1)
    value = np.full(misses + 1, worse)
    if hit is not None:
        value[-1] = target
    step = np.round(time / meta["max_allowed_runtime_sec"] * meta["step_hint"])
    return pd.DataFrame(
        {
            "accumulated_submission_time": time,
            "global_step": np.maximum(step, np.arange(1, misses + 2)).astype(int),
            "preemption_count": 0,
            "score": time,
            "total_duration": 2 * time,
            f"validation/{meta['target_metric_name']}": value,
        }
    )


def write_official(
    root: Path, hits: dict[str, dict[str, list[float | None]]], version: str = "0.5", framework: str = "jax"
) -> Path:
    """``hits[submission][workload]`` lists the time to target of each study (one trial each), None for a miss."""
    for submission, workloads in hits.items():
        for workload, times in workloads.items():
            for study, time in enumerate(times):
                folder = root / submission / f"study_{study}" / f"{workload}_{framework}" / "trial_1"
                write_trial(
                    folder, workload, official_rows(workload, time, version), official_meta(workload, version)
                )
    return root
