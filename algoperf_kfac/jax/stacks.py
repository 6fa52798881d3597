"""Layers of equal shape share one state, with the layer as leading dimension: one operation serves all of them, and
compilation takes its time for each shape instead of for each layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from algoperf_kfac.jax.layer_book import CoveredLayer, Layers
from algoperf_kfac.jax.preconditioner import LayerState

Pytree = TypeVar("Pytree")


@dataclasses.dataclass(frozen=True)
class Stack:
    """Layers of equal shape.

    Attributes:
        names: of the layers, in the model's order.
        numbers: their places among all covered layers.
        layers: the layers themselves.
        dtype: of their factors, at least float32.
    """

    names: tuple[str, ...]
    numbers: tuple[int, ...]
    layers: tuple[CoveredLayer, ...]
    dtype: DTypeLike


def stacks_of(layers: Layers) -> dict[str, Stack]:
    """The covered layers by shape, each stack under the name of its first layer."""
    alike: dict[tuple[object, ...], list[tuple[str, int, CoveredLayer]]] = {}
    for number, (name, layer) in enumerate(layers.covered.items()):
        spec = layer.spec
        shape = (
            *(spec.groups, spec.out_dim, spec.factor_in_dim, spec.in_blocks, spec.out_blocks),
            *(layer.slices, layer.dtype),
        )
        alike.setdefault(shape, []).append((name, number, layer))
    stacks = {}
    for members in alike.values():
        names, numbers, covered = zip(*members, strict=True)
        stacks[names[0]] = Stack(names, numbers, covered, covered[0].dtype)
    return stacks


def take_apart(values: Mapping[str, Pytree], layers: Layers) -> dict[str, Pytree]:
    """What each layer alone has of what stacks have, by name in the model's order.

    Args:
        values: by stack, pytrees of arrays with the layer as leading dimension.
        layers: from `discover`.

    Raises:
        ValueError: the stacks are those of other layers.
    """
    stacks = stacks_of(layers)
    sizes = {key: len(jax.tree.leaves(value)[0]) for key, value in values.items()}
    if sizes != {key: len(stack.names) for key, stack in stacks.items()}:
        raise ValueError(f"the state is of other layers ({sorted(values)}) than `layers` ({sorted(stacks)})")

    def one(value: Pytree, i: int) -> Pytree:
        layer: Pytree = jax.tree.map(lambda leaf: leaf[i], value)
        return layer

    found = {name: one(values[key], i) for key, stack in stacks.items() for i, name in enumerate(stack.names)}
    return {name: found[name] for name in layers.covered}


def layer_states(states: Mapping[str, LayerState], layers: Layers) -> dict[str, LayerState]:
    """The state of each layer alone, by name in the model's order.

    Args:
        states: by stack, from a `KFACState`.
        layers: from `discover`.

    Raises:
        ValueError: the states are those of other layers.
    """
    return take_apart(states, layers)


def stack_trees(trees: list[Pytree]) -> Pytree:
    """Trees of equal structure as one, with a new leading dimension."""
    stacked: Pytree = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    return stacked


def broadcast(flags: Array, like: Array) -> Array:
    """(layers,) shaped to select entries of an array with the layer as leading dimension."""
    return flags.reshape(flags.shape + (1,) * (like.ndim - flags.ndim))
