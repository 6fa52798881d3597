"""Made-up results of `benchmarks.paper damping`."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.paper.damping.grid import Case


def made_up(case: Case, best: float = 1.0) -> dict[str, Any]:
    """A run that ends at 0.5 at the rate `best` and damping 1e-2, and higher elsewhere; NadamW at 3."""
    off = 2.5 if case.scaling == "nadamw" else abs(math.log10(case.damping) + 2) + abs(case.rate - best)
    end = 0.5 + off
    curve = [[step, end + 0.01 * (case.steps - step)] for step in range(10, case.steps + 1, 10)]
    return {"curve": curve, "seconds": 0.1, "version": "0"}
