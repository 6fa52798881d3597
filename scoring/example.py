"""A small set of logs, for documentation and for trying things out."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from scoring.judge.versions import load

# Seconds to the target, in each of three studies.
SECONDS = {"fast": {"ogbg": 4000.0, "wmt": 3000.0}, "slow": {"ogbg": 4000.0, "wmt": 6000.0}}
EVALUATIONS = 4
SECONDS_PER_STEP = 0.2


def write(folder: str | Path | None = None) -> Path:
    """Write two submissions on two workloads of AlgoPerf 1.0, in a new temporary folder by default."""
    root = Path(folder) if folder is not None else Path(tempfile.mkdtemp(prefix="scoring_example_"))
    rules = load("1.0", "self")
    for submission, workloads in SECONDS.items():
        for workload, seconds in workloads.items():
            target = rules.targets[workload]
            for study in range(rules.studies):
                home = root / submission / f"study_{study}" / f"{workload}_jax" / "trial_1"
                home.mkdir(parents=True, exist_ok=True)
                lines = [f"accumulated_submission_time,global_step,score,{target.column}"]
                for k in range(1, EVALUATIONS + 1):
                    time = seconds * k / EVALUATIONS
                    # A linear approach to the target, which the last evaluation reaches.
                    value = target.value * (k / EVALUATIONS if target.higher_is_better else 2 - k / EVALUATIONS)
                    lines.append(f"{time},{round(time / SECONDS_PER_STEP)},{time},{value!r}")
                (home / "eval_measurements.csv").write_text("\n".join(lines) + "\n")
                meta = {
                    "workload.target_metric_name": target.metric,
                    "workload.validation_target_value": target.value,
                    "workload.max_allowed_runtime_sec": target.budget,
                    "workload.step_hint": target.step_hint,
                }
                (home / "meta_data_0.json").write_text(json.dumps(meta))
    return root
