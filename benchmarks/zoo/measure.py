"""What is measured of a model: coverage, captured pairs against gradients, losses and the cost of steps."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from algoperf_kfac.pytorch import KFAC, NadamW
from benchmarks.zoo.exhibit import Exhibit

RATES = (1e-3, 3e-3, 1e-2)
OPTIMIZERS = ("nadamw", "expand", "reduce")
BATCHES = 4  # which come again and again
NAMES = ("embed", "token", "position", "relative_position_bias_table")  # of raw parameters that are embeddings


@dataclasses.dataclass
class Row:
    """A model's line of the table.

    Attributes:
        parameters: how many it has.
        covered: share of them.
        core: share of those that are neither embeddings nor normalisations.
        error: largest relative error of a weight's gradient.
        warned: warnings of K-FAC.
        losses: by optimizer, at its best rate.
        ratios: by optimizer, mean cost of a step beside NadamW's.
        rest: parameters of the core that are not covered, and why.
    """

    parameters: int = 0
    covered: float = math.nan
    core: float = math.nan
    error: float = math.nan
    warned: list[str] = dataclasses.field(default_factory=list)
    losses: dict[str, float] = dataclasses.field(default_factory=dict)
    ratios: dict[str, float] = dataclasses.field(default_factory=dict)
    rest: dict[str, str] = dataclasses.field(default_factory=dict)


def embeddings_and_norms(model: nn.Module) -> set[str]:
    """Names of the parameters that are embeddings or belong to normalisations."""
    names = set()
    for path, module in model.named_modules():
        plain = isinstance(module, nn.Embedding) or "norm" in type(module).__name__.lower()
        for key, param in module.named_parameters(path, recurse=False):
            if plain or (param.dim() != 2 and any(name in key.rpartition(".")[2] for name in NAMES)):
                names.add(key)
    return names


def measure_coverage(exhibit: Exhibit, row: Row, seed: int) -> None:
    """Coverage after three steps, and how right it is; of expand, whose pairs are those of reduce."""
    torch.manual_seed(seed)
    model = exhibit.build()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = KFAC(model, approximation="expand", learning_rate=1e-4)
        for _ in range(3):
            step(model, optimizer, exhibit, exhibit.batch())
    aside, coverage = embeddings_and_norms(model), optimizer.coverage()
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    left = {f.name: math.prod(f.shape) for f in coverage.fallbacks}
    core = sum(size for name, size in sizes.items() if name not in aside)
    row.parameters, row.covered = sum(sizes.values()), coverage.fraction
    row.core = 1 - sum(size for name, size in left.items() if name not in aside) / core
    row.error = max((v for k, v in optimizer.metrics().items() if k.endswith("/gradient_error")), default=math.nan)
    row.warned = [str(w.message).removeprefix("K-FAC: ") for w in caught if "K-FAC" in str(w.message)]
    row.rest = {f.name: f.reason for f in coverage.fallbacks if f.name not in aside}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, exhibit: Exhibit, batch: Mapping[str, Any]) -> float:
    """One training step; its loss."""
    optimizer.zero_grad()
    if isinstance(optimizer, KFAC):
        with optimizer.capture(**exhibit.capture(batch)):
            loss = exhibit.loss(model, batch)
            loss.backward()
    else:
        loss = exhibit.loss(model, batch)
        loss.backward()
    optimizer.step()
    return float(loss.detach())


def make(name: str, model: nn.Module, rate: float, options: Mapping[str, Any]) -> torch.optim.Optimizer:
    if name == "nadamw":
        return NadamW(model.parameters(), lr=rate)
    return KFAC(model, approximation=name, learning_rate=rate, allow_partial_coverage=True, **options)


def train(
    exhibit: Exhibit, name: str, rate: float, seed: int, steps: int, options: Mapping[str, Any] | None = None
) -> tuple[float, list[float]]:
    """One training run.

    Args:
        exhibit: the model.
        name: of the optimizer.
        rate: its learning rate.
        seed: of weights and batches.
        steps: how many.
        options: fields of `KFACConfig`.

    Returns:
        The mean loss over the last round of batches (infinite if it is not finite; where no batch comes twice, over
        the last fifth of the steps), and the CPU seconds of each step.
    """
    torch.manual_seed(seed)
    model = exhibit.build()
    distinct = steps if exhibit.fresh else BATCHES
    batches = [exhibit.batch() for _ in range(distinct)]
    optimizer = make(name, model, rate, options or {})
    losses, seconds = [], []
    for number in range(steps):
        begin = time.process_time()
        losses.append(step(model, optimizer, exhibit, batches[number % distinct]))
        seconds.append(time.process_time() - begin)
    end = statistics.mean(losses[-(max(1, steps // 5) if exhibit.fresh else BATCHES) :])
    return end if math.isfinite(end) else math.inf, seconds


def measure_training(exhibit: Exhibit, row: Row, steps: int, seeds: Iterable[int]) -> None:
    """Losses at the best rate, and the cost of steps."""
    seeds, times = list(seeds), {}
    for name in OPTIMIZERS:
        by_rate, taken = {}, []
        for rate in RATES:
            runs = [train(exhibit, name, rate, seed, steps) for seed in seeds]
            by_rate[rate] = statistics.mean(loss for loss, _ in runs)
            taken += [s for _, seconds in runs for s in seconds]
        row.losses[name], times[name] = min(by_rate.values()), taken
    base = times["nadamw"]
    row.ratios = {name: statistics.mean(times[name]) / statistics.mean(base) for name in OPTIMIZERS[1:]}
