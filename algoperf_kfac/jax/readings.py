"""Which layers a traced model calls, and how the rows of every call are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TypeAlias

from jax.typing import DTypeLike

from algoperf_kfac import errors
from algoperf_kfac.jax.factors import Reading
from algoperf_kfac.jax.interpreter import Key
from algoperf_kfac.jax.kinds import kind_of
from algoperf_kfac.jax.layer_book import CoveredLayer, paths
from algoperf_kfac.jax.operations import Use
from algoperf_kfac.jax.tracing import Survey
from algoperf_kfac.layers import also_read_by
from algoperf_kfac.positions import Candidates, Rows, candidates_for, check_fits, choose
from algoperf_kfac.subset import RowLimit

EMPTY = "The batch has 0 examples: leave such a step out, update(...) included"
NOT_CALLED = "The model does not call them with these arguments: leave them out with exclude=[...]"

Readings: TypeAlias = dict[str, dict[Key, Reading]]
"""Per layer, how each of its calls is read."""


def called_layers(layers: Mapping[str, CoveredLayer], notes: Survey) -> dict[str, CoveredLayer]:
    """The layers that the model calls with these arguments, in the order of `layers`.

    Raises:
        MissingStatisticsError: it calls none of them.
        ValueError: naming a layer that it reads in ways that it did not when K-FAC was made.
    """
    called = {name: layer for name, layer in layers.items() if layer.spec.weight in notes.calls}
    biases = notes.biases
    for name, layer in layers.items():
        weight, bias = layer.spec.weight, layer.spec.bias
        stored = None if layer.bias is None else layer.bias.moves
        reader = next((next(iter(notes.other_uses[p])) for p in (weight, bias) if p in notes.other_uses), None)
        if name not in called and weight in notes.lookups:
            reader = reader or "lookups alone"
        for key, call in notes.calls.get(weight, {}).items():
            source = biases.get(key)
            if bias is not None and (source is None or source.name != bias):
                reader = reader or "a call without its bias"
            elif bias is not None and source is not None and source.moves != stored:
                reader = reader or "a call with its bias in another order"
            if (call.view.groups, call.view.out_dim) != (layer.view.groups, layer.view.out_dim):
                reader = reader or "a call in another layout"
        if reader is not None:
            raise ValueError(
                f"layer {name} is {also_read_by(reader)}. It was not when K-FAC was made: make it with arguments "
                f"like these, or with exclude=[{name!r}]"
            )
    if layers and not called:
        raise errors.missing_statistics(dict.fromkeys(layers, "inputs"), len(layers), NOT_CALLED)
    return called


def read_calls(
    layers: Mapping[str, CoveredLayer], notes: Survey, positions: Candidates, limit: RowLimit
) -> Readings:
    """Fit the positions to every call of every layer.

    Calls with equal numbers of examples see the same examples, others see others.

    Args:
        layers: the layers.
        notes: what the model does with them.
        positions: which positions count.
        limit: `KFACConfig.row_limit`.

    Raises:
        MissingStatisticsError: naming layers that see no examples.
        ValueError: naming a layer that the positions do not fit, or positions that fit no layer.
    """
    uses = {name: kind_of(layer.spec).counted(notes.uses(layer.spec.weight)) for name, layer in layers.items()}
    rows = {name: rows_of(layer, uses[name]) for name, layer in layers.items()}
    empty = [name for name, own in rows.items() if any(0 in one.leading for one in own.values())]
    if empty:
        raise errors.missing_statistics(dict.fromkeys(empty, "its inputs"), len(layers), EMPTY)
    check_fits(
        positions,
        {name: [*own.values()] for name, own in rows.items()},
        {path for name in notes.names for path in paths(name)},
    )
    readings: Readings = {}
    for name, layer in layers.items():
        of_calls = {key: _read(name, positions, own, layer.dtype) for key, own in rows[name].items()}
        sizes = tuple(dict.fromkeys(reading.layout.num_examples for reading in of_calls.values()))
        # Of the rows of experts some may have few: all are taken.
        by_row, ways = kind_of(layer.spec).by_row, candidates_for(name, positions)
        own = None if by_row else limit.fitted(layer.spec.block_sizes, ways)
        readings[name] = {key: reading.among(sizes, own) for key, reading in of_calls.items()}
    return readings


def rows_of(layer: CoveredLayer, uses: Mapping[Key, Use]) -> dict[Key, Rows]:
    """The rows of a layer's uses, examples where they were when K-FAC was made, if its uses are like those."""
    rows = {key: use.rows for key, use in uses.items()}
    if [len(own.leading) for own in rows.values()] != [number for number, _ in layer.examples]:
        return rows
    dims = (dim for _, dim in layer.examples)
    return {key: dataclasses.replace(own, examples=dim) for (key, own), dim in zip(rows.items(), dims, strict=True)}


def _read(name: str, positions: Candidates, rows: Rows, dtype: DTypeLike) -> Reading:
    """Fit the positions to one call of a layer, segment ids of several dimensions first."""
    for one in candidates_for(name, positions):
        reading = Reading.of_segments(one, rows, name, dtype)
        if reading is not None:
            return reading
    rows = rows.described(candidates_for(name, positions))
    return Reading.of(choose(name, positions, rows), rows, name, dtype)
