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
READING = """
- With a loss at each position and attention between them the models are in neither setting: neither is exact in
  any layer. Of the trained ones expand is at a smaller angle to the exact block in 70 of 72 pairs (seed, size,
  kind), of the fresh ones in 59; the others but two are values and outputs: fresh attention all but averages,
  under which reduce is exact for values ([exactness](exactness.md), row 7). Queries and keys are the worst of
  both: reduce's cosine there is .25 to .42 after training.
- The number of positions hardly moves the trained ones: from 4 to 16 no kind's mean cosine rises or falls by
  more than .07.
- With the width both lose after training, from 8 to 24: expand's cosine .03 (head) to .16 (queries, keys),
  reduce's .05 (head) to .13 (values, outputs). Three seeds, three widths: the ranges over seeds part only for
  expand's MLP, and reduce's values and outputs, queries and keys. This says nothing of widths of hundreds. A
  small error is not a good direction, either.
"""


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
