"""What a K-FAC step costs beside a NadamW step, measured in turns in one process.

    OMP_NUM_THREADS=1 python -m benchmarks.step_time --steps=120

Each submission trains its own copy of the workload's model with its own defaults; the submissions take turns step
by step, so that a busy moment of the machine hits all of them. The first steps, in which K-FAC takes statistics at
every step, are left out. Prints median and mean ms per step and their ratios to NadamW; the mean holds the
statistics and refresh steps in full.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from typing import Any

import numpy as np
import torch

from workloads import registry

SUBMISSIONS = ("nadamw", "kfac_reduce", "kfac_expand")
SKIPPED = 20


def measure(workload_name: str, steps: int) -> dict[str, list[float]]:
    """Milliseconds of each step, by submission."""
    runs: dict[str, dict[str, Any]] = {}
    for name in SUBMISSIONS:
        submission = importlib.import_module(f"submissions.{name}.pytorch.submission")
        workload = registry.load(workload_name, "pytorch")
        rng = np.array([1, 2], dtype=np.int64)
        model, model_state = workload.init_model_fn(rng)
        state = submission.init_optimizer_state(workload, model, model_state, None, rng)
        batch_size = submission.get_batch_size(workload_name)
        queue = workload._build_input_queue(rng, "train", "", batch_size)
        runs[name] = {
            "submission": submission,
            "workload": workload,
            "model": model,
            "state": state,
            "queue": queue,
        }
    times: dict[str, list[float]] = {name: [] for name in SUBMISSIONS}
    for step in range(SKIPPED + steps):
        for name, run in runs.items():
            start = time.perf_counter()
            batch = run["submission"].data_selection(
                run["workload"], run["queue"], run["state"], run["model"], None, None, step, None
            )
            run["state"], run["model"], _ = run["submission"].update_params(
                workload=run["workload"],
                current_param_container=run["model"],
                current_params_types=run["workload"].model_params_types,
                model_state=None,
                hyperparameters=None,
                batch=batch,
                loss_type=run["workload"].loss_type,
                optimizer_state=run["state"],
                eval_results=[],
                global_step=step,
                rng=np.array([step, 0], dtype=np.int64),
            )
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if step >= SKIPPED:
                times[name].append(1000 * (time.perf_counter() - start))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default=",".join(registry.WORKLOADS), help="comma-separated names")
    parser.add_argument("--steps", type=int, default=120, help="measured steps of each submission")
    args = parser.parse_args()
    print("| workload | submission | median ms | ratio | mean ms | ratio |")
    print("|---|---|---|---|---|---|")
    for workload in args.workloads.split(","):
        times = measure(workload, args.steps)
        median = {name: statistics.median(ms) for name, ms in times.items()}
        mean = {name: statistics.fmean(ms) for name, ms in times.items()}
        for name in SUBMISSIONS:
            print(
                f"| {workload} | {name} | {median[name]:.1f} | {median[name] / median['nadamw']:.2f} "
                f"| {mean[name]:.1f} | {mean[name] / mean['nadamw']:.2f} |"
            )


if __name__ == "__main__":
    main()
