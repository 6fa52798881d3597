"""A model seen through one training step, by tracing it: shapes without data, and nothing is computed."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.cost import Load, Plan, Sighting, make_plan
from algoperf_kfac.jax.activations import activation_bytes
from algoperf_kfac.jax.discovery import discover
from algoperf_kfac.jax.interpreter import Key, Visitor
from algoperf_kfac.jax.operations import Call
from algoperf_kfac.jax.scalings import scaling_of
from algoperf_kfac.jax.tapped_model import AllSums, TappedModel
from algoperf_kfac.jax.tracing import trace
from algoperf_kfac.jax.types import ApplyFn, Tree
from algoperf_kfac.positions import BY_GRADIENT, Layout, as_candidates


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model to see.

    Attributes:
        apply: function of (params, *args), a training forward pass.
        params: parameter tree, of arrays or shapes.
        args: the other arguments, arrays or shapes, with the examples of one device.
        segments: number of rows -> number of graphs they belong to, where rows are not examples.
    """

    apply: ApplyFn
    params: Tree
    args: tuple[Tree, ...]
    segments: Mapping[int, int] = dataclasses.field(default_factory=dict)

    @property
    def batch_size(self) -> int:
        """Examples on one device, for arguments with the batch first; 1 if no array is among them."""
        return next((leaf.shape[0] for leaf in jax.tree.leaves(self.args) if leaf.shape), 1)


def plan(
    apply_fn: ApplyFn,
    params: Tree,
    *args: Tree,
    config: KFACConfig | None = None,
    devices: int = 1,
    **hyperparameters: object,
) -> Plan:
    """See `algoperf_kfac.plan`."""
    seen = sight(Subject(apply_fn, params, args), KFACConfig.updated(config, hyperparameters))
    return plan_of(seen, devices=devices)


def plan_of(seen: Sighting, *, devices: int = 1) -> Plan:
    """The plan of a model as it was seen by JAX: a `KFACState` and its step."""
    return make_plan(
        seen.coverage,
        seen.loads,
        seen.config,
        scaling_of(seen.config),
        devices=devices,
        activation_bytes=seen.activation_bytes,
        capture_bytes=seen.capture_bytes,
        moments_of_covered=1 if seen.config.length_rule == "rms" else 2,
        output_bytes=seen.output_bytes,
        counts=2,  # of steps and of replaced directions
    )


def sight(subject: Subject, config: KFACConfig) -> Sighting:
    """Trace a statistics step of the model.

    Raises:
        ValueError: the model cannot be traced.
    """
    try:
        return _sight(subject, config)
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise ValueError(f"the model cannot be traced ({reason})") from error


def _sight(subject: Subject, config: KFACConfig) -> Sighting:
    layers = discover(subject.apply, subject.params, *subject.args, config=config)
    model = trace(subject.apply, subject.params, subject.args)
    # Positions as the submissions give them, as far as memory goes.
    tapped = TappedModel(model, layers, as_candidates(BY_GRADIENT), rows=config.row_limit)
    recorder = _LoadRecorder(tapped.layouts())
    model.show(recorder)
    loads = {
        name: load.of_examples(subject.segments[int(load.examples)]) if load.examples in subject.segments else load
        for name, load in recorder.loads.items()
    }

    def statistics_step(both: tuple[Tree, AllSums], *args: Tree) -> list[Array]:
        params, sums = both
        return tapped.run(params, args, sums)

    kept = activation_bytes(subject.apply, subject.params, subject.args)
    sums = jax.eval_shape(tapped.zeros)
    captured = activation_bytes(statistics_step, (subject.params, sums), subject.args)
    return Sighting(
        coverage=layers.coverage(),
        config=config,
        loads=loads,
        activation_bytes=kept,
        capture_bytes=max(captured - kept, 0.0),
        output_bytes=_output_bytes(subject),
        examples=subject.batch_size,
    )


def _output_bytes(subject: Subject) -> float:
    """Of what can be differentiated; masks and lengths among the outputs are not the loss's to keep."""
    outputs = jax.tree.leaves(jax.eval_shape(subject.apply, subject.params, *subject.args))
    return float(sum(o.size * o.dtype.itemsize for o in outputs if jnp.issubdtype(o.dtype, jnp.floating)))


class _LoadRecorder(Visitor):
    """Adds up what every weight sees.

    Args:
        layouts: by operation, from `TappedModel.layouts`; of others dimension 0 is over examples.
    """

    def __init__(self, layouts: Mapping[Key, Layout]) -> None:
        self.loads: dict[str, Load] = {}
        self._layouts = layouts
        self._length = 1  # of the scan about to be entered
        self._scans: list[tuple[int, Sequence[str]]] = []

    def sliced(self, names: Sequence[str], length: int) -> Tree:
        self._length = length
        return None

    @contextlib.contextmanager
    def slice(self, names: Sequence[str], values: Tree) -> Iterator[None]:
        self._scans.append((self._length, names))
        yield
        self._scans.pop()

    def operation(self, key: Key, call: Call, x: Array, out: Array) -> Array:
        name = call.view.source.name
        # A scan over time uses its weights at every step, a scan over layers uses a slice of them at each.
        turns = math.prod(length for length, sliced in self._scans if name not in sliced)
        load = _load(call, self._layouts.get(key), turns, x.size, out.size)
        self.loads[name] = self.loads[name] + load if name in self.loads else load
        return out


def _load(call: Call, layout: Layout | None, turns: int, inputs: int, outputs: int) -> Load:
    """What one call puts on its weight.

    Args:
        call: the operation.
        layout: of its rows, where it is known.
        turns: how often the scans around it run it.
        inputs: entries of its input.
        outputs: entries of its output.
    """
    kernel = 1
    if call.conv is not None:
        kernel = call.conv.kernel[0]
        examples, positions = call.leading[0], math.prod(call.conv.out_size)
        products = examples * (positions if call.kind == "conv" else math.prod(call.conv.in_size))
    else:
        layout = layout or Layout.of(None, call.rows, call.view.source.name)
        examples, positions = layout.num_examples, layout.positions
        products = examples * positions
    return Load(examples, turns * positions, turns * products, turns * inputs, turns * outputs, kernel)
