"""The grid: curves over damping, and the runs that a point of a curve takes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

from benchmarks.experiments.experiment import TUNED_ON
from benchmarks.experiments.runs import OBJECTS
from submissions.registry import describe, path_of
from workloads.studies import facts

APPROXIMATIONS = ("expand", "reduce")
RATES = (1 / 3, 1.0, 3.0)  # times the learning rate; as many for each curve, which keeps the best
TUNED_AT = 1e-2  # the damping at which a curve's rate is chosen
TUNING_SEED = 3400
SEEDS = (3401, 3402, 3403)  # these and the one above are used for nothing else
HORIZON = 0.2  # of the step hint
# Of all K-FACs. A damping below the noise of float32 is taken as it is, and statistics are as frequent as reduce
# wants them, the needier of both (docs/experiments.md, "together_reduce").
POINT = {
    "learning_rate": 2e-2,
    "one_minus_beta1": 0.2,
    "beta2": 0.99,
    "weight_decay": 0.05,
    "grad_clip": 0.25,
    "warmup_factor": 0.05,
    "noise_floor": 0.0,
    "factor_decay": 0.9,
    "factor_interval": 2,
    "refresh_interval": 6,
    "initial_refreshes": "every",
    "statistics_rows": 1024,
    "statistics_rows_by_side": True,
    "max_factor_dim": 4096,
    "polar_steps": 3,
    "length_factor": 0.5,  # with a fixed length; a gain takes its place where directions are not grafted
}


@dataclasses.dataclass(frozen=True)
class Form:
    """What is made of damped factors: a panel of the figure.

    Attributes:
        scaling: "inverse" (the paper's), "power" (3/4) or "polar".
        mode: of the damping, "relative" or "absolute" (with pi).
        length: "graft", "rms" or "none", which stands for a gain measured beforehand (`training.gain`).
    """

    scaling: str
    mode: str
    length: str

    @property
    def title(self) -> str:
        """In words."""
        scaling = {"inverse": "inverse", "power": "power 3/4", "polar": "whitened polar"}[self.scaling]
        mode = {"relative": "relative", "absolute": "absolute, with pi"}[self.mode]
        length = {"graft": "grafted", "rms": "fixed length", "none": "not grafted"}[self.length]
        return f"{scaling}, {mode}, {length}"


PAPER = Form("inverse", "absolute", "none")
GRAFTED = Form("power", "relative", "graft")
SHIPPED = Form("polar", "relative", "rms")


@dataclasses.dataclass(frozen=True)
class Part:
    """What is run on a workload."""

    workload: str
    forms: tuple[Form, ...]
    dampings: tuple[float, ...]

    def points(self) -> list[Point]:
        """All points, curve by curve."""
        return [
            Point(self.workload, form, approximation, damping)
            for form in self.forms
            for approximation in APPROXIMATIONS
            for damping in self.dampings
        ]


EVERY = tuple(10.0**power for power in range(-6, 1))
DEFAULT = (
    Part("mnist_vit", (PAPER, GRAFTED, SHIPPED), (1e-6, 1e-4, 1e-2, 1.0)),
    Part("mnist_resnet", (PAPER, GRAFTED), (1e-6, 1e-4, 1e-2, 1.0)),
)
WHOLE = tuple(
    Part(
        workload,
        (
            *(
                Form(scaling, mode, length)
                for scaling in ("inverse", "power")
                for mode in ("relative", "absolute")
                for length in ("graft", "none")
            ),
            SHIPPED,
        ),
        EVERY,
    )
    for workload in TUNED_ON
)
QUICK = (Part("mnist_vit", (GRAFTED,), (1e-4, 1e-2)),)


@dataclasses.dataclass(frozen=True)
class Point:
    """A point of a curve."""

    workload: str
    form: Form
    approximation: str
    damping: float


@dataclasses.dataclass(frozen=True)
class Case:
    """One run, as it is kept.

    Attributes:
        scaling: of the form, or "nadamw", of which the fields up to `damping` mean nothing.
        mode: of the form.
        length: of the form.
        approximation: "expand" or "reduce".
        damping: with the form's mode.
        gain: what the direction is multiplied by where it is not grafted, else 1.
        rate: a multiple of the learning rate.
        steps: of the horizon.
        point: a digest of all hyperparameters, so that a result is not taken for one of later defaults.
    """

    workload: str
    scaling: str
    mode: str
    length: str
    approximation: str
    damping: float
    gain: float
    rate: float
    seed: int
    steps: int
    point: str


def case_of(point: Point | None, workload: str, gain: float, rate: float, seed: int) -> Case:
    """The case of a point, or of NadamW at its own."""
    digest = hashlib.sha256(json.dumps(hyperparameters(point, workload, gain, rate)).encode()).hexdigest()[:8]
    own = ("nadamw", "", "", "", 0.0)
    if point is not None:
        own = (*dataclasses.astuple(point.form), point.approximation, point.damping)
    return Case(workload, *own, gain, rate, seed, steps_of(workload), digest)


def path(point: Point | None) -> Path:
    """The submission that trains a point, or NadamW's."""
    if point is not None and point.form.length == "none":
        return OBJECTS / f"gained_{point.form.scaling}.py"
    return path_of("nadamw" if point is None else "kfac_expand", "pytorch")


def steps_of(workload: str) -> int:
    """The horizon in steps."""
    return round(HORIZON * facts.task(workload).step_hint)


def hyperparameters(point: Point | None, workload: str, gain: float, rate: float) -> dict[str, object]:
    """All that a run is told; of NadamW its own point."""
    found = dict(describe("nadamw", "pytorch").defaults) if point is None else _own(point)
    if point is not None and point.form.length == "none":
        found["length_factor"] = gain
    found["learning_rate"] = float(f"{rate * float(str(found['learning_rate'])):.6g}")
    found["horizon_factor"] = steps_of(workload) / facts.task(workload).step_hint
    return found


def _own(point: Point) -> dict[str, object]:
    """A point's hyperparameters, at the middle rate and without a gain."""
    form = point.form
    found: dict[str, object] = {
        **POINT,
        "approximation": point.approximation,
        "damping": point.damping,
        "damping_mode": form.mode,
        "length": form.length,
    }
    if form.length == "none":
        return found  # the object brings the scaling
    if form.scaling == "inverse":
        return {**found, "preconditioner": "inverse", "scaling": "power"}
    return {**found, "scaling": form.scaling}
