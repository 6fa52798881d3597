"""Training in this process, for runs of seconds, of which starting a process for each would be a large part."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from benchmarks.step_time import Run
from workloads.runner.submission import load
from workloads.workload import Workload


def start(path: Path, workload: Workload, point: Mapping[str, object], seed: int) -> Run:
    """A run before its first step, on one thread.

    Args:
        path: of the submission.
        workload: in PyTorch.
        point: hyperparameters that replace the submission's own.
        seed: of weights and batches.
    """
    torch.set_num_threads(1)
    submission, rng = load(str(path)), np.array([seed, 0])
    params, model_state = workload.init_model_fn(rng)
    state = submission.init_optimizer_state(workload, params, model_state, point, rng)
    queue = workload._build_input_queue(rng, "train", "", workload.batch_size)
    return Run(submission, workload, queue, state, params, model_state, point)


def train(run: Run, steps: int, seed: int, *, every: int) -> tuple[list[list[float]], float]:
    """Trains to the end of the schedule.

    Args:
        run: from `start`, with the same seed.
        steps: of the schedule.
        seed: of the run.
        every: steps between evaluations; there is one at the end, too.

    Returns:
        Steps and validation losses of the evaluations, and CPU seconds of a step, a mean.
    """
    curve, seconds, workload = [], 0.0, run.workload
    rng = np.array([seed, 0])
    for step in range(steps):
        begin = time.process_time()
        run.step(step, np.array([seed, step]))
        seconds += time.process_time() - begin
        if (step + 1) % every == 0 or step + 1 == steps:
            found = workload._eval_model_on_split(
                "validation",
                workload.num_validation_examples,
                workload.eval_batch_size,
                run.params,
                run.model_state,
                rng,
                "",
            )
            curve.append([step + 1, float(f"{found['loss']:.5g}")])
    return curve, float(f"{seconds / steps:.4g}")
