"""One training run of a residual network without normalisation, its weight decay given or learned by evidence.

Normalisation would make the length of the weights in front of it meaningless, and with it their prior. The prior
acts through the gradient (`add_prior_gradient`), so that training leads to the most probable weights.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import algoperf_kfac
from algoperf_kfac.evidence import evidence
from algoperf_kfac.online import OnlineEvidence
from algoperf_kfac.pytorch.decay import add_prior_gradient
from algoperf_kfac.pytorch.evidence import fit_factors
from workloads.data import mnist

IMAGES = 1000  # to train on; the grid gives a fifth of them to its choice
HELD_OUT = 200
EPOCHS, BATCH, RATE = 40, 100, 3e-3
EVERY, BURN_IN, ADAM_STEPS = 5, 5, 50  # F, epochs before the first update, K
WIDTH = 8
BINS = 15
FIT_BATCH = 250
EVIDENCE = ("expand", "reduce")


@dataclasses.dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        method: "expand" or "reduce", whose evidence sets a weight decay for each layer; "grid", with images held
            out; or "retrained", on all of them.
        augment: whether images are shifted by up to two pixels.
        width: channels of the first stage.
        decay: given; 0 where the evidence sets it.
        seed: of weights, batches and shifts.
    """

    method: str
    augment: bool
    width: int
    decay: float
    seed: int


class Block(nn.Module):
    """Two convolutions of 3 x 3 beside the input; the second begins as zero, so that the block does."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.beside = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.beside(x) + self.conv2(self.conv1(x.relu()).relu())
        return out


def network(width: int) -> nn.Module:
    """Of (N, 1, 28, 28) to (N, 10): a strided stem, three stages of one block, mean over positions, head."""
    stages = [Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2)]
    head = [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, mnist.NUM_CLASSES)]
    return nn.Sequential(nn.Conv2d(1, width, 3, 2, 1), *stages, *head)


def run(case: Case) -> dict[str, Any]:
    """Trains, and measures on images that had no part in it."""
    torch.set_num_threads(1)
    torch.manual_seed(case.seed)
    rng = np.random.default_rng(case.seed)
    (images, labels), (others, their_labels) = _data()
    held = slice(IMAGES - HELD_OUT, None)
    own = slice(None, IMAGES - HELD_OUT) if case.method == "grid" else slice(None)
    model = network(case.width)
    start = time.process_time()
    learned = _train(model, images[own], labels[own], case, rng)
    seconds = time.process_time() - start
    found: dict[str, Any] = {"seconds": seconds, **learned, **scores(model, others, their_labels)}
    if case.method == "grid":
        found["held_out"] = scores(model, images[held], labels[held])["log_likelihood"]
    rounded = {name: float(f"{value:.5g}") for name, value in found.items()}
    return {**rounded, "version": algoperf_kfac.__version__}


def _train(
    model: nn.Module, images: Tensor, labels: Tensor, case: Case, rng: np.random.Generator
) -> dict[str, float]:
    count = len(labels)
    steps = EPOCHS * (count // BATCH)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    # A prior precision of 1 to begin with.
    online = OnlineEvidence(by="layer", every=EVERY, burn_in=BURN_IN, steps=ADAM_STEPS)
    names = tuple(name for name, _ in model.named_parameters())
    decays = {names: 1.0 / count if case.method in EVIDENCE else case.decay}
    spent, updates, value = 0.0, 0, math.nan

    def loader() -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in np.array_split(np.arange(count), -(-count // FIT_BATCH)):
            yield _batch(images, labels, chosen, case.augment, rng)

    for epoch in range(EPOCHS):
        model.train()
        for chosen in rng.permutation(count)[: count // BATCH * BATCH].reshape(-1, BATCH):
            x, y = _batch(images, labels, chosen, case.augment, rng)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            add_prior_gradient(model, decays)
            optimizer.step()
            schedule.step()
        if case.method in EVIDENCE and online.is_due(epoch):
            start = time.process_time()
            fitted = fit_factors(
                model, loader(), "softmax_cross_entropy", approximation=case.method, seed=case.seed
            )
            online.update(fitted)
            decays = online.weight_decays()
            spent, updates = spent + time.process_time() - start, updates + 1
    if case.method not in EVIDENCE:
        return {}
    fitted = fit_factors(model, loader(), "softmax_cross_entropy", approximation=case.method, seed=case.seed)
    value = evidence(fitted, online.prior_precision).value / count
    return {"evidence": value, "evidence_seconds": spent / updates, "decay_found": _mean_decay(decays)}


def scores(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, mean log-likelihood, and expected calibration error (Guo et al. 2017, arXiv 1706.04599)."""
    model.eval()
    with torch.no_grad():
        logs = torch.cat([model(part) for part in images.split(500)]).log_softmax(-1)
    confidence, guess = logs.exp().max(-1)
    right = (guess == labels).float()
    bins = (confidence * BINS).ceil().clamp(1, BINS)
    gaps = [
        float((right[chosen].mean() - confidence[chosen].mean()).abs() * chosen.float().mean())
        for number in range(1, BINS + 1)
        if (chosen := bins == number).any()
    ]
    return {
        "accuracy": float(right.mean()),
        "log_likelihood": float(logs.gather(1, labels[:, None]).mean()),
        "calibration": sum(gaps),
    }


def _mean_decay(decays: dict[tuple[str, ...], float]) -> float:
    """The geometric mean over layers."""
    return math.exp(sum(math.log(value) for value in decays.values()) / len(decays))


def _batch(
    images: Tensor, labels: Tensor, chosen: np.ndarray, augment: bool, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    x, y = images[chosen], labels[chosen]
    if augment:
        shifts = rng.integers(-mnist.MAX_SHIFT, mnist.MAX_SHIFT + 1, (len(chosen), 2))
        x = torch.stack([image.roll(tuple(by), (1, 2)) for image, by in zip(x, shifts.tolist(), strict=True)])
    return x, y


def _data() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The images to train on, and 4,000 others."""
    parts = mnist.load()
    images = torch.tensor(np.concatenate([part.images for part in parts.values()]))[:, None]
    labels = torch.tensor(np.concatenate([part.labels for part in parts.values()]))
    return (images[:IMAGES], labels[:IMAGES]), (images[IMAGES:], labels[IMAGES:])
