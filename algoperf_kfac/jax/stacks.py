"""Layers of equal shape share one state, with the layer as leading dimension: one operation serves all of them, and
compilation takes its time for each shape instead of for each layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.errors import listed
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

    def noise_level(self, config: KFACConfig) -> float:
        """Of the layer whose inputs and outputs are rounded most; see `KFACConfig.noise_level`."""
        return max(layer.noise_level(config) for layer in self.layers)


@dataclasses.dataclass(frozen=True)
class Members:
    """Which layers a stack holds.

    Attributes:
        names: in the order of the leading dimension.
        numbers: their places in the model; not compared, as equal layers may be called in another order.
    """

    names: tuple[str, ...]
    numbers: tuple[int, ...] = dataclasses.field(compare=False)


@jax.tree_util.register_pytree_with_keys_class
class Stacks(dict[str, LayerState]):
    """The states of layers by stack. A pytree that knows the layers' names, so that no state is read as another's.

    Args:
        states: by stack, the layer as leading dimension.
        members: of each stack.
        masked: whether other layers are left out, as their parameters are masked.
        pace: steps that two refreshes of all layers are to be apart, int32 (); None without a `refresh_budget`.
    """

    def __init__(
        self,
        states: Mapping[str, LayerState],
        members: Mapping[str, Members],
        *,
        masked: bool = False,
        pace: Array | None = None,
    ) -> None:
        super().__init__(states)
        self.members = dict(members)
        self.masked = masked
        self.pace = pace

    def __or__(self, states: Mapping[str, LayerState]) -> Stacks:  # type: ignore[override]
        """The same with some states replaced."""
        return Stacks({**self, **states}, self.members, masked=self.masked, pace=self.pace)

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        # Not under the key of "stacks" itself: what 0.1.0 saved had its layers in another order there.
        children: tuple[Any, ...] = ((jax.tree_util.GetAttrKey("states"), dict(self)),)
        if self.pace is not None:
            children = (*children, (jax.tree_util.GetAttrKey("pace"), self.pace))
        return children, (tuple(sorted(self.members.items(), key=lambda item: item[0])), self.masked)

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> Stacks:
        # Not through dict(): jax also unflattens with stand-ins that are no dictionaries.
        members, masked = static
        stacks = cls({}, dict(members), masked=masked, pace=children[1] if len(children) > 1 else None)
        if isinstance(children[0], Mapping):
            stacks.update(children[0])
        return stacks


def stacks_of(layers: Layers) -> dict[str, Stack]:
    """The covered layers by shape, each stack under the name of its first layer.

    Within a stack they are in the order of their names, whatever order they are called in: that may change from one
    function of the same parameters to the next.
    """
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
        names, numbers, covered = zip(*sorted(members, key=lambda member: member[0]), strict=True)
        stacks[names[0]] = Stack(names, numbers, covered, covered[0].dtype)
    return stacks


def members_of(stacks: Mapping[str, Stack]) -> dict[str, Members]:
    """Which layers the stacks hold."""
    return {key: Members(stack.names, stack.numbers) for key, stack in stacks.items()}


def check_members(states: Mapping[str, LayerState], stacks: Mapping[str, Stack]) -> None:
    """Raises ValueError, naming the layers, unless the states are those of the stacks."""
    expected = members_of(stacks)
    found = states.members if isinstance(states, Stacks) else {}
    if found == expected:
        return
    known, here = ({name for m in members.values() for name in m.names} for members in (found, expected))
    if known == here:
        raise ValueError(
            "the state's layers have other shapes than those of the optimizer: make a new state with init"
        )
    raise ValueError(
        f"the state is of other layers than the optimizer: {listed(sorted(known - here)) or 'none'} only in the "
        f"state, {listed(sorted(here - known)) or 'none'} only in the optimizer (another model, exclude or mask?)"
    )


def layer_states(states: Mapping[str, LayerState], layers: Layers) -> dict[str, LayerState]:
    """The state of each layer alone, by name in the model's order; of those that the state holds.

    Args:
        states: by stack, from a `KFACState`.
        layers: from `discover`.

    Raises:
        ValueError: the states are those of other layers.
    """
    stacks = _held(states, layers)

    def one(state: LayerState, i: int) -> LayerState:
        layer: LayerState = jax.tree.map(lambda leaf: leaf[i], state)
        return layer

    found = {name: one(states[key], i) for key, stack in stacks.items() for i, name in enumerate(stack.names)}
    return {name: found[name] for name in layers.covered if name in found}


def layer_numbers(
    states: Mapping[str, LayerState], layers: Layers, fields: Iterable[str]
) -> dict[str, dict[str, float]]:
    """Scalars of each layer's state, by name in the model's order; waits for the device, once.

    Args:
        states: by stack.
        layers: from `discover`.
        fields: of `LayerState`.

    Raises:
        ValueError: the states are those of other layers.
    """
    stacks = _held(states, layers)
    rows = jax.device_get({key: {field: getattr(states[key], field) for field in fields} for key in stacks})
    found = {
        name: {field: float(values[i]) for field, values in rows[key].items()}
        for key, stack in stacks.items()
        for i, name in enumerate(stack.names)
    }
    return {name: found[name] for name in layers.covered if name in found}


def _held(states: Mapping[str, LayerState], layers: Layers) -> dict[str, Stack]:
    """The stacks of the layers that a state holds: all, or those that are not masked."""
    if isinstance(states, Stacks) and states.masked:
        layers = layers.only({name for members in states.members.values() for name in members.names})
    stacks = stacks_of(layers)
    check_members(states, stacks)
    return stacks


def stack_trees(trees: list[Pytree]) -> Pytree:
    """Trees of equal structure as one, with a new leading dimension."""
    stacked: Pytree = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    return stacked


def broadcast(flags: Array, like: Array) -> Array:
    """(layers,) shaped to select entries of an array with the layer as leading dimension."""
    return flags.reshape(flags.shape + (1,) * (like.ndim - flags.ndim))


def choose(flags: Array, new: Array, old: Array) -> Array:
    """The entries of `new` for which flags, (layers,), are set, else those of `old`; see `reductions`."""
    return lax.select(lax.broadcast_in_dim(flags, old.shape, (0,)), new, old)


def select(chosen: Array, new: LayerState, old: LayerState) -> LayerState:
    """The new state of some layers of a stack, (layers,), and the old one of the others."""
    state: LayerState = jax.tree.map(lambda n, o: choose(chosen, n, o), new, old)
    return state
