"""Tiny language models whose layers are compared with their exact Gauss-Newton block."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import algoperf_kfac
from benchmarks.paper.architectures.cases import Fit, fit
from benchmarks.paper.exactness_cases import SOFTMAX, Case, approximate, exact
from workloads.bible_lm.pytorch import LanguageModel
from workloads.data import bible

SYMBOLS = 11  # the ten most frequent characters, and one for all others
SEQUENCES, HEADS = 6, 2
BATCH, RATE = 32, 3e-3  # of the training before, by Adam
APPROXIMATIONS = ("expand", "reduce")
MOMENTS = (0, 200)  # steps of training
SEEDS = (3201, 3202, 3203)  # used for nothing else
SIZES = ((8, 1, 4), (8, 1, 8), (8, 1, 16), (16, 1, 8), (24, 1, 8), (8, 2, 8))  # width, blocks, positions
KINDS = {
    "queries, keys": ("attention.query", "attention.key"),
    "values, outputs": ("attention.value", "attention.out"),
    "MLP": ("mlp.linear1", "mlp.linear2"),
    "head": ("output",),
}


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A model at a moment of its training.

    Attributes:
        width: of the residual stream; the MLP is four times as wide.
        blocks: how many.
        positions: of a sequence.
        steps: of training before.
        seed: of weights and sequences.
    """

    width: int
    blocks: int
    positions: int
    steps: int
    seed: int


def tinies(*, quick: bool) -> list[Tiny]:
    """All cases, seed by seed."""
    sizes, seeds = (SIZES[:1], SEEDS[:1]) if quick else (SIZES, SEEDS)
    return [Tiny(*size, steps, seed) for seed in seeds for size in sizes for steps in MOMENTS]


def measure(tiny: Tiny) -> dict[str, Any]:
    """What is kept of a case: by approximation and kind of layer, relative error and cosine, means over layers."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        found = fits(tiny)
    finally:
        torch.set_default_dtype(dtype)
    kinds = {
        approximation: {
            kind: [float(f"{value:.4g}") for value in _mean(of_layers, ends)] for kind, ends in KINDS.items()
        }
        for approximation, of_layers in found.items()
    }
    return {"fits": kinds, "version": algoperf_kfac.__version__}


def fits(tiny: Tiny) -> dict[str, dict[str, Fit]]:
    """Of each approximation, by layer. Call it with float64 as torch's default dtype."""
    case = case_of(tiny)
    blocks = exact(case)
    return {
        approximation: {
            layer: fit(block, blocks[layer]) for layer, block in approximate(case, approximation).items()
        }
        for approximation in APPROXIMATIONS
    }


def case_of(tiny: Tiny) -> Case:
    """The model and its sequences, which it did not train on; all layers but the tables."""
    torch.manual_seed(tiny.seed)
    windows = _windows(tiny)
    x = next(windows)[:SEQUENCES, :-1]
    model = LanguageModel(SYMBOLS, tiny.positions, tiny.width, tiny.blocks, heads=HEADS, hidden=4 * tiny.width)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    for _ in range(tiny.steps):
        tokens = next(windows)
        optimizer.zero_grad()
        F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
    model.zero_grad()
    layers = [f"blocks.{i}.{end}" for i in range(tiny.blocks) for kind in KINDS.values() for end in kind]
    names = tuple(name for name in layers if not name.endswith("output"))
    return Case(model, x, 0.0, 0.0, (*names, "output"), SOFTMAX)


def _windows(tiny: Tiny) -> Iterator[Tensor]:
    """Batches (BATCH, positions + 1) of random places of the text."""
    text = bible.load().parts["train"]
    numbers = np.full(bible.NUM_SYMBOLS, SYMBOLS - 1)
    numbers[np.bincount(text, minlength=bible.NUM_SYMBOLS).argsort()[::-1][: SYMBOLS - 1]] = np.arange(SYMBOLS - 1)
    rng = np.random.RandomState(tiny.seed)
    while True:
        starts = rng.randint(0, len(text) - tiny.positions, size=(BATCH, 1))
        yield torch.from_numpy(numbers[text[starts + np.arange(tiny.positions + 1)]])


def _mean(of_layers: dict[str, Fit], ends: tuple[str, ...]) -> tuple[float, float]:
    chosen = [one for layer, one in of_layers.items() if layer.endswith(ends)]
    return statistics.fmean(one.error for one in chosen), statistics.fmean(one.cosine for one in chosen)
