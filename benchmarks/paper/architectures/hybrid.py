"""A hybrid of convolution stem, attention and average pooling, and how one training run of it ends."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import algoperf_kfac
from benchmarks.step_time import Run
from submissions.registry import describe, path_of
from workloads.data import mnist
from workloads.mnist_vit.pytorch import MnistVitWorkload
from workloads.runner.submission import load

WIDTH, HEADS, BLOCKS = 32, 4, 2
STEPS = 120
# Of K-FAC, as in the runs that are kept; the submissions' own points are others since.
KEPT = {"weight_decay": 0.05, "factor_interval": 4, "refresh_interval": 12, "factor_decay": 0.95}


class Block(nn.Module):
    """Attention and a perceptron, each behind a normalisation and beside its input (pre-LN)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.norm1(x)
        query, key, value = (
            layer(seen).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        x = x + self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return out


class Hybrid(nn.Module):
    """(N, 1, 28, 28) to (N, 10): two strided convolutions, attention over 49 pixels, their mean, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.ModuleList([nn.Conv2d(1, 16, 3, 2, 1), nn.Conv2d(16, WIDTH, 3, 2, 1)])
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, mnist.NUM_CLASSES)

    def forward(self, images: Tensor, dropout_rate: float = 0.0) -> Tensor:
        del dropout_rate
        x = images
        for layer in self.stem:
            x = layer(x).relu()
        out: Tensor = self.head(self.norm(self.blocks(x.flatten(2).transpose(1, 2))).mean(1))
        return out


class HybridWorkload(MnistVitWorkload):
    """The hybrid on the data of `mnist_vit`."""

    name = base = "hybrid"
    VARIANTS: ClassVar = {}
    step_hint = STEPS

    def build_model(self) -> nn.Module:
        return Hybrid()


@dataclasses.dataclass(frozen=True)
class Training:
    """One run.

    Attributes:
        optimizer: "nadamw", or the approximation of all layers: "expand", "reduce", or "mixed" (expand's A for
            kernels, reduce for the rest).
        rate: the learning rate over the submission's own.
    """

    optimizer: str
    rate: float
    seed: int


def train(case: Training) -> dict[str, Any]:
    """Trains to the end of the schedule; the validation loss and accuracy there.

    All K-FACs train at the point of `kfac_expand`, but for the approximation.
    """
    torch.set_num_threads(1)
    name = "nadamw" if case.optimizer == "nadamw" else "kfac_expand"
    submission, workload = load(str(path_of(name, "pytorch"))), HybridWorkload()
    defaults = describe(name, "pytorch").defaults
    point: dict[str, Any] = {
        "learning_rate": case.rate * float(str(defaults["learning_rate"])),
        "horizon_factor": 1.0,
    }
    if name != "nadamw":
        point |= {"approximation": case.optimizer, **KEPT}
    rng = np.array([case.seed, 0])
    params, model_state = workload.init_model_fn(rng)
    state = submission.init_optimizer_state(workload, params, model_state, point, rng)
    queue = workload._build_input_queue(rng, "train", "", workload.batch_size)
    run = Run(submission, workload, queue, state, params, model_state, point)
    for step in range(STEPS):
        run.step(step, np.array([case.seed, step]))
    found = workload._eval_model_on_split(
        "validation", workload.num_validation_examples, workload.eval_batch_size, run.params, None, rng, ""
    )
    digits = {name: float(f"{found[name]:.5g}") for name in ("loss", "accuracy")}
    return {**digits, "version": algoperf_kfac.__version__}
