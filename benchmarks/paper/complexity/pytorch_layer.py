"""What a layer's statistics cost in PyTorch, through the library's own statistics step.

The layer runs forward and backward inside `KFAC.capture`. What `Recorder` does there is told
apart: A is what it makes of inputs, B what it makes of output gradients. Bytes are the most that was allocated
beyond what was there when the part began, by PyTorch's own record of its allocator.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.positions import Positions
from algoperf_kfac.pytorch import KFAC
from algoperf_kfac.pytorch.capture import Capture
from algoperf_kfac.pytorch.recorder import Recorder
from benchmarks.paper.complexity.layers import Layer
from benchmarks.paper.complexity.timing import Timed, medians, whole

# Whose time is which factor's. `end_group` closes A, once `end_pass`, which it calls, has closed B.
PARTS = {"input": "A", "end_group": "A", "output_gradient": "B", "end_pass": "B"}
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def measure(layer: Layer, curves: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """CPU seconds and peak bytes of every curve, and of the plain step and the bare products.

    Args:
        layer: the layer.
        curves: by name, the fields of `KFACConfig`.

    Returns:
        "seconds" and "bytes": by curve "A", "B", "both" and "step"; "plain": "step"; "product" (of all rows) and
        "product of N rows": "A", "B".
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, module = torch.randn(layer.input_shape), build(layer)
    gradient = torch.randn(layer.output_shape) / layer.examples
    steps = {name: Step(layer, module, x, gradient, KFACConfig(**fields)) for name, fields in curves.items()}
    operations: dict[str, Timed] = {name: step.timed for name, step in steps.items()}
    plain = _plain(module, x, gradient)
    operations["plain"] = _cleared(module, whole(plain, "step"))
    for name, rows in (("product", layer.rows), ("product of N rows", layer.examples)):
        operations[name] = _products(layer, rows)
    for _ in range(2):
        for operation in operations.values():
            operation()
    seconds = medians(operations)
    peaks = {name: step.peaks() for name, step in steps.items()} | {"plain": _plain_peaks(module, plain)}
    return {"seconds": seconds, "bytes": peaks}


def build(layer: Layer) -> nn.Module:
    """The module."""
    if not layer.dims:
        return nn.Linear(layer.inputs, layer.outputs)
    padding = (layer.kernel - 1) // 2
    if layer.kind == "conv_transpose":
        return TRANSPOSED[layer.dims - 1](
            layer.inputs,
            layer.outputs,
            layer.kernel,
            layer.stride,
            padding,
            output_padding=layer.stride - 1,
            groups=layer.groups,
        )
    return CONVOLUTIONS[layer.dims - 1](
        layer.inputs, layer.outputs, layer.kernel, layer.stride, padding, groups=layer.groups
    )


def _plain(module: nn.Module, x: Tensor, gradient: Tensor) -> Callable[[], None]:
    def run() -> None:
        module(x).backward(gradient)

    return run


def _cleared(module: nn.Module, operation: Timed) -> Timed:
    """The operation after the gradients have gone, which is not timed."""

    def run() -> Mapping[str, float]:
        module.zero_grad()
        return operation()

    return run


def _plain_peaks(module: nn.Module, plain: Callable[[], None]) -> dict[str, float]:
    module.zero_grad()
    return _peaks(plain)


class Step:
    """Statistics steps of one layer under one configuration."""

    def __init__(self, layer: Layer, module: nn.Module, x: Tensor, gradient: Tensor, config: KFACConfig) -> None:
        self._optimizer = KFAC(module, config=config)
        self._positions = _positions(layer)
        self._module, self._x, self._gradient = module, x, gradient
        self._capture = self._next()
        self._step()  # the first one compares with the weight's gradient, until an update has settled it
        self._optimizer.step()

    def _next(self) -> Capture:
        """A capture of the next step; what the step before left is let go."""
        self._optimizer.zero_grad()
        return self._optimizer.capture(self._positions, loss_normalizer=1.0, force=True)

    def _step(self) -> None:
        with self._capture:
            self._module(self._x).backward(self._gradient)

    def timed(self) -> Mapping[str, float]:
        """CPU seconds of A, of B, of both, and of the whole step, from one step."""
        watch = _Watch()
        self._capture = self._next()
        with watch.on():
            start = time.process_time()
            self._step()
            step = time.process_time() - start
        return {**watch.spent, "both": watch.spent["A"] + watch.spent["B"], "step": step}

    def peaks(self) -> dict[str, float]:
        """Bytes of the same; of both together the larger, as one follows the other."""
        self._capture = self._next()
        with _marked():
            found = _peaks(self._step)
        return {**found, "both": max(found["A"], found["B"])}


class _Watch:
    """CPU seconds of `PARTS`, those of one within another counted once."""

    def __init__(self) -> None:
        self.spent = dict.fromkeys(PARTS.values(), 0.0)
        self._inner = [0.0]

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name, part in PARTS.items():
                timed = self._timed(part, getattr(Recorder, name))
                stack.enter_context(mock.patch.object(Recorder, name, timed))
            yield

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.process_time() - start
                self.spent[part] += spent - self._inner.pop()
                self._inner[-1] += spent

        return timed


def _positions(layer: Layer) -> Positions | None:
    if layer.kind != "graph":
        return None
    return Positions(
        segment_ids=torch.arange(layer.examples).repeat_interleave(layer.size), num_segments=layer.examples
    )


def _products(layer: Layer, rows: int) -> Timed:
    """X^T X of random rows as wide as the factors, by group."""
    groups = layer.groups
    sides = {"A": torch.randn(groups, rows, layer.in_dim), "B": torch.randn(groups, rows, layer.out_dim)}

    def run() -> Mapping[str, float]:
        spent = {}
        for part, matrix in sides.items():
            start = time.process_time()
            matrix.transpose(1, 2) @ matrix
            spent[part] = time.process_time() - start
        return spent

    return run


@contextlib.contextmanager
def _marked() -> Iterator[None]:
    """What `Recorder` does, named in the profile by factor."""

    def marked(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with record_function(f"factor {part}"):
                return function(*args, **kwargs)

        return run

    with contextlib.ExitStack() as stack:
        for name, part in PARTS.items():
            stack.enter_context(mock.patch.object(Recorder, name, marked(part, getattr(Recorder, name))))
        yield


def _peaks(operation: Callable[[], None]) -> dict[str, float]:
    """Bytes that an operation allocates at most, "step", and within its marked parts."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        operation()
    events = found.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    peaks = {"step": _peak([size for _, size in changes])}
    for part in dict.fromkeys(PARTS.values()):
        spans = [(e.start_ns(), e.end_ns()) for e in events if e.name() == f"factor {part}"]
        within = [_peak([size for at, size in changes if start <= at <= end]) for start, end in spans]
        if within:
            peaks[part] = max(within)
    return peaks


def _peak(changes: list[int]) -> float:
    """The largest sum of the first few changes, at least none."""
    total = highest = 0
    for change in changes:
        total += change
        highest = max(highest, total)
    return float(highest)
