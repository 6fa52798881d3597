"""What TF32 changes of K-FAC's directions, emulated: operands of products rounded to its ten bits.

    OMP_NUM_THREADS=1 python -m benchmarks.tf32 --workloads=mnist_vit,bible_lm --steps=16

A GPU that multiplies in TF32 rounds both operands to ten bits behind the point and sums in float32; here that is
done to matrix products (to the nearest, ties away from zero), and the rest is left in float32. At each step every
variant takes the parameters and the batch of a run in float32, and keeps statistics, momentum and decompositions
of its own, all of them since the first step. Its direction is what the step moves a layer's weight by, without
weight decay; its change is the length of the difference over that of the run in float32. Medians and maxima are
over covered weights and steps, without the first ones, at which a head that is zero leaves the rest no gradient.

With `--train=STEPS --seeds=1,2` it trains for so many steps in place of that, to the end of a schedule of that
length, every variant on its own, and compares validation losses.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.pytorch.scalings import polar
from benchmarks import step_profile
from benchmarks.step_time import Run
from commands import errors
from commands.arguments import Parser
from commands.atomic import write_text
from commands.errors import UserError
from submissions.common.kfac.method import POINT
from submissions.registry import path_of
from workloads import registry
from workloads.runner.submission import load

MODEL = "model"  # the phase of all that is none of K-FAC's
PHASES = {name: step_profile.PHASES[name] for name in ("statistics", "refresh", "K-FAC directions")}
PHASES["polar iteration"] = [(polar, "polar")]  # within the directions
# By name: the submission, and what is changed of its point. Without weight decay, which no product makes.
POINTS: dict[str, tuple[str, dict[str, object]]] = {
    "kfac_reduce": ("kfac_reduce", {"weight_decay": 0.0}),
    "kfac_expand": ("kfac_expand", {"weight_decay": 0.0}),
    "defaults": (
        "kfac_expand",
        {field.name: field.default for field in dataclasses.fields(KFACConfig) if field.name in POINT}
        | {"weight_decay": 0.0},
    ),
}
SKIPPED = 2
_aten: Any = torch.ops.aten
PRODUCTS = {
    _aten.mm.default: (0, 1),
    _aten.bmm.default: (0, 1),
    _aten.addmm.default: (1, 2),
    _aten.baddbmm.default: (1, 2),
}
_DECOMPOSED = {_aten._linalg_eigh.default: (0,)}


@dataclasses.dataclass(frozen=True)
class Variant:
    """What is rounded.

    Attributes:
        phases: whose products.
        eigh: the matrices that are decomposed, too.
    """

    phases: frozenset[str]
    eigh: bool = False


PRODUCTS_OF_STEPS = frozenset({"statistics", "K-FAC directions", "polar iteration"})
VARIANTS = {
    "the model's products": Variant(frozenset({MODEL})),
    "statistics": Variant(frozenset({"statistics"})),
    "the polar iteration": Variant(frozenset({"polar iteration"})),
    "directions beside that": Variant(frozenset({"K-FAC directions"})),
    "refreshes": Variant(frozenset({"refresh"})),
    "what is decomposed": Variant(frozenset(), eigh=True),
    "K-FAC with the guard": Variant(PRODUCTS_OF_STEPS),
    "K-FAC without the guard": Variant(PRODUCTS_OF_STEPS | {"refresh"}, eigh=True),
}


TRAINED: dict[str, Variant | None] = {
    "nothing": None,
    "K-FAC with the guard": VARIANTS["K-FAC with the guard"],
    "and the model's products": Variant(PRODUCTS_OF_STEPS | {MODEL}),
    "K-FAC without the guard": VARIANTS["K-FAC without the guard"],
}


def rounded(x: Tensor) -> Tensor:
    """To the ten bits of TF32, to the nearest, ties away from zero; of other precisions than float32 nothing."""
    if x.dtype != torch.float32:
        return x
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


class Emulation(TorchDispatchMode):
    """Rounds the operands of products while a variant says so; hands everything else on.

    Attributes:
        variant: None for float32.
        phase: what the process is at.
        count: products whose operands were rounded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.variant: Variant | None = None
        self.phase = MODEL
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        variant = self.variant
        if variant is not None:
            operands: tuple[int, ...] = PRODUCTS.get(func, ()) if self.phase in variant.phases else ()
            operands = operands or (_DECOMPOSED.get(func, ()) if variant.eigh else ())
            args = [rounded(arg) if i in operands else arg for i, arg in enumerate(args)]
            self.count += bool(operands)
        return func(*args, **(kwargs or {}))

    def within(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, as a phase of its own."""

        def called(*args: Any, **kwargs: Any) -> Any:
            before, self.phase = self.phase, phase
            try:
                return function(*args, **kwargs)
            finally:
                self.phase = before

        return called

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Knows K-FAC's phases from here on."""
        with contextlib.ExitStack() as stack:
            for phase, functions in PHASES.items():
                for owner, name in functions:
                    stack.enter_context(mock.patch.object(owner, name, self.within(phase, getattr(owner, name))))
            stack.enter_context(self)
            yield


def measure(workload: str, point: str, steps: int, variants: Mapping[str, Variant]) -> dict[str, list[float]]:
    """By variant, the changes of the directions of covered weights at all steps."""
    emulation = Emulation()
    changes: dict[str, list[float]] = {name: [] for name in variants}
    with emulation.watching():
        exact = _start(workload, point)
        others = {name: _start(workload, point) for name in variants}
        covered = [f"{layer.name}.weight" for layer in exact.state["optimizer"].coverage().layers]
        for number in range(steps):
            before = _copied(exact.params)
            emulation.variant = None
            moved = _moved(exact, before, number)
            for name, run in others.items():
                with torch.no_grad():
                    for key, parameter in run.params.named_parameters():
                        parameter.copy_(before[key])
                emulation.variant = variants[name]
                own = _moved(run, before, number)
                if number >= SKIPPED:
                    changes[name] += [float((own[k] - moved[k]).norm() / moved[k].norm()) for k in covered]
    return changes


def loss_of(workload_name: str, point: str, steps: int, variant: Variant | None, seed: int) -> float:
    """The validation loss after a schedule of so many steps, evaluated in float32."""
    emulation = Emulation()
    with emulation.watching():
        run = _start(workload_name, point, seed, steps)
        emulation.variant = variant
        for number in range(steps):
            run.step(number, np.array([number, seed]))
        emulation.variant = None
        workload = run.workload
        size = workload.eval_batch_size
        found = workload.eval_model(size, run.params, run.model_state, np.array([1, 2]), "", None, steps)
    return float(found["validation/loss"])


def _start(workload_name: str, point: str, seed: int = 2, steps: int | None = None) -> Run:
    """A submission at a point, ready to train; all of a seed begin alike."""
    name, changes = POINTS[point]
    submission, workload = load(str(path_of(name, "pytorch"))), registry.load(workload_name, "pytorch")
    rng = np.array([1, seed])
    if steps is not None:
        changes = changes | {"horizon_factor": steps / workload.step_hint}
    params, model_state = workload.init_model_fn(rng)
    state = submission.init_optimizer_state(workload, params, model_state, changes, rng)
    queue = workload._build_input_queue(rng, "train", "", submission.get_batch_size(workload_name))
    return Run(submission, workload, queue, state, params, model_state, changes)


def _copied(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _moved(run: Run, before: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """A step, and what it moved the parameters by."""
    run.step(number, np.array([number, 0]))
    return {name: parameter.detach() - before[name] for name, parameter in run.params.named_parameters()}


def main() -> int:
    """Runs with the command line's arguments; returns the exit code."""
    parser = Parser("python -m benchmarks.tf32", __doc__)
    parser.add_argument("--workloads", default="mnist_vit,bible_lm", help="comma-separated names")
    parser.add_argument("--steps", type=int, default=16, help="of each run")
    parser.add_argument("--points", default=",".join(POINTS), help="comma-separated")
    parser.add_argument("--train", type=int, metavar="STEPS", help="train for so many steps, and compare losses")
    parser.add_argument("--seeds", default="1,2", help="of --train, comma-separated")
    parser.add_argument("--output", default="docs/generated/tf32.md", help="the file")
    return errors.run(lambda: _run(parser.parse_args()))


def _run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    points = [(workload, point) for workload in args.workloads.split(",") for point in args.points.split(",")]
    for _, point in points:
        if point not in POINTS:
            raise UserError(f"there is no point '{point}'; known: {', '.join(POINTS)}")
    facts = f"torch {torch.__version__} on a CPU"
    if args.train:
        seeds = [int(seed) for seed in args.seeds.split(",")]
        title, lines = f"Losses after {args.train} steps, {facts}", _losses(points, args.train, seeds)
    else:
        title, lines = f"Directions over {args.steps} steps, {facts}", _changes(points, args.steps)
    path = Path(args.output)
    old = path.read_text(encoding="utf-8") if path.exists() else HEAD
    write_text(path, step_profile.replaced(old, title, lines))


def _changes(points: Sequence[tuple[str, str]], steps: int) -> list[str]:
    """The table of directions."""
    lines = ["| workload | point | rounded | median | worst |", "|---|---|---|---|---|"]
    for workload, point in points:
        for name, found in measure(workload, point, steps, VARIANTS).items():
            cells = [workload, point, name, _percent(statistics.median(found)), _percent(max(found))]
            lines.append(f"| {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    return lines


def _percent(share: float) -> str:
    """To two digits."""
    return f"{float(f'{100 * share:.2g}'):g} %"


def _losses(points: Sequence[tuple[str, str]], steps: int, seeds: Sequence[int]) -> list[str]:
    """The table of losses."""
    columns = ["workload", "point", "rounded", *(f"seed {seed}" for seed in seeds)]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for workload, point in points:
        for name, variant in TRAINED.items():
            losses = [f"{loss_of(workload, point, steps, variant, seed):.4f}" for seed in seeds]
            lines.append(f"| {' | '.join([workload, point, name, *losses])} |")
            print(lines[-1], flush=True)
    return lines


HEAD = """# What TF32 changes of K-FAC's directions

Written by `python -m benchmarks.tf32`, which says how it is emulated; nothing was measured on a GPU. "Median" and
"worst": how far directions of covered weights are from those in float32, over weights and steps. Rounded are the
products of what is named, alone: "the polar iteration" is that of the scaling, "directions beside that" are
products with bases, into them and back, or with operators, "refreshes" those beside the decomposition itself, and
"what is decomposed" the matrix given to it, as if the solver computed in ten bits (whether one does was not looked
at). "With the guard" is K-FAC as shipped in a process that has switched TF32 on: statistics and directions, but no
refreshes (`full_precision` of `algoperf_kfac/pytorch/refresh.py`). "Without" has refreshes and what is decomposed
rounded, too. The model's products change any optimizer. Points are the submissions', without weight decay;
"defaults" is K-FAC-expand with the library's own where they differ (scaling, length, noise floor, intervals).
"""

if __name__ == "__main__":
    sys.exit(main())
