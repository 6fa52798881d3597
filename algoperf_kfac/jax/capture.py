"""Capture: gradient and curvature statistics of one batch from one forward and one backward pass.

The model is not edited: it is traced to JAX's primitives and evaluated again with a `tap` behind every weighted
operation of the covered layers (see `interpreter.py`, `statistics.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Var

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.jax import fisher, statistics, tied
from algoperf_kfac.jax.discovery import (
    CoveredLayer,
    Layers,
    Survey,
    check_dtypes,
    named_leaves,
    sources,
    survey,
    trace,
)
from algoperf_kfac.jax.factors import Layout, Positions, resolve_positions, to_front
from algoperf_kfac.jax.interpreter import Interpreter, Key, Lookup, Visitor
from algoperf_kfac.jax.operations import Call
from algoperf_kfac.jax.statistics import Statistics, Sums, Tap
from algoperf_kfac.jax.tied import TiedSums
from algoperf_kfac.layers import LayerSpec

# Per layer, for each of its calls: layout, mask and segment ids.
Resolved = dict[str, dict[Key, tuple[Layout, Any, Any]]]
AnySums = Sums | TiedSums
AnyPositions = Positions | Array | str | Sequence[Positions | Array | str] | None


class MissingStatisticsError(RuntimeError):
    """A declared layer did not receive its inputs or its output gradients."""


class _Tapper(Visitor):
    """Puts a tap behind the weighted operations of the covered layers."""

    def __init__(
        self,
        layers: dict[str, CoveredLayer],
        resolved: Resolved,
        probes: dict[str, AnySums],
        dtypes: dict[str, Any],
        on_backward: Callable[[str], None],
    ) -> None:
        self._by_weight = {layer.spec.weight: layer for layer in layers.values()}
        self._resolved = resolved
        self._probes = probes
        self._dtypes = dtypes
        self._on_backward = on_backward

    def operation(self, key: Key, call: Call, x: Array, out: Array) -> Array:
        layer = self._by_weight.get(call.view.source.name)
        if layer is None:
            return out
        name = layer.spec.name
        layout, mask, ids = self._resolved[name][key]
        static = Tap(layer.spec, call, layout, self._dtypes[name], self._on_backward)
        tap = tied.tap_output if layer.spec.kind == "embedding" else statistics.tap
        return tap(static, out, jax.lax.stop_gradient(x), mask, ids, self._probes[name])

    def lookup(self, key: Key, lookup: Lookup, rows: Array, out: Array) -> Array:
        layer = self._by_weight.get(lookup.source.name)
        if layer is None:
            return out
        name = layer.spec.name
        layout, mask, ids = self._resolved[name][key]
        static = Tap(layer.spec, None, layout, self._dtypes[name], self._on_backward)
        return tied.tap_lookup(static, out, rows, mask, ids, self._probes[name])

    def stacked(self, names: Sequence[str], length: int) -> dict[str, AnySums]:
        layers = [self._by_weight[name].spec.name for name in names if name in self._by_weight]
        return {
            name: jax.tree.map(lambda t: t.reshape(length, t.shape[0] // length, *t.shape[1:]), self._probes[name])
            for name in layers
        }

    @contextlib.contextmanager
    def slice(self, names: Sequence[str], values: dict[str, AnySums]) -> Iterator[None]:
        before = self._probes
        self._probes = before | values
        try:
            yield
        finally:
            self._probes = before


def value_grad_and_statistics(
    apply_fn: Callable[..., Any],
    loss_fn: Callable[..., Any],
    layers: Layers,
    config: KFACConfig,
    *,
    has_aux: bool = False,
    loss_type: Any = None,
) -> Callable[..., tuple[Any, Any, dict[str, Statistics]]]:
    """Like `jax.value_and_grad`, with the statistics of every covered layer.

    Args:
        apply_fn: function of (params, *args) to the model's outputs, or to (outputs, aux) with `has_aux`.
        loss_fn: function of (outputs, *args) to a scalar, the loss averaged over examples; or to a mapping with
            "summed" and "n_valid_examples", as AlgoPerf's loss functions return, whose quotient is the loss.
        layers: from `discover`.
        config: the configuration; `fisher` says whose output gradients make B.
        has_aux: see `apply_fn`.
        loss_type: an AlgoPerf loss type or its name; needed for fisher="mc" and "exact".

    Returns:
        A function of (params, *args, positions=None, loss_normalizer=None, rng=None, loss_mask=None) to
        (loss, gradient, statistics), the loss being (loss, aux) with `has_aux`. `positions` says which positions
        count and to which example they belong: a mask, "gradient", a `Positions`, a sequence of them of which a
        layer takes the first that fits, or a mapping from patterns of layer names to one of those.
        `loss_normalizer` is what the summed loss was divided by, by default the "n_valid_examples" of a mapping or
        else the number of examples. `rng` is the key for fisher="mc", `loss_mask` the mask of its labels.

    Raises:
        MissingStatisticsError: (the function) naming layers that were not called or whose output does not reach
            the loss.
        ValueError: (the function) for parameters that are not those of `layers`, or positions that do not fit.
    """
    if config.fisher != "empirical" and loss_type is None:
        raise ValueError(f"fisher={config.fisher!r} needs loss_type, e.g. loss_type='softmax_cross_entropy'")

    def run(
        params: Any,
        *args: Any,
        positions: AnyPositions | Mapping[str, AnyPositions] = None,
        loss_normalizer: Array | float | None = None,
        rng: Array | None = None,
        loss_mask: Array | None = None,
    ) -> tuple[Any, Any, dict[str, Statistics]]:
        check_params(layers, params)
        closed, shapes = trace(apply_fn, params, args)
        notes = survey(closed, params, args)
        dtypes = {n: _wide(layers.shapes[la.spec.weight][1]) for n, la in layers.covered.items()}
        resolved = _resolve(layers, notes, positions, dtypes)
        probes = {
            name: _probe(layer, _layout(resolved[name]).num_examples, dtypes[name])
            for name, layer in layers.covered.items()
        }
        tags, rest = sources(params, args), jax.tree.leaves(args)
        reached: set[str] = set()
        out_tree = jax.tree.structure(shapes)
        used = _used(lambda outputs: loss_fn(outputs, *args), shapes[0] if has_aux else shapes)

        def forward(params: Any, probes: dict[str, AnySums]) -> tuple[list[Array], tuple[Any, list[Any]]]:
            visitor = _Tapper(layers.covered, resolved, probes, dtypes, reached.add)
            flat = Interpreter(visitor).run(closed, [*jax.tree.leaves(params), *rest], tags)
            outputs, aux = (
                jax.tree.unflatten(out_tree, flat) if has_aux else (jax.tree.unflatten(out_tree, flat), None)
            )
            leaves, tree = jax.tree.flatten(outputs)
            # Outputs that the loss does not read have no gradient: nor do the layers behind them.
            floats = [t for t, is_used in zip(leaves, used, strict=True) if is_used]
            others = [None if is_used else t for t, is_used in zip(leaves, used, strict=True)]
            structures.append(tree)
            return floats, (aux, others)

        structures: list[Any] = []
        floats, backward, (aux, others) = jax.vjp(forward, params, probes, has_aux=True)

        def outputs(floats: list[Array]) -> Any:
            values = iter(floats)
            return jax.tree.unflatten(structures[-1], [next(values) if t is None else t for t in others])

        def loss(floats: list[Array]) -> tuple[Array, Array | None]:
            value = loss_fn(outputs(floats), *args)
            if isinstance(value, Mapping):
                return value["summed"] / value["n_valid_examples"], value["n_valid_examples"]
            return value, None

        (value, n_valid), cotangent = jax.value_and_grad(loss, has_aux=True)(floats)
        gradient, sums = backward(cotangent)
        normalizer = n_valid if loss_normalizer is None else loss_normalizer
        if config.fisher == "empirical":
            gathered = _finalise(layers, resolved, sums, normalizer)
        else:
            count, cotangent_of = fisher.cotangents(config, outputs, floats, loss_type, loss_mask, rng)
            # The exact Fisher is the sum over its columns, a sampled one the mean over the draws.
            scale = count**0.5 if config.fisher == "exact" else 1.0
            gathered = fisher.sweep(
                count, lambda number: _finalise(layers, resolved, backward(cotangent_of(number))[1], scale)
            )
        missed = [name for name in layers.covered if name not in reached]
        if missed:
            raise MissingStatisticsError(
                f"{len(missed)} of {len(layers.covered)} layers missed their output gradients: {', '.join(missed)}."
                " Their outputs do not reach the loss: leave them out with exclude=[...]"
            )
        return ((value, aux) if has_aux else value), gradient, gathered

    return run


def _used(loss: Callable[[Any], Any], shapes: Any) -> list[bool]:
    """Which leaves of the outputs are floating and go into the loss."""
    jaxpr = jax.make_jaxpr(loss)(shapes).jaxpr
    needed = {v for v in jaxpr.outvars if isinstance(v, Var)}
    for eqn in reversed(jaxpr.eqns):
        if needed.intersection(eqn.outvars):
            needed.update(v for v in eqn.invars if isinstance(v, Var))
    return [v in needed and jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in jaxpr.invars]


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def check_params(layers: Layers, params: Any) -> None:
    """Raises ValueError, naming the parameter, unless `params` has the leaves of `layers`."""
    check_dtypes(params)
    leaves = named_leaves(params)
    for name in sorted(layers.shapes.keys() ^ leaves.keys()):
        what = "missing" if name in layers.shapes else "unknown: K-FAC was made without it"
        raise ValueError(f"parameter {name} is {what}")
    for name, leaf in leaves.items():
        if (tuple(leaf.shape), jnp.dtype(leaf.dtype)) != layers.shapes[name]:
            shape, dtype = layers.shapes[name]
            raise ValueError(
                f"parameter {name} has shape {tuple(leaf.shape)} and dtype {leaf.dtype}; when K-FAC was made it "
                f"had {shape} and {dtype.name}"
            )


def _resolve(
    layers: Layers,
    notes: Survey,
    positions: Any,
    dtypes: dict[str, Any],
) -> Resolved:
    """Fit the positions to every call of every layer.

    Raises:
        MissingStatisticsError: naming layers without a call.
        ValueError: if the calls of a layer differ in their examples.
    """
    missing = [name for name, layer in layers.covered.items() if layer.spec.weight not in notes.calls]
    if missing:
        raise MissingStatisticsError(
            f"{len(missing)} of {len(layers.covered)} layers missed their inputs: {', '.join(missing)}. The model "
            "does not call them with these arguments: leave them out with exclude=[...]"
        )
    resolved: Resolved = {}
    for name, layer in layers.covered.items():
        resolved[name] = {}
        uses: dict[Key, Call | Lookup] = {**notes.calls[layer.spec.weight]}
        if layer.spec.kind == "embedding":
            uses |= notes.lookups.get(layer.spec.weight, {})
        for key, use in uses.items():
            chosen = _positions_for(positions, layer.spec, use.leading)
            if chosen is not None and isinstance(use, Call) and use.conv is not None:
                chosen = _batch_first(chosen)
            resolved[name][key] = resolve_positions(chosen, use.leading, name, dtypes[name])
        numbers = {layout.num_examples for layout, _, _ in resolved[name].values()}
        if len(numbers) > 1:
            raise ValueError(
                f"layer {name} was called with {' and then with '.join(map(str, sorted(numbers)))} examples in one "
                f"forward pass: its calls must share their examples, or exclude it (exclude=[{name!r}])"
            )
    return resolved


def _positions_for(positions: Any, spec: LayerSpec, leading: tuple[int, ...]) -> Positions | None:
    """What describes a layer's call: by its name, or the first candidate whose shape fits."""
    if isinstance(positions, Mapping):
        matches = (value for pattern, value in positions.items() if fnmatch.fnmatchcase(spec.name, pattern))
        positions = next(matches, None)
        if isinstance(positions, Positions) or hasattr(positions, "shape"):
            return _as_positions(positions)
    if positions is None:
        return None
    candidates = positions if isinstance(positions, list | tuple) else [positions]
    rows = leading[0] if leading else 1
    segmented = [p for p in map(_as_positions, candidates) if p.segment_ids is not None]
    for candidate in map(_as_positions, candidates):
        if _fits(candidate, leading):
            return candidate
    if segmented and all(rows != p.num_segments for p in segmented):
        # Taken as they are, these rows would silently be examples with a single position each.
        sizes = ", ".join(str(p.segment_ids.shape[0]) for p in segmented if p.segment_ids is not None)
        raise ValueError(
            f"layer {spec.name} has {rows} rows in dimension 0, neither those of segment_ids ({sizes}) nor one per "
            f"segment ({segmented[0].num_segments}): describe its positions by its name, "
            f"positions={{{spec.name!r}: ..., ...}}"
        )
    return None


def _batch_first(positions: Positions) -> Positions:
    """The same for a convolution, whose examples come first whatever the other layers do."""
    mask = positions.mask
    if mask is not None and not isinstance(mask, str) and mask.ndim > 1:
        mask = jnp.moveaxis(mask, positions.batch_dim, 0)
    return dataclasses.replace(positions, mask=mask, batch_dim=0)


def _fits(positions: Positions, leading: tuple[int, ...]) -> bool:
    if not leading:
        return False
    sizes = to_front(leading, positions.batch_dim if len(leading) > positions.batch_dim else 0)
    if positions.segment_ids is not None and sizes[0] != positions.segment_ids.shape[0]:
        return False
    if positions.mask is None or isinstance(positions.mask, str):
        return True
    mask = tuple(positions.mask.shape)
    return len(mask) <= len(sizes) and sizes[: len(mask)] == to_front(
        mask, positions.batch_dim if len(mask) > 1 else 0
    )


def _as_positions(positions: Any) -> Positions:
    """A bare array or "gradient" is a mask."""
    return positions if isinstance(positions, Positions) else Positions(mask=positions)


def _layout(calls: dict[Key, tuple[Layout, Any, Any]]) -> Layout:
    """The layout of a layer's first call, which stands for all."""
    return next(iter(calls.values()))[0]


def _probe(layer: CoveredLayer, examples: int, dtype: Any) -> AnySums:
    if layer.spec.kind == "embedding":
        return tied.probe(layer.spec, examples, dtype)
    return statistics.probe(layer.spec, layer.stack, examples, dtype)


def _finalise(
    layers: Layers, resolved: Resolved, sums: dict[str, AnySums], normalizer: Any
) -> dict[str, Statistics]:
    gathered = {}
    for name, layer in layers.covered.items():
        valid = (sums[name].counts > 0).sum(1)[0].astype(sums[name].counts.dtype)
        scale = valid if normalizer is None else jnp.asarray(normalizer, sums[name].counts.dtype)
        collected, layout = sums[name], _layout(resolved[name])
        if isinstance(collected, TiedSums):
            gathered[name] = tied.finalise(layer.spec, collected, layout, scale)
        else:
            gathered[name] = statistics.finalise(layer.spec, collected, layout, scale)
    return gathered
