"""Of the page: the ladder, as far as it was run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

from benchmarks.kept import Book
from benchmarks.paper.size import trend
from benchmarks.paper.size.ladder import (
    RATES,
    RUNGS,
    SEEDS,
    STEPS,
    SUBMISSIONS,
    TOKENS,
    Training,
    parameters,
    trainings,
)
from benchmarks.paper.size.paper_page import table
from benchmarks.paper.size.trend import Rung

HEAD = f"""\
Language models on the text of `bible_lm`, {TOKENS:,} characters a step, a horizon of {STEPS} steps with
NadamW; each submission at its own point and share of the horizon, at {{rates}} times its learning rate, on
seeds {{seeds}}. The target of a rung is NadamW's median validation loss at the end of its horizon, at its best
rate. Each optimizer stands at the rate that takes it there in the fewest steps; at the edge of those tried a
better one may lie beyond. Medians over seeds; seconds are of the processor, means over a run with all its
refreshes.
"""


def lines(book: Book[Training]) -> Iterator[str]:
    yield "## A ladder, trained"
    yield ""
    wanted = trainings(quick=False)
    missing = len(book.missing(wanted))
    rates, seeds = ", ".join(f"{rate:g}" for rate in RATES), ", ".join(map(str, SEEDS))
    yield HEAD.format(rates=rates, seeds=seeds)
    if missing:
        yield (
            f"**{missing} of {len(wanted)} runs were not made.** Without all of its rung's a row is dashes, and "
            "without several rungs there is no trend."
        )
        yield ""
    yield from table(
        "width | blocks | positions | parameters | optimizer | rate | steps | in NadamW's | loss | "
        "seconds a step | in NadamW's",
        (
            [*map(str, rung), f"{parameters(rung):,}", optimizer, *_trained(book, rung, optimizer)]
            for rung in RUNGS
            for optimizer in SUBMISSIONS
        ),
    )
    yield from _trends(book)


def _trained(book: Book[Training], rung: Rung, optimizer: str) -> list[str]:
    found, base = trend.outcome(book, rung, optimizer), trend.outcome(book, rung, "nadamw")
    if found is None or base is None:
        return ["-"] * 6
    steps = statistics.median(found.steps)
    cost = statistics.median(mine / its for mine, its in zip(found.cost, base.cost, strict=True))
    return [
        f"{found.rate:g}{' (edge)' if found.rate in (min(RATES), max(RATES)) else ''}",
        f"{steps:g}" if math.isfinite(steps) else "missed",
        f"{steps / STEPS:.2f}" if math.isfinite(steps) else "-",
        f"{statistics.median(found.loss):.3f}",
        f"{statistics.median(found.cost):.3g}",
        f"{cost:.2f}",
    ]


def _trends(book: Book[Training]) -> Iterator[str]:
    for what, ratios in (("steps", _steps), ("cost of a step", _costs)):
        for optimizer in ("expand", "reduce"):
            by_rung = {parameters(rung): ratios(book, rung, optimizer) for rung in RUNGS}
            found = trend.slope({size: values for size, values in by_rung.items() if values})
            if found is not None:
                factor, low, high = found
                yield (
                    f"- Ten times the parameters multiply the {what} of {optimizer}, in NadamW's, by {factor:.2f} "
                    f"({low:.2f} to {high:.2f}, 95 % bootstrap over seeds), over rungs where no seed missed."
                )


def _steps(book: Book[Training], rung: Rung, optimizer: str) -> list[float]:
    found = trend.outcome(book, rung, optimizer)
    if found is None or not all(map(math.isfinite, found.steps)):
        return []
    return [steps / STEPS for steps in found.steps]


def _costs(book: Book[Training], rung: Rung, optimizer: str) -> list[float]:
    found, base = trend.outcome(book, rung, optimizer), trend.outcome(book, rung, "nadamw")
    if found is None or base is None:
        return []
    return [mine / its for mine, its in zip(found.cost, base.cost, strict=True)]
