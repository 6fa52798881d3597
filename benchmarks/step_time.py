"""What a K-FAC step costs beside a NadamW step, measured in turns in one process.

    OMP_NUM_THREADS=1 python -m benchmarks.step_time --framework=pytorch --steps=120
    OMP_NUM_THREADS=1 python -m benchmarks.step_time --compile --processor --workloads=mnist_vit,bible_lm --steps=72

Each submission trains its own copy of the workload's model with its own defaults; the submissions take turns step
by step, so that a busy moment of the machine hits all of them. The first steps, in which K-FAC takes statistics at
every step or refreshes all layers at once, are left out. Prints median and mean ms per step and their ratios to
NadamW; the mean holds the statistics and refresh steps in full where the steps are a multiple of 24, the longest
refresh interval of these submissions. With `--processor` times are of the processor, which other programs beside it
lengthen less than those of the clock. In JAX also the seconds of compilation of a whole run, tracing and lowering
included, and their ratio: what init_optimizer_state and the first steps take beyond a median step each.

`--compile` has torch.compile compile the models, as AlgoPerf's runner does. K-FAC then takes its statistics in
compiled graphs, and once more, as a run of its own, in steps that run uncompiled; K-FAC-reduce also with statistics
at every step. The column "every" says how many steps lie between statistics, "statistics steps" what the optimizer
says of them; the last two are of statistics steps alone, refreshes included, beside NadamW's median. Runs share the
compiled graph of plain steps. With TORCHINDUCTOR_COMPILE_THREADS=1 inductor starts no processes of its own.
`--out=docs/generated/compiled_step_time.md` keeps the table.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np

from commands import errors
from commands.arguments import Parser
from commands.atomic import write_text
from commands.errors import UserError, tell
from submissions.common.api import Hyperparameters, Tree
from submissions.registry import path_of
from workloads import registry
from workloads.data.queue import BatchQueue
from workloads.runner.submission import Submission, load
from workloads.workload import Workload

BACKENDS = ("inductor", "aot_eager", "eager")
SKIPPED = 24  # K-FAC-expand refreshes all layers at once up to there


@dataclass(frozen=True)
class Point:
    """What is measured.

    Attributes:
        submission: its name.
        changes: of its hyperparameters.
        in_graphs: whether statistics of compiled models may be taken in compiled graphs.
    """

    submission: str
    changes: Hyperparameters = field(default_factory=dict)
    in_graphs: bool = True


POINTS = tuple(map(Point, ("nadamw", "kfac_reduce", "kfac_expand")))
EVERY_STEP: Hyperparameters = {"factor_interval": 1}
COMPILED = (
    POINTS[0],
    *(
        Point(name, changes, in_graphs)
        for name, changes in (("kfac_reduce", {}), ("kfac_expand", {}), ("kfac_reduce", EVERY_STEP))
        for in_graphs in (True, False)
    ),
)


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


@dataclass
class Times:
    """What was measured of a point.

    Attributes:
        steps: milliseconds of each step.
        taking: of those that took statistics.
        startup: seconds of compilation, in JAX.
        note: what the optimizer says of its statistics steps, where the model is compiled.
        every: steps between statistics.
    """

    steps: list[float] = field(default_factory=list)
    taking: list[float] = field(default_factory=list)
    startup: float = 0.0
    note: str = ""
    every: int | None = None


def measure(
    workload_name: str,
    framework: str,
    steps: int,
    points: tuple[Point, ...],
    compiler: str | None,
    clock: Callable[[], float],
) -> list[Times]:
    """Steps of each point, in turns.

    Args:
        workload_name, framework: what is trained.
        steps: measured ones of each point.
        points: of which the first is what others are compared with.
        compiler: the backend of torch.compile; None for models that are not compiled.
        clock: gives seconds.
    """
    runs: list[Run] = []
    found = [Times() for _ in points]
    first: list[list[float]] = [[] for _ in points]
    finished = _barrier(framework)
    dtype = np.uint32 if framework == "jax" else np.int64
    for point, times in zip(points, found, strict=True):
        run, times.startup = _started(
            workload_name, framework, point, compiler, clock, np.array([1, 2], dtype=dtype)
        )
        runs.append(run)
    with _graphs_for_all(compiler):
        for step in range(SKIPPED + steps):
            for run, times, early in zip(runs, found, first, strict=True):
                takes = framework == "pytorch" and getattr(run.state["optimizer"], "is_statistics_step", False)
                start = clock()
                run.step(step, np.array([step, 0], dtype=dtype))
                finished(run.params)
                spent = 1000 * (clock() - start)
                (times.steps if step >= SKIPPED else early).append(spent)
                times.taking += [spent] * (takes and step >= SKIPPED)
    for run, times, early in zip(runs, found, first, strict=True):
        if framework == "jax":
            times.startup += sum(early) / 1000 - SKIPPED * statistics.median(times.steps) / 1000
        elif hasattr(run.state["optimizer"], "coverage"):
            times.note = run.state["optimizer"].coverage().note or ""
            times.every = run.state["optimizer"].config.factor_interval
    return found


def _started(
    workload_name: str,
    framework: str,
    point: Point,
    compiler: str | None,
    clock: Callable[[], float],
    rng: np.ndarray,
) -> tuple[Run, float]:
    """A submission at a point, ready to train, and the seconds that its init_optimizer_state took."""
    submission = load(str(path_of(point.submission, framework)))
    workload = registry.load(workload_name, framework)
    params, model_state = workload.init_model_fn(rng)
    with contextlib.ExitStack() as stack:
        if compiler is not None:
            import torch

            from submissions.common.kfac import pytorch

            params = torch.compile(params, backend=compiler)
            made = functools.partial(pytorch.KFAC, compiled_statistics=point.in_graphs)
            stack.enter_context(mock.patch.object(pytorch, "KFAC", made))
        start = clock()
        state = submission.init_optimizer_state(workload, params, model_state, point.changes, rng)
        _barrier(framework)(state[0] if framework == "jax" else state)
        seconds = clock() - start
    queue = workload._build_input_queue(rng, "train", "", submission.get_batch_size(workload_name))
    return Run(submission, workload, queue, state, params, model_state, point.changes), seconds


def _graphs_for_all(compiler: str | None) -> contextlib.AbstractContextManager[None]:
    """Has dynamo keep the graphs of all runs: it counts those of one class of models together."""
    if compiler is None:
        return contextlib.nullcontext()
    import torch

    patched: contextlib.AbstractContextManager[None] = torch._dynamo.config.patch(recompile_limit=64)
    return patched


def _barrier(framework: str) -> Callable[[Tree], object]:
    """What waits for the device."""
    if framework == "jax":
        import jax

        return jax.block_until_ready
    import torch

    return (lambda _: torch.cuda.synchronize()) if torch.cuda.is_available() else (lambda _: None)


def rows(workload: str, points: tuple[Point, ...], found: list[Times], framework: str) -> list[str]:
    """Lines of the table."""
    lines = []
    base = found[0]
    compiled = any(times.note for times in found)
    for point, times in zip(points, found, strict=True):
        cells = [workload, point.submission]
        if compiled:
            said = times.note.removeprefix("statistics steps run ")
            cells += ["" if times.every is None else str(times.every), said]
        for of in (statistics.median, statistics.fmean):
            cells += [f"{of(times.steps):.1f}", f"{of(times.steps) / of(base.steps):.2f}"]
        if compiled:
            median = statistics.median(times.taking) if times.taking else None
            of_base = statistics.median(base.steps)
            cells += ["", ""] if median is None else [f"{median:.1f}", f"{median / of_base:.2f}"]
        if framework == "jax":
            cells += [f"{times.startup:.1f}", f"{times.startup / base.startup:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Runs with these arguments, the command line's if None; returns the exit code."""
    parser = Parser("python -m benchmarks.step_time", __doc__)
    parser.add_argument("--framework", default="pytorch", choices=("pytorch", "jax"))
    parser.add_argument("--workloads", default=",".join(registry.BASES), help="comma-separated names")
    parser.add_argument("--steps", type=int, default=120, help="measured steps of each submission")
    parser.add_argument(
        "--compile",
        nargs="?",
        const=BACKENDS[0],
        choices=BACKENDS,
        help=f"have torch.compile compile the models; its backend, {BACKENDS[0]} if none is given",
    )
    parser.add_argument("--processor", action="store_true", help="seconds of the processor, not of the clock")
    parser.add_argument("--out", help="a file that gets the table")
    return errors.run(lambda: _run(parser.parse_args(argv)))


def _run(args: argparse.Namespace) -> None:
    if args.compile and args.framework != "pytorch":
        raise UserError("--compile is for --framework=pytorch; leave it out.")
    points = COMPILED if args.compile else POINTS
    columns = ["workload", "submission", "median ms", "ratio", "mean ms", "ratio"]
    if args.compile:
        columns[2:2] = ["every", "statistics steps"]
        columns += ["median ms with statistics", "ratio"]
    if args.framework == "jax":
        columns += ["compile s", "ratio"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    tell("\n".join(lines))
    for workload in args.workloads.split(","):
        clock = time.process_time if args.processor else time.perf_counter
        found = measure(workload, args.framework, args.steps, points, args.compile, clock)
        for line in rows(workload, points, found, args.framework):
            lines.append(line)
            tell(line)
    if args.out:
        write_text(Path(args.out), _head(args) + "\n".join(lines) + "\n")


def _head(args: argparse.Namespace) -> str:
    """What stands above the table: how it was made."""
    module = importlib.import_module("torch" if args.framework == "pytorch" else "jax")
    given = [f"--workloads={args.workloads}", f"--steps={args.steps}"]
    given += [f"--framework={args.framework}"] if args.framework != "pytorch" else []
    given += [f"--compile={args.compile}"] if args.compile else []
    given += ["--processor"] if args.processor else []
    command = f"python -m benchmarks.step_time {' '.join(given)} --out=..."
    return (
        f"# What a K-FAC step costs beside NadamW's{', compiled' if args.compile else ''}\n\n"
        f"Written by `{command}` at {module.__name__} {module.__version__}; the module says how it is measured.\n"
        "Ratios are to NadamW's steps on the same workload in the same run, medians to medians, means to means.\n\n"
    )


if __name__ == "__main__":
    sys.exit(main())
