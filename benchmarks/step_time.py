"""What a K-FAC step costs beside a NadamW step, measured in turns in one process.

    OMP_NUM_THREADS=1 python -m benchmarks.step_time --framework=pytorch --steps=120

Each submission trains its own copy of the workload's model with its own defaults; the submissions take turns step
by step, so that a busy moment of the machine hits all of them. The first steps, in which K-FAC takes statistics at
every step, are left out. Prints median and mean ms per step and their ratios to NadamW; the mean holds the
statistics and refresh steps in full. In JAX also the seconds of compilation of a whole run, tracing and lowering
included, and their ratio: what init_optimizer_state and the first steps take beyond a median step each.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from typing import Any

import numpy as np

from workloads import registry

SUBMISSIONS = ("nadamw", "kfac_reduce", "kfac_expand")
SKIPPED = 20


def measure(workload_name: str, framework: str, steps: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Milliseconds of each step, and in JAX the seconds of compilation, by submission."""
    runs: dict[str, dict[str, Any]] = {}
    startup = dict.fromkeys(SUBMISSIONS, 0.0)
    first: dict[str, list[float]] = {name: [] for name in SUBMISSIONS}
    finished = _barrier(framework)
    for name in SUBMISSIONS:
        submission = importlib.import_module(f"submissions.{name}.{framework}.submission")
        workload = registry.load(workload_name, framework)
        rng = np.array([1, 2], dtype=np.uint32 if framework == "jax" else np.int64)
        params, model_state = workload.init_model_fn(rng)
        start = time.perf_counter()
        state = submission.init_optimizer_state(workload, params, model_state, None, rng)
        finished(state[0] if framework == "jax" else state)
        startup[name] = time.perf_counter() - start
        batch_size = submission.get_batch_size(workload_name)
        queue = workload._build_input_queue(rng, "train", "", batch_size)
        runs[name] = {
            "submission": submission,
            "workload": workload,
            "params": params,
            "model_state": model_state,
            "state": state,
            "queue": queue,
        }
    times: dict[str, list[float]] = {name: [] for name in SUBMISSIONS}
    for step in range(SKIPPED + steps):
        for name, run in runs.items():
            start = time.perf_counter()
            batch = run["submission"].data_selection(
                run["workload"], run["queue"], run["state"], run["params"], None, None, step, None
            )
            run["state"], run["params"], run["model_state"] = run["submission"].update_params(
                workload=run["workload"],
                current_param_container=run["params"],
                current_params_types=run["workload"].model_params_types,
                model_state=run["model_state"],
                hyperparameters=None,
                batch=batch,
                loss_type=run["workload"].loss_type,
                optimizer_state=run["state"],
                eval_results=[],
                global_step=step,
                rng=np.array([step, 0], dtype=rng.dtype),
            )
            finished(run["params"])
            (times if step >= SKIPPED else first)[name].append(1000 * (time.perf_counter() - start))
    if framework == "jax":
        for name in SUBMISSIONS:
            startup[name] += sum(first[name]) / 1000 - SKIPPED * statistics.median(times[name]) / 1000
    return times, startup if framework == "jax" else {}


def _barrier(framework: str) -> Any:
    """What waits for the device."""
    if framework == "jax":
        import jax

        return jax.block_until_ready
    import torch

    return (lambda _: torch.cuda.synchronize()) if torch.cuda.is_available() else (lambda _: None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", default="pytorch", choices=("pytorch", "jax"))
    parser.add_argument("--workloads", default=",".join(registry.WORKLOADS), help="comma-separated names")
    parser.add_argument("--steps", type=int, default=120, help="measured steps of each submission")
    args = parser.parse_args()
    more = " compile s | ratio |" if args.framework == "jax" else ""
    print(f"| workload | submission | median ms | ratio | mean ms | ratio |{more}")
    print("|---|---|---|---|---|---|" + ("---|---|" if more else ""))
    for workload in args.workloads.split(","):
        times, compile_seconds = measure(workload, args.framework, args.steps)
        median = {name: statistics.median(ms) for name, ms in times.items()}
        mean = {name: statistics.fmean(ms) for name, ms in times.items()}
        for name in SUBMISSIONS:
            row = (
                f"| {workload} | {name} | {median[name]:.1f} | {median[name] / median['nadamw']:.2f} "
                f"| {mean[name]:.1f} | {mean[name] / mean['nadamw']:.2f} |"
            )
            if compile_seconds:
                seconds = compile_seconds[name]
                row += f" {seconds:.1f} | {seconds / compile_seconds['nadamw']:.2f} |"
            print(row, flush=True)


if __name__ == "__main__":
    main()
