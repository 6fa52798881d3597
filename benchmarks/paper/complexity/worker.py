"""Measures layers in a process of its own: layers come as lines of JSON, results go back as such.

    python -m benchmarks.paper.complexity.worker FRAMEWORK

One thread and one framework a process, so that CPU time is that of the operation.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import sys
import time
from collections.abc import Mapping
from typing import Any

import algoperf_kfac
from benchmarks.paper.complexity import layers
from benchmarks.paper.complexity.layers import Layer

ROWS = 1024  # of expand from a part of the rows
WHOLE: Mapping[str, Any] = {"max_factor_dim": 2**14}  # factors are not cut into blocks
CURVES: Mapping[str, Mapping[str, Any]] = {
    "expand": {"approximation": "expand", **WHOLE},
    "reduce": {"approximation": "reduce", **WHOLE},
    "part": {"approximation": "expand", "statistics_rows": ROWS, **WHOLE},
}
# To be set before a framework is imported.
ONE_THREAD = {
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NPROC"), "1"),
    "JAX_PLATFORMS": "cpu",
}


def result(framework: str, layer: Layer) -> dict[str, Any]:
    """What is kept of a layer."""
    adapter = importlib.import_module(f"benchmarks.paper.complexity.{framework}_layer")
    start = time.process_time()
    curves = {name: fields for name, fields in CURVES.items() if layer.kind != "graph" or name != "part"}
    found = adapter.measure(layer, curves)
    return {
        "framework": framework,
        "layer": layers.as_dict(layer),
        **{name: _rounded(tables) for name, tables in found.items()},
        "rows": ROWS,
        "took": _digits(time.process_time() - start),
        "version": algoperf_kfac.__version__,
        "device": device(framework),
    }


def device(framework: str) -> str:
    """The processor, and the framework's version."""
    return f"{processor()}, {framework} {importlib.import_module(MODULES[framework]).__version__}"


def processor() -> str:
    """Its name, as far as it is known."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()


MODULES = {"pytorch": "torch", "jax": "jax"}


def _rounded(tables: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    return {name: {part: _digits(value) for part, value in parts.items()} for name, parts in tables.items()}


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def main(framework: str) -> int:
    """Answers each line until there are none; what others print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(result(framework, Layer(**json.loads(line)))), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
