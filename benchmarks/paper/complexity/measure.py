"""Measures what is missing of the grid, a process for each framework, and keeps each result as it comes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper.complexity import layers, records
from benchmarks.paper.complexity.layers import Layer, Sweep
from benchmarks.paper.complexity.worker import ONE_THREAD
from commands.errors import UserError, tell
from workloads.runner.jobs import CHECKOUT

# CPU seconds of a measurement: in any case, and for each multiply-add of both factors (measured where docs/ were).
EXPECTED = {"pytorch": (0.3, 9e-10), "jax": (2.9, 1.9e-9)}
Measure = Callable[[str, Sequence[Layer]], Iterator[dict[str, Any]]]


def expected(framework: str, wanted: Sequence[Layer]) -> float:
    """CPU seconds that measuring layers takes, roughly."""
    start, each = EXPECTED[framework]
    work = (layer.groups * layer.rows * (layer.in_dim**2 + layer.out_dim**2) for layer in wanted)
    return sum(start + each * one for one in work)


def run(
    sweeps: tuple[Sweep, ...],
    frameworks: Sequence[str],
    kept: Path,
    *,
    again: bool = False,
    measure: Measure | None = None,
) -> None:
    """Measures the layers that no result is kept of, or all of them again.

    Args:
        sweeps: which.
        frameworks: in which.
        kept: the file of results.
        again: whether to measure also those of which there is one.
        measure: yields the results of layers in a framework, in order; default: in a process.

    Raises:
        UserError: a process failed; what it had measured is kept.
    """
    results = {} if again else records.read(kept)
    wanted = layers.layers_of(sweeps)
    todo = {framework: records.missing(wanted, framework, results) for framework in frameworks}
    count = sum(map(len, todo.values()))
    seconds = sum(expected(framework, missing) for framework, missing in todo.items())
    already = len(wanted) * len(frameworks) - count
    tell(f"==> {count} layers to measure, about {seconds:.0f} s of CPU time; {already} are kept already")
    done = 0
    for framework, missing in todo.items():
        if not missing:
            continue
        for result in (measure or in_process)(framework, missing):
            records.add([result], kept)
            done += 1
            tell(f"    {done} of {count}: {framework}, {describe(Layer(**result['layer']))}")


def describe(layer: Layer) -> str:
    """A layer in a few words."""
    size = "x".join([str(layer.size)] * max(1, layer.dims))
    shape = f"{layer.kind} {layer.examples} x {size}, {layer.inputs} to {layer.outputs}"
    return f"{shape}, kernel {layer.kernel}" if layer.dims else shape


def in_process(framework: str, wanted: Sequence[Layer]) -> Iterator[dict[str, Any]]:
    """The results of layers, from a process of its own that runs on one thread.

    Raises:
        UserError: it failed.
    """
    command = [sys.executable, "-m", "benchmarks.paper.complexity.worker", framework]
    lines = "".join(json.dumps(layers.as_dict(layer)) + "\n" for layer in wanted)
    with tempfile.TemporaryFile("w+") as questions, tempfile.TemporaryFile("w+") as said:
        questions.write(lines)
        questions.seek(0)
        process = subprocess.Popen(
            command,
            stdin=questions,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            cwd=CHECKOUT,
            env={**os.environ, **ONE_THREAD},
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                yield json.loads(line)
        except BaseException:
            process.terminate()  # interrupted between two results
            raise
        finally:
            process.stdout.close()
            code = process.wait()
        if code:
            said.seek(0)
            last = (said.read().strip().splitlines() or ["no message"])[-1]
            raise UserError(f"measuring in {framework} failed ({last}); what was measured is kept")
