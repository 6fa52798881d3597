"""Of the page: tiny models beside the exact curvature."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from benchmarks.kept import Book
from benchmarks.paper.size.tiny import (
    APPROXIMATIONS,
    HEADS,
    KINDS,
    MOMENTS,
    SEEDS,
    SEQUENCES,
    SIZES,
    SYMBOLS,
    Tiny,
)

HEAD = f"""\
Causal language models (pre-LN blocks, an MLP four times as wide, {HEADS} heads) on the text of `bible_lm` with
{SYMBOLS} symbols and cross-entropy at each position; {SEQUENCES} sequences, float64. Relative Frobenius error
of each approximation (exact type-2 Fisher) against the layer's exact block of the Gauss-Newton matrix, and
behind it the cosine of the angle between both: means over the layers of a kind and over seeds {{seeds}},
version {{version}}. *Steps* are those of training before, by Adam.
"""
READING = ""


def lines(book: Book[Tiny]) -> Iterator[str]:
    yield "## The small end, exactly"
    yield ""
    seeds, versions = ", ".join(map(str, SEEDS)), ", ".join(book.values("version"))
    yield HEAD.format(seeds=seeds, version=versions or "-")
    yield f"| width | blocks | positions | steps | approximation | {' | '.join(KINDS)} |"
    yield "|---" * (5 + len(KINDS)) + "|"
    for steps in MOMENTS:
        for size in SIZES:
            for approximation in APPROXIMATIONS:
                cells = [_fit(book, size, steps, approximation, kind) for kind in KINDS]
                yield f"| {' | '.join(map(str, (*size, steps, approximation, *cells)))} |"
    yield READING


def _fit(book: Book[Tiny], size: tuple[int, int, int], steps: int, approximation: str, kind: str) -> str:
    found = [book.of(Tiny(*size, steps, seed)) for seed in SEEDS]
    pairs = [one["fits"][approximation][kind] for one in found if one is not None]
    if len(pairs) < len(SEEDS):
        return "-"
    error, cosine = (statistics.fmean(values) for values in zip(*pairs, strict=True))
    return f"{error:.2f} ({cosine:.2f})"
