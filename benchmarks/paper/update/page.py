"""The page: seconds and memory of an update by batch size, and what runs out of a given memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from benchmarks.kept import Book
from benchmarks.paper.complexity.worker import ROWS
from benchmarks.paper.update.cases import BATCHES, OPTIMIZERS, Case

HEAD = f"""# One update of a wide residual network

Written by `python -m benchmarks.paper update` from [the kept results](../results/update.jsonl), with what is
missing of them run first. PyTorch, WRN-10-2 (depth 10, widened twice, batch normalisation) on random images of
16 x 16 x 3 in float32, on one thread; the paper's networks and images are larger. Every update takes statistics and
new damped inverses of all layers, as the paper's form of K-FAC does. *Part* is expand from as few examples as have
{ROWS:,} rows of a layer, but two at least.

Seconds are of the processor, medians of three updates after one; memory is the most that was resident beyond what
the process had before the first one.
"""


def page(book: Book[Case], memory_gb: float) -> str:
    """The whole page; what was not run is a dash."""
    return "\n".join(
        [
            HEAD,
            _origin(book),
            "",
            *_table("CPU seconds of an update, in brackets in NadamW's", lambda case: _seconds(book, case)),
            "",
            *_table("Peak memory in GB", lambda case: _peak(book, case)),
            "",
            *_table(f"Within {memory_gb:g} GB (RLIMIT_AS)", lambda case: _outcome(book, case, memory_gb)),
            "",
        ]
    )


def _origin(book: Book[Case]) -> str:
    versions, devices = ", ".join(book.values("version")), "; ".join(book.values("device"))
    return f"Measured with version {versions} on {devices}, while other programs were running."


def _table(title: str, cell: Callable[[Case], str]) -> Iterator[str]:
    yield f"{title}:"
    yield ""
    yield f"| batch | {' | '.join(OPTIMIZERS)} |"
    yield "|---" * (1 + len(OPTIMIZERS)) + "|"
    for batch in BATCHES:
        cells = [cell(Case(optimizer, batch)) for optimizer in OPTIMIZERS]
        yield f"| {batch:,} | {' | '.join(cells)} |"


def _seconds(book: Book[Case], case: Case) -> str:
    found, first = book.of(case), book.of(dataclasses.replace(case, optimizer=OPTIMIZERS[0]))
    if found is None or first is None:
        return "-"
    mine, base = (sum(result["seconds"].values()) for result in (found, first))
    return f"{mine:.2f} ({mine / base:.2f})"


def _peak(book: Book[Case], case: Case) -> str:
    found = book.of(case)
    return "-" if found is None else f"{found['peak_bytes'] / 1e9:.2f}"


def _outcome(book: Book[Case], case: Case, memory_gb: float) -> str:
    found = book.of(dataclasses.replace(case, memory_gb=memory_gb))
    return "-" if found is None else {"fits": "fits", "out": "**runs out**"}[found["outcome"]]
