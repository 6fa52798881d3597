"""A ladder of language models on the text of `bible_lm`, and one training run of a rung."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

import algoperf_kfac
from benchmarks.paper import in_process
from benchmarks.paper.complexity.worker import device
from submissions.registry import describe, path_of
from workloads.bible_lm.pytorch import BibleLmWorkload
from workloads.data import bible

# Width, blocks, positions. Heads are of 16, the MLP is four times as wide.
RUNGS = ((32, 2, 32), (64, 2, 64), (128, 4, 128), (256, 6, 256))
HEAD = 16
TOKENS = 2048  # of a step
VALIDATED = 8192  # tokens of the validation text that an evaluation looks at
EVERY = 10  # steps between evaluations
STEPS = 160  # NadamW's horizon; the submissions of K-FAC have theirs as shares of it
SUBMISSIONS = {"nadamw": "nadamw", "expand": "kfac_expand", "reduce": "kfac_reduce"}
RATES = (0.3, 1.0, 3.0)
SEEDS = (3301, 3302, 3303)  # used for nothing else
# To say beforehand how long it takes: what a step takes beyond its flops (measured on the smallest rung), flops (a
# guess, for larger rungs were not run), and a step of K-FAC in those of NadamW (the smallest rung's).
STARTING, FLOPS_PER_SECOND, BEYOND = 0.03, 2e10, 1.75
# Of K-FAC, as in the runs that are kept; the submissions' points are others since.
KEPT: Mapping[str, Mapping[str, float]] = {
    "kfac_expand": {"weight_decay": 0.05, "factor_interval": 4, "refresh_interval": 12, "factor_decay": 0.95},
    "kfac_reduce": {"weight_decay": 0.05, "factor_interval": 2, "refresh_interval": 6, "factor_decay": 0.9},
}


@dataclasses.dataclass(frozen=True)
class Training:
    """One run.

    Attributes:
        width: of the rung.
        blocks: of the rung.
        positions: of the rung.
        optimizer: a key of `SUBMISSIONS`.
        rate: the learning rate over the submission's own.
        seed: of weights and batches.
        steps: of a horizon of 1.
    """

    width: int
    blocks: int
    positions: int
    optimizer: str
    rate: float
    seed: int
    steps: int = STEPS

    @property
    def rung(self) -> tuple[int, int, int]:
        return self.width, self.blocks, self.positions

    @property
    def horizon(self) -> int:
        """Steps of the run."""
        factor = describe(SUBMISSIONS[self.optimizer], "pytorch").defaults["horizon_factor"]
        return round(float(str(factor)) * self.steps)


class RungWorkload(BibleLmWorkload):
    """`bible_lm` with a model, positions and a batch of other sizes."""

    name = base = "rung"
    VARIANTS: ClassVar = {}

    def __init__(self, rung: tuple[int, int, int], steps: int) -> None:
        super().__init__()
        self.width, self.depth, self.length = rung
        self.heads, self.mlp_width = self.width // HEAD, 4 * self.width
        self.batch_size, self.step_hint = TOKENS // self.length, steps
        self.num_validation_examples = VALIDATED // self.length
        self.eval_batch_size = min(self.num_validation_examples, 2 * self.batch_size)

    def numpy_batch(self, data_rng: np.ndarray, split: str, index: int, batch_size: int) -> dict[str, np.ndarray]:
        if split != "validation":
            return super().numpy_batch(data_rng, split, index, batch_size)
        text, windows = self._text.parts["validation"], self.num_validation_examples
        return bible.eval_batch(text, windows, index, batch_size, self.length)


def trainings(*, quick: bool) -> list[Training]:
    """All runs, rung by rung from the smallest, seed by seed, so that an interrupted ladder is paired."""
    rungs, seeds, rates = (RUNGS[:1], SEEDS[:1], (1.0,)) if quick else (RUNGS, SEEDS, RATES)
    return [
        Training(*rung, optimizer, rate, seed)
        for rung in rungs
        for seed in seeds
        for optimizer in SUBMISSIONS
        for rate in rates
    ]


def parameters(rung: tuple[int, int, int]) -> int:
    """Of a rung's model."""
    width, blocks, positions = rung
    block = 12 * width**2 + 13 * width
    return blocks * block + (bible.NUM_SYMBOLS + positions + 2) * width + bible.NUM_SYMBOLS * (width + 1)


def expected_seconds(runs: Sequence[Training]) -> float:
    """CPU time, by the flops of the models; evaluations are forward passes alone."""
    evaluation = VALIDATED / (3 * EVERY * TOKENS)
    return sum(
        run.horizon
        * (STARTING + 6 * parameters(run.rung) * TOKENS / FLOPS_PER_SECOND)
        * ((1.0 if run.optimizer == "nadamw" else BEYOND) + evaluation)
        for run in runs
    )


def train(case: Training) -> dict[str, Any]:
    """Trains to the end of the schedule; validation losses on the way, and CPU seconds of a step, a mean."""
    name, workload = SUBMISSIONS[case.optimizer], RungWorkload(case.rung, case.steps)
    defaults = describe(name, "pytorch").defaults
    point = {
        "learning_rate": case.rate * float(str(defaults["learning_rate"])),
        "horizon_factor": case.horizon / case.steps,
    }
    point |= KEPT.get(name, {})
    run = in_process.start(path_of(name, "pytorch"), workload, point, case.seed)
    curve, seconds = in_process.train(run, case.horizon, case.seed, every=EVERY)
    return {
        "curve": curve,
        "seconds": seconds,
        "parameters": sum(p.numel() for p in run.params.parameters()),
        "version": algoperf_kfac.__version__,
        "device": device("pytorch"),
    }
