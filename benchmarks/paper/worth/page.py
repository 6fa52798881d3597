"""The page of what factors are worth: a step by each, and why reduce's A of a kernel leads it astray."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from benchmarks.kept import Book
from benchmarks.paper.worth.measure import APPROXIMATIONS, DAMPINGS, LENGTHS, OTHER_BATCHES, Start

STEPS = 60
SEEDS = (3201, 3202, 3203)  # used for nothing else
STARTS = tuple(Start(workload, STEPS, seed) for workload in ("mnist_resnet", "mnist_vit") for seed in SEEDS)

HEAD = f"""# What a factor is worth

Written by `python -m benchmarks.paper worth` from [the kept results](../results/worth.jsonl), with what is missing
of them measured first. PyTorch. Networks that NadamW has trained for {STEPS} steps, so that no approximation has
chosen where they stand; gradient and factors of one batch, exact Fisher, float32, eigenvalues in float64.

![Spectra of A, where the updates go, and how training ends](../figures/worth.png)
"""
WORTH = f"""## One step

The most by which one step along B⁻¹ G A⁻¹, in all covered layers at once, lowers the loss of {OTHER_BATCHES} other
batches, over the most along the gradient: best of {len(LENGTHS)} lengths, and of {len(DAMPINGS)} dampings from
{DAMPINGS[0]:g} to {DAMPINGS[-1]:g} of the mean eigenvalue, the same for all. Median over seeds (least to most).

| network | {" | ".join(APPROXIMATIONS)} |
|---|---|---|---|
"""
LAYERS = """## Convolutions with kernels

*Rank*: (sum of eigenvalues)² over the sum of their squares, as a share of P_in. *Flat*: the P_in (k² - 1) / k²
directions of the input in which reduce's A is smallest; how much of the squared norm of the gradient lies there, of
the update by each approximation (damping 1e-3), and of the inputs' energy, which is expand's A. Medians over seeds.

| network | layer | rank, expand | rank, reduce | flat: gradient | flat: update, expand | flat: update, reduce | \
flat: energy |
|---|---|---|---|---|---|---|---|
"""
READING = """
One step does not tell the approximations apart: all are worth more than the gradient on the ResNet, and their
ranges over seeds overlap. Where reduce fails shows in the layers, and over a training run (right in the figure).

An averaged patch is nearly the same at all offsets of the kernel: the image moved by a pixel has the same mean but
for its border. Of k² directions per channel reduce's A sees one, and takes the inputs for nearly nothing in the
k² - 1 others. They do hold energy, as the last column says, and K-FAC's inverse sends nearly all of the update
there, by its own lights at no cost. Of the strided 3 x 3 in the figure, over 7 pixels, reduce's A has but 4/9 of
its rank: in either dimension both outer offsets read the same pixels. Expand's A falls, too, but with what the
layer really sees. Whitening both sides and taking the polar factor, as the submissions do, hides half of it;
"mixed" takes expand's A for kernels ([experiments](../experiments.md)).
"""


def page(book: Book[Start]) -> str:
    """The whole page, of what is kept."""
    origin = f"Measured with version {', '.join(book.values('version'))}; the same in every run, but for rounding."
    lines = [HEAD, origin, "", WORTH + "\n".join(_worth(book)), "", LAYERS + "\n".join(_layers(book)), READING]
    return "\n".join(lines)


def kept(book: Book[Start], workload: str) -> list[dict[str, Any]]:
    """The results of a workload, seed by seed."""
    found = [book.of(start) for start in STARTS if start.workload == workload]
    return [one for one in found if one is not None]


def workloads() -> list[str]:
    """Where it is measured, in order."""
    return list(dict.fromkeys(start.workload for start in STARTS))


def _worth(book: Book[Start]) -> Iterator[str]:
    for workload in workloads():
        results = kept(book, workload)
        cells = []
        for approximation in APPROXIMATIONS:
            shares = [
                one["worth"][approximation]["decrease"] / one["worth"]["gradient"]["decrease"] for one in results
            ]
            spread = f"{statistics.median(shares):.1f} ({min(shares):.1f} to {max(shares):.1f})" if shares else "-"
            cells.append(spread)
        yield f"| {workload} | {' | '.join(cells)} |"


def _layers(book: Book[Start]) -> Iterator[str]:
    for workload in workloads():
        results = kept(book, workload)
        for name in results[0]["layers"] if results else ():
            layers = [one["layers"][name] for one in results]
            values = [
                *([layer[one]["rank"] for layer in layers] for one in ("expand", "reduce")),
                [layer["gradient"] for layer in layers],
                *([layer[one]["flat"] for layer in layers] for one in ("expand", "reduce")),
                [layer["trace"] for layer in layers],
            ]
            cells = [f"{statistics.median(column):.3g}" for column in values]
            yield f"| {workload} | `{name}` | {' | '.join(cells)} |"
