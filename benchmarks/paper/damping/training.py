"""Trains points: gains first, then a learning rate for each curve on a seed of its own, then seeds that count."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

import algoperf_kfac
from benchmarks.kept import Book
from benchmarks.paper import in_process
from benchmarks.paper.damping import grid
from benchmarks.paper.damping.grid import (
    APPROXIMATIONS,
    RATES,
    SEEDS,
    TUNED_AT,
    TUNING_SEED,
    Case,
    Part,
    Point,
    case_of,
)
from commands.errors import UserError, tell
from workloads import registry

EVERY = 10  # steps between evaluations
GAIN_STEP = 20  # a gain is measured at the last statistics step before
# CPU seconds of a run, where docs/ were measured on mnist_vit (guesses for the rest).
SECONDS = {"mnist_vit": 7.5, "mnist_resnet": 12.0, "bible_lm": 12.0, "flights_dlrm": 12.0}
Wanted = list[tuple[Point | None, Case]]


@dataclasses.dataclass(frozen=True)
class Gained:
    """What a gain is measured of."""

    workload: str
    scaling: str
    mode: str
    approximation: str
    damping: float

    @classmethod
    def of(cls, point: Point) -> Gained:
        return cls(point.workload, point.form.scaling, point.form.mode, point.approximation, point.damping)


def gain(point: Point) -> float:
    """By what a direction that is not grafted is multiplied, always alike.

    With it, at step `GAIN_STEP` of a grafted run, K-FAC's directions are as long as NadamW's updates: the geometric
    mean of the ratios over layers. The learning rates tried are around the same length for all points then, and so
    that of what K-FAC does not cover is the same.
    """
    grafted = dataclasses.replace(point, form=dataclasses.replace(point.form, length="graft"))
    hyperparameters = grid.hyperparameters(grafted, point.workload, 1.0, 1.0)
    workload = registry.load(point.workload, "pytorch")
    run = in_process.start(grid.path(grafted), workload, hyperparameters, TUNING_SEED)
    for step in range(GAIN_STEP):
        run.step(step, np.array([TUNING_SEED, step]))
    metrics = run.state["optimizer"].metrics()
    ratios = [value for name, value in metrics.items() if name.endswith("/graft_ratio") and value > 0]
    return float(f"{math.exp(statistics.fmean(map(math.log, ratios))):.3g}")


def train(point: Point | None, case: Case) -> dict[str, Any]:
    """One run to the end of its schedule: validation losses, None where not finite, and CPU seconds of a step."""
    workload = registry.load(case.workload, "pytorch")
    hyperparameters = grid.hyperparameters(point, case.workload, case.gain, case.rate)
    run = in_process.start(grid.path(point), workload, hyperparameters, case.seed)
    curve, seconds = in_process.train(run, case.steps, case.seed, every=EVERY)
    finite = [[step, loss if math.isfinite(loss) else None] for step, loss in curve]
    return {"curve": finite, "seconds": seconds, "version": algoperf_kfac.__version__}


def train_parts(
    parts: Sequence[Part],
    book: Book[Case],
    gains: Book[Gained],
    *,
    again: bool = False,
    measure: Callable[[Point], float] = gain,
    train_one: Callable[[Point | None, Case], dict[str, Any]] = train,
) -> None:
    """Runs what no result is kept of, or all again; gains are measured once, since runs are told apart by them.

    Args:
        parts: what to run, in this order, so that an interrupted sweep has whole curves.
        book: of the runs; each is kept as it ends.
        gains: of the gains.
        again: also what there are results of.
        measure: a gain.
        train_one: a run.
    """
    _tell_time(parts, book, gains, again=again)
    for part in parts:
        for point in part.points():
            if point.form.length == "none" and gains.of(Gained.of(point)) is None:
                gains.add(Gained.of(point), {"gain": measure(point), "version": algoperf_kfac.__version__})
        for stage in (tuning_runs, paired_runs):
            wanted = stage(part, book, gains)
            todo = [pair for pair in wanted if again or book.of(pair[1]) is None]
            for number, (one, case) in enumerate(todo, 1):
                result = train_one(one, case)
                book.add(case, result)
                what = (
                    "NadamW" if one is None else f"{one.approximation}, {one.form.title}, damping {one.damping:g}"
                )
                loss = result["curve"][-1][1]
                tell(f"    {number} of {len(todo)}: {what}, rate {case.rate:.2g}, seed {case.seed}: loss {loss}")


def tuning_runs(part: Part, book: Book[Case], gains: Book[Gained]) -> Wanted:
    """Each curve at each learning rate, at one damping, on the tuning seed."""
    del book
    return [
        (point, case_of(point, part.workload, gain_of(point, gains), rate, TUNING_SEED))
        for point in part.points()
        if point.damping == TUNED_AT
        for rate in RATES
    ]


def paired_runs(part: Part, book: Book[Case], gains: Book[Gained]) -> Wanted:
    """NadamW, and each point at its curve's rate, seed by seed; curves that have not been tuned are left out."""
    wanted: Wanted = []
    for seed in SEEDS:
        wanted.append((None, case_of(None, part.workload, 1.0, 1.0, seed)))
        for point in part.points():
            rate = best_rate(point, book, gains)
            if rate is not None:
                wanted.append((point, case_of(point, part.workload, gain_of(point, gains), rate, seed)))
    return wanted


def best_rate(point: Point, book: Book[Case], gains: Book[Gained]) -> float | None:
    """Of a point's curve: that with the least loss at the end on the tuning seed; None where a run is missing."""
    tuned = dataclasses.replace(point, damping=TUNED_AT)
    if tuned.form.length == "none" and gains.of(Gained.of(tuned)) is None:
        return None
    losses = {}
    for rate in RATES:
        found = book.of(case_of(tuned, point.workload, gain_of(tuned, gains), rate, TUNING_SEED))
        if found is None:
            return None
        losses[rate] = last_loss(found)
    return min(losses, key=lambda rate: losses[rate])


def gain_of(point: Point, gains: Book[Gained]) -> float:
    """The kept gain; 1 where the length is set otherwise."""
    if point.form.length != "none":
        return 1.0
    found = gains.of(Gained.of(point))
    if found is None:
        raise UserError(f"No gain is kept of {point}: measure it first.")
    return float(found["gain"])


def last_loss(result: Mapping[str, Any]) -> float:
    """At the end; infinite where it is not finite."""
    loss = result["curve"][-1][1]
    return math.inf if loss is None else float(loss)


def expected(parts: Sequence[Part]) -> dict[str, int]:
    """By workload, the runs of the parts."""
    found: dict[str, int] = {}
    for part in parts:
        curves = len(part.forms) * len(APPROXIMATIONS)
        runs = curves * (len(RATES) + len(part.dampings) * len(SEEDS)) + len(SEEDS)
        found[part.workload] = found.get(part.workload, 0) + runs
    return found


def expected_seconds(parts: Sequence[Part]) -> float:
    """CPU time of all runs, those that are kept included."""
    return sum(SECONDS[workload] * count for workload, count in expected(parts).items())


def _tell_time(parts: Sequence[Part], book: Book[Case], gains: Book[Gained], *, again: bool) -> None:
    left, seconds, total = 0, 0.0, sum(expected(parts).values())
    for part in parts:
        bare = [p for p in part.points() if p.form.length == "none"]
        known = all(gains.of(Gained.of(p)) is not None for p in bare)
        pairs = [*tuning_runs(part, book, gains), *paired_runs(part, book, gains)] if known else []
        kept = 0 if again else sum(book.of(case) is not None for _, case in pairs)
        count = expected([part])[part.workload] - kept
        left, seconds = left + count, seconds + SECONDS[part.workload] * count
    tell(f"==> {left} runs, about {seconds / 60:.0f} min of CPU time; {total - left} are kept already")
