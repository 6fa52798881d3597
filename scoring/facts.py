"""The data files of the benchmark's versions, and what all of them say of a workload by its name."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

DATA = Path(__file__).with_name("data")


@cache
def versions() -> tuple[str, ...]:
    """The versions there are data files for, oldest first."""
    names = [path.stem.removeprefix("algoperf_") for path in DATA.glob("algoperf_*.json")]
    return tuple(sorted(names, key=lambda name: [int(part) for part in name.split(".")]))


@cache
def targets() -> dict[str, tuple[str, float, bool]]:
    """Metric, validation target and whether it is to be maximized, by workload; the newest version's.

    It tells whether a run had come to its end where its own meta_data do not; nothing is scored by it.
    """
    found = {}
    for version in versions():
        for name, one in json.loads((DATA / f"algoperf_{version}.json").read_text())["workloads"].items():
            found[name] = (one["metric"], float(one["target"]), one["direction"] == "maximize")
    return found
