"""Where the CPU time of a K-FAC step goes, beside that of a NadamW step in the same process.

    OMP_NUM_THREADS=1 python -m benchmarks.step_profile --workloads=mnist_vit --steps=60 --label=after

Submissions take turns step by step, each with its own copy of the workload's model, as in `benchmarks.step_time`;
times are of the processor, which a busy machine lengthens less than those of the clock. Phases do not contain each
other: "model" is forward and backward pass, clipping and the watching of operations on statistics steps. Ratios are
of medians; "slowest" is the 99th percentile over the median. The table replaces the section of its label.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from algoperf_kfac.pytorch import capture, curvature, distributed, optimizer
from algoperf_kfac.pytorch.recorder import Recorder
from benchmarks.step_time import Run
from commands import errors
from commands.arguments import Parser
from commands.atomic import write_text
from submissions.registry import path_of
from workloads import registry
from workloads.runner.submission import load

# By name: the submission, and what is changed of its point.
POINTS: dict[str, tuple[str, dict[str, object]]] = {
    "nadamw": ("nadamw", {}),
    "kfac_reduce": ("kfac_reduce", {}),
    "kfac_expand": ("kfac_expand", {}),
    "muon": ("muon", {}),
}
PHASES: dict[str, list[tuple[Any, str]]] = {
    "statistics": [(Recorder, "input"), (Recorder, "output_gradient"), (capture.Capture, "_collect")],
    "averages": [(curvature, "move_averages")],
    "refresh": [(distributed, "refresh")],
    "NadamW's part": [(optimizer, "first_order")],
    "K-FAC directions": [(optimizer, "second_order")],
}
SKIPPED = 10  # the first steps take statistics and refresh at every one


class Watch:
    """Milliseconds of the processor by phase, of the step at hand."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = collections.defaultdict(float)

    def times(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time added to the phase."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.spent[phase] += 1000 * (time.process_time() - start)

        return timed


def start(workload_name: str, point: str) -> Run:
    """A submission at a point, ready to train."""
    name, changes = POINTS[point]
    submission, workload = load(str(path_of(name, "pytorch"))), registry.load(workload_name, "pytorch")
    rng = np.array([1, 2])
    params, model_state = workload.init_model_fn(rng)
    state = submission.init_optimizer_state(workload, params, model_state, changes, rng)
    queue = workload._build_input_queue(rng, "train", "", submission.get_batch_size(workload_name))
    return Run(submission, workload, queue, state, params, model_state, changes)


def measure(workload: str, steps: int) -> dict[str, list[dict[str, float]]]:
    """By point, the milliseconds of each step by phase; "step" is all of it."""
    watch = Watch()
    with contextlib.ExitStack() as stack:
        for phase, functions in PHASES.items():
            for owner, name in functions:
                stack.enter_context(mock.patch.object(owner, name, watch.times(phase, getattr(owner, name))))
        return _in_turns(workload, steps, watch)


def _in_turns(workload: str, steps: int, watch: Watch) -> dict[str, list[dict[str, float]]]:
    """The steps of all points, their phases told apart by a watch that times them."""
    runs = {point: start(workload, point) for point in POINTS}
    found: dict[str, list[dict[str, float]]] = {point: [] for point in POINTS}
    for number in range(SKIPPED + steps):
        for point, run in runs.items():
            watch.spent.clear()
            watch.times("step", run.step)(number, np.array([number, 0]))
            if number >= SKIPPED:
                found[point].append(dict(watch.spent))
    return found


def row(workload: str, point: str, steps: list[dict[str, float]], of_nadamw: float) -> str:
    """A line of the table: ratios to a NadamW step, and the mean share of each phase in one."""
    total = [step["step"] for step in steps]
    median = statistics.median(total)
    phases = [statistics.fmean(step.get(phase, 0.0) for step in steps) for phase in PHASES]
    shares = [max(0.0, statistics.fmean(total) - sum(phases)), *phases]
    cells = [
        *(workload, point, f"{median:.1f}", f"{median / of_nadamw:.2f}"),
        *(f"{statistics.fmean(total) / of_nadamw:.2f}", f"{float(np.quantile(total, 0.99)) / median:.1f}"),
        *(f"{share / of_nadamw:.2f}" for share in shares),
    ]
    return f"| {' | '.join(cells)} |"


def replaced(text: str, label: str, lines: list[str]) -> str:
    """A page with a section of this label, in the place of the one that it may have had."""
    title = f"## {label}\n"
    before, _, rest = text.partition(title)
    _, mark, behind = rest.partition("\n## ")
    section = title + "\n" + "\n".join(lines) + "\n"
    return f"{before.rstrip()}\n\n{section}" + (f"{mark}{behind}" if mark else "")


def main() -> int:
    """Runs with the command line's arguments; returns the exit code."""
    parser = Parser("python -m benchmarks.step_profile", __doc__)
    parser.add_argument("--workloads", default="mnist_vit,bible_lm,molecules_gnn", help="comma-separated names")
    parser.add_argument("--steps", type=int, default=60, help="measured steps of each submission")
    parser.add_argument("--label", default="now", help="of the section that is written")
    parser.add_argument("--output", default="docs/generated/step_profile.md", help="the file")
    return errors.run(lambda: _run(parser.parse_args()))


def _run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    columns = ["workload", "point", "median ms", "ratio", "mean ratio", "slowest", "model", *PHASES]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for workload in args.workloads.split(","):
        found: Mapping[str, list[dict[str, float]]] = measure(workload, args.steps)
        of_nadamw = statistics.median(step["step"] for step in found["nadamw"])
        lines += [row(workload, point, steps, of_nadamw) for point, steps in found.items()]
    print("\n".join(lines))
    path = Path(args.output)
    old = path.read_text() if path.exists() else HEAD
    write_text(path, replaced(old, args.label, lines))


HEAD = """# Where a step's time goes

Written by `python -m benchmarks.step_profile`, which says how it is measured. Columns behind "slowest" are mean
times of a step in NadamW steps (median).
"""

if __name__ == "__main__":
    sys.exit(main())
