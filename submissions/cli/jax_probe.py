"""Sees a JAX model by tracing it: shapes without data, and nothing is computed."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.jax import discovery
from algoperf_kfac.jax.interpreter import Interpreter, Key
from algoperf_kfac.jax.operations import Call
from algoperf_kfac.plan import Load
from submissions.cli.jax_activations import activation_bytes
from submissions.cli.probe import Probe
from submissions.kfac.defaults import DEFAULTS
from workloads.errors import UserError


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model to see.

    Attributes:
        apply: function of (params, *args), a training forward pass.
        params: parameter tree, of arrays or shapes.
        args: the other arguments, arrays or shapes, with the examples of one device.
        segments: number of rows -> number of graphs they belong to, where rows are not examples.
    """

    apply: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    segments: Mapping[int, int] = dataclasses.field(default_factory=dict)


def probe(subject: Subject, submission: str) -> Probe:
    """Trace the model once.

    Args:
        subject: the model.
        submission: "kfac_expand" or "kfac_reduce".

    Raises:
        UserError: it is no K-FAC submission.
    """
    approximation = submission.removeprefix("kfac_")
    if approximation not in DEFAULTS:
        raise UserError(f"{submission} is no K-FAC submission; plan kfac_expand or kfac_reduce")
    config = KFACConfig.from_hyperparameters(None, **DEFAULTS[approximation], approximation=approximation)
    layers = discovery.discover(subject.apply, subject.params, *subject.args, config=config)
    recorder = _LoadRecorder()
    closed, _ = discovery.trace(subject.apply, subject.params, subject.args)
    leaves = jax.tree.leaves((subject.params, *subject.args))
    tags = discovery.sources(subject.params, subject.args)
    jax.eval_shape(lambda *values: Interpreter(recorder).run(closed, values, tags), *leaves)
    loads = {
        name: load.of_examples(subject.segments[int(load.examples)]) if load.examples in subject.segments else load
        for name, load in recorder.loads.items()
    }
    kept = activation_bytes(subject.apply, subject.params, subject.args)
    return Probe(layers.coverage(), config, loads, kept)


class _LoadRecorder(discovery.Survey):
    """Adds up what every weight sees."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: dict[str, Load] = {}
        self._length = 1  # of the scan about to be entered
        self._scans: list[tuple[int, Sequence[str]]] = []

    def stacked(self, names: Sequence[str], length: int) -> Any:
        self._length = length
        return super().stacked(names, length)

    @contextlib.contextmanager
    def slice(self, names: Sequence[str], values: Any) -> Iterator[None]:
        self._scans.append((self._length, names))
        with super().slice(names, values):
            yield
        self._scans.pop()

    def operation(self, key: Key, call: Call, x: jax.Array, out: jax.Array) -> jax.Array:
        name = call.view.source.name
        # A scan over time uses its weights at every step, a scan over layers uses a slice of them at each.
        turns = math.prod(length for length, stacked in self._scans if name not in stacked)
        load = _load(call, turns, x.size, out.size)
        self.loads[name] = self.loads[name] + load if name in self.loads else load
        return super().operation(key, call, x, out)


def _load(call: Call, turns: int, inputs: int, outputs: int) -> Load:
    kernel = 1
    if call.conv is not None:
        kernel = call.conv.kernel[0]
        examples, positions = call.leading[0], math.prod(call.conv.out_size)
        products = examples * (positions if call.kind == "conv" else math.prod(call.conv.in_size))
    else:
        examples = call.leading[0] if call.leading else 1
        positions = math.prod(call.leading[1:])
        products = examples * positions
    return Load(examples, turns * positions, turns * products, turns * inputs, turns * outputs, kernel)
