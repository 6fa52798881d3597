"""The page: recurrent networks, attention that shares nothing, a hybrid, layer by layer; the hybrid trained."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

import torch

from benchmarks.kept import Book
from benchmarks.paper.architectures.cases import CASES, UNSHARED, Fit, fits
from benchmarks.paper.architectures.hybrid import STEPS, Training

SEEDS = (3101, 3102, 3103)  # used for nothing else
OPTIMIZERS = ("nadamw", "expand", "reduce", "mixed")
RATES = (0.5, 1.0, 2.0)

HEAD = """# Networks in neither setting

Written by `python -m benchmarks.paper architectures`, in PyTorch. Relative Frobenius error of each approximation
(exact type-2 Fisher, float64) against the layer's exact block of the Gauss-Newton matrix, and behind it the cosine
of the angle between both: means over five draws of weights and data. *Mixed* is reduce but for A of convolutions
with kernels, which is expand's. Where a layer shares its weight over nothing (R = 1) expand and reduce are one, to
rounding: `tests/benchmarks/test_architectures.py` asserts it.

| network and loss | layer | R = 1 | expand | reduce | mixed |
|---|---|---|---|---|---|
"""
READING = """
- In a recurrent network the positions are steps in time, and a weight acts on later outputs through all steps
  behind its own. Neither approximation is exact, not even for a linear recurrence under a squared error, where each
  is in its setting otherwise. The head is in the setting that its loss says.
- A small error is not a good direction: of the stem's curvature reduce is the closer one here, and yet reduce alone
  is the worse optimizer of convolutions ([experiments](../experiments.md), "mixed"). K-FAC multiplies by the
  inverse, which the smallest eigenvalues decide, and the Frobenius norm hardly sees them.
- The key's projection sums to nothing over positions under a softmax, so that reduce's B says nothing of it.
"""


def page(book: Book[Training]) -> str:
    """The whole page.

    Args:
        book: the kept runs.
    """
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        lines = list(_blocks())
    finally:
        torch.set_default_dtype(dtype)
    return HEAD + "\n".join([*lines, READING, *_trained(book), ""])


def _blocks() -> Iterator[str]:
    for what, make in CASES.items():
        found = fits(make)
        for layer in found["expand"]:
            one = "yes" if layer in UNSHARED.get(what, ()) else ""
            cells = [_cell(found[approximation][layer]) for approximation in found]
            yield f"| {what} | `{layer}` | {one} | {' | '.join(cells)} |"


def _cell(fit: Fit) -> str:
    error = "**0**" if fit.error < 1e-10 else f"{fit.error:.2g}"
    return f"{error} ({fit.cosine:.2f})"


def _trained(book: Book[Training]) -> Iterator[str]:
    yield "## The hybrid trained"
    yield ""
    versions = ", ".join(book.values("version"))
    rates, seeds = ", ".join(f"{rate:g}" for rate in RATES), ", ".join(map(str, SEEDS))
    yield (
        f"Two strided convolutions, two blocks of attention over 49 pixels, average pooling, a head; the images of "
        f"`mnist_vit`, {STEPS} steps to the end of the schedule, version {versions}. All K-FACs train at the point "
        f"of `kfac_expand` but for the approximation, NadamW at its own; each at {rates} times its learning rate, "
        f"on seeds {seeds}. Validation loss at the end: mean over seeds (least to most) at the rate whose mean is "
        "least; behind it the paired difference to expand."
    )
    yield ""
    yield "| optimizer | learning rate | validation loss | accuracy | less expand's |"
    yield "|---|---|---|---|---|"
    base = best(book, "expand")
    for optimizer in OPTIMIZERS:
        found = best(book, optimizer)
        if found is None:
            yield f"| {optimizer} | - | - | - | - |"
            continue
        rate, losses, accuracies = found
        paired = base is not None and len(base[1]) == len(losses) and optimizer != "expand"
        differences = [mine - its for mine, its in zip(losses, base[1], strict=True)] if base and paired else []
        yield (
            f"| {optimizer} | {rate:g} times | {_spread(losses, '.3f')} | {statistics.fmean(accuracies):.3f} | "
            f"{_spread(differences, '+.3f') if differences else ''} |"
        )


def best(book: Book[Training], optimizer: str) -> tuple[float, list[float], list[float]] | None:
    """The rate whose mean loss over the kept seeds is least, with losses and accuracies by seed."""
    rows = []
    for rate in RATES:
        found = [book.of(Training(optimizer, rate, seed)) for seed in SEEDS]
        kept = [one for one in found if one is not None]
        if kept:
            rows.append((rate, [one["loss"] for one in kept], [one["accuracy"] for one in kept]))
    return min(rows, key=lambda row: _mean(row[1])) if rows else None


def _mean(losses: list[float]) -> float:
    mean = statistics.fmean(losses)
    return mean if math.isfinite(mean) else math.inf


def _spread(values: list[float], form: str) -> str:
    return f"{statistics.fmean(values):{form}} ({min(values):{form}} to {max(values):{form}})"
