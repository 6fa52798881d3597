"""Sees a JAX model by tracing it: shapes without data, and nothing is computed."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from algoperf_kfac.plan import Load

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.jax import capture, discovery
from algoperf_kfac.jax.interpreter import Interpreter, Key
from algoperf_kfac.jax.operations import Call
from commands.errors import UserError
from submissions.cli.jax_activations import activation_bytes
from submissions.cli.probe import Probe
from submissions.cli.references import line


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

    @property
    def batch_size(self) -> int:
        """Examples on one device, for arguments with the batch first; 1 if no array is among them."""
        return next((leaf.shape[0] for leaf in jax.tree.leaves(self.args) if leaf.shape), 1)


def probe(subject: Subject, config: KFACConfig) -> Probe:
    """Trace the model once.

    Args:
        subject: the model.
        config: the submission's.

    Raises:
        UserError: the model cannot be traced.
    """
    try:
        return _probe(subject, config)
    except Exception as error:
        raise UserError(f"the model cannot be traced ({line(error)})") from error


def _probe(subject: Subject, config: KFACConfig) -> Probe:
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
    captured = activation_bytes(*_tapped(subject, layers), subject.args)
    return Probe(layers.coverage(), config, loads, kept, max(captured - kept, 0.0))


def _tapped(subject: Subject, layers: discovery.Layers) -> tuple[Callable[..., Any], Any]:
    """The forward pass of a statistics step, a function of ((params, probes), *args), and shapes of the first.

    Positions are as the submissions give them, as far as memory goes.
    """
    closed, _ = discovery.trace(subject.apply, subject.params, subject.args)
    notes = discovery.survey(closed, subject.params, subject.args)
    dtypes = {name: jnp.promote_types(layers.shapes[la.spec.weight][1], "f") for name, la in layers.covered.items()}
    resolved = capture._resolve(layers, notes, "gradient", dtypes)
    tags = discovery.sources(subject.params, subject.args)

    def probes() -> dict[str, Any]:
        examples = {name: capture._layout(calls).num_examples for name, calls in resolved.items()}
        return {name: capture._probe(la, examples[name], dtypes[name]) for name, la in layers.covered.items()}

    def apply(both: Any, *args: Any) -> Any:
        params, sums = both
        visitor = capture._Tapper(layers.covered, resolved, sums, dtypes, lambda name: None)
        return Interpreter(visitor).run(closed, [*jax.tree.leaves(params), *jax.tree.leaves(args)], tags)

    return apply, (subject.params, jax.eval_shape(probes))


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
