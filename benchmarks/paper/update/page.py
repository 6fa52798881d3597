"""The page: seconds and memory of an update by batch size, and what runs out of a given memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from benchmarks.paper.complexity.worker import ROWS
from benchmarks.paper.update.cases import BATCHES, OPTIMIZERS, Case, Results, key

HEAD = f"""# One update of a wide residual network

Written by `python -m benchmarks.paper update` from [the kept results](../results/update.jsonl), with what is
missing of them run first. PyTorch, WRN-10-2 (depth 10, widened twice, batch normalisation) on random images of
16 x 16 x 3 in float32, on one thread; the paper's networks and images are larger. Every update takes statistics and
new damped inverses of all layers, as the paper's form of K-FAC does. *Part* is expand from as few examples as have
{ROWS:,} rows of a layer, but two at least.

Seconds are of the processor, medians of three updates after one; memory is the most that was resident beyond what
the process had before the first one.
"""


def page(results: Results, memory_gb: float) -> str:
    """The whole page; what was not run is a dash."""
    return "\n".join(
        [
            HEAD,
            _origin(results),
            "",
            *_table(results, "CPU seconds of an update, in brackets in NadamW's", _seconds),
            "",
            *_table(results, "Peak memory in GB", _peak),
            "",
            *_table(results, f"Within {memory_gb:g} GB (RLIMIT_AS)", lambda r, c: _outcome(r, c, memory_gb)),
            "",
        ]
    )


def _origin(results: Results) -> str:
    devices = sorted({result["device"] for result in results.values() if "device" in result})
    versions = sorted({result["version"] for result in results.values() if "version" in result})
    return (
        f"Measured with version {', '.join(versions)} on {'; '.join(devices)}, while other programs were running."
    )


def _table(results: Results, title: str, cell: Any) -> Iterator[str]:
    yield f"{title}:"
    yield ""
    yield f"| batch | {' | '.join(OPTIMIZERS)} |"
    yield "|---" * (1 + len(OPTIMIZERS)) + "|"
    for batch in BATCHES:
        cells = [cell(results, Case(optimizer, batch)) for optimizer in OPTIMIZERS]
        yield f"| {batch:,} | {' | '.join(cells)} |"


def _of(results: Results, case: Case) -> dict[str, Any] | None:
    return results.get(key(dataclasses.asdict(case)))


def _seconds(results: Results, case: Case) -> str:
    found, first = _of(results, case), _of(results, dataclasses.replace(case, optimizer=OPTIMIZERS[0]))
    if found is None or first is None:
        return "-"
    mine, base = (sum(result["seconds"].values()) for result in (found, first))
    return f"{mine:.2f} ({mine / base:.2f})"


def _peak(results: Results, case: Case) -> str:
    found = _of(results, case)
    return "-" if found is None else f"{found['peak_bytes'] / 1e9:.2f}"


def _outcome(results: Results, case: Case, memory_gb: float) -> str:
    found = _of(results, dataclasses.replace(case, memory_gb=memory_gb))
    return "-" if found is None else {"fits": "fits", "out": "**runs out**"}[found["outcome"]]
