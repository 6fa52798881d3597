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
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from commands import errors
from commands.arguments import Parser
from submissions.common.api import Hyperparameters, Tree
from submissions.registry import path_of
from workloads import registry
from workloads.data.queue import BatchQueue
from workloads.runner.submission import Submission, load
from workloads.workload import Workload

SUBMISSIONS = ("nadamw", "kfac_reduce", "kfac_expand")
SKIPPED = 20


@dataclass
class Run:
    """A submission in training."""

    submission: Submission
    workload: Workload
    queue: BatchQueue
    state: Tree
    params: Tree
    model_state: Tree
    # Its own point, but for what self-tuning changes: there the clock has a say.
    hyperparameters: Hyperparameters = field(default_factory=dict)

    def step(self, number: int, rng: np.ndarray) -> None:
        """Draws a batch and makes a step."""
        batch = self.submission.data_selection(
            self.workload, self.queue, self.state, self.params, None, None, number, None
        )
        self.state, self.params, self.model_state = self.submission.update_params(
            workload=self.workload,
            current_param_container=self.params,
            current_params_types=self.workload.model_params_types,
            model_state=self.model_state,
            hyperparameters=self.hyperparameters,
            batch=batch,
            loss_type=self.workload.loss_type,
            optimizer_state=self.state,
            eval_results=[],
            global_step=number,
            rng=rng,
        )


def measure(workload_name: str, framework: str, steps: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Milliseconds of each step, and in JAX the seconds of compilation, by submission."""
    runs: dict[str, Run] = {}
    startup = dict.fromkeys(SUBMISSIONS, 0.0)
    first: dict[str, list[float]] = {name: [] for name in SUBMISSIONS}
    finished = _barrier(framework)
    dtype = np.uint32 if framework == "jax" else np.int64
    for name in SUBMISSIONS:
        submission = load(str(path_of(name, framework)))
        workload = registry.load(workload_name, framework)
        rng = np.array([1, 2], dtype=dtype)
        params, model_state = workload.init_model_fn(rng)
        start = time.perf_counter()
        state = submission.init_optimizer_state(workload, params, model_state, {}, rng)
        finished(state[0] if framework == "jax" else state)
        startup[name] = time.perf_counter() - start
        queue = workload._build_input_queue(rng, "train", "", submission.get_batch_size(workload_name))
        runs[name] = Run(submission, workload, queue, state, params, model_state)
    times: dict[str, list[float]] = {name: [] for name in SUBMISSIONS}
    for step in range(SKIPPED + steps):
        for name, run in runs.items():
            start = time.perf_counter()
            run.step(step, np.array([step, 0], dtype=dtype))
            finished(run.params)
            (times if step >= SKIPPED else first)[name].append(1000 * (time.perf_counter() - start))
    if framework == "jax":
        for name in SUBMISSIONS:
            startup[name] += sum(first[name]) / 1000 - SKIPPED * statistics.median(times[name]) / 1000
    return times, startup if framework == "jax" else {}


def _barrier(framework: str) -> Callable[[Tree], object]:
    """What waits for the device."""
    if framework == "jax":
        import jax

        return jax.block_until_ready
    import torch

    return (lambda _: torch.cuda.synchronize()) if torch.cuda.is_available() else (lambda _: None)


def main() -> int:
    """Runs with the command line's arguments; returns the exit code."""
    parser = Parser("python -m benchmarks.step_time", __doc__)
    parser.add_argument("--framework", default="pytorch", choices=("pytorch", "jax"))
    parser.add_argument("--workloads", default=",".join(registry.BASES), help="comma-separated names")
    parser.add_argument("--steps", type=int, default=120, help="measured steps of each submission")
    return errors.run(lambda: _run(parser.parse_args()))


def _run(args: argparse.Namespace) -> None:
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
    sys.exit(main())
