"""States in flax's format (`flax.serialization`), those that version 0.1.0 saved included.

A `KFACState` is a tuple of arrays and dictionaries, which flax and orbax save as they are. Of the states of layers,
flax is told here: in 0.1.0 what the scaling keeps stood in fields of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import numpy as np
from flax import serialization

from algoperf_kfac.errors import listed
from algoperf_kfac.jax.preconditioner import FIELDS, LayerState
from algoperf_kfac.jax.stacks import Stacks
from algoperf_kfac.jax.types import Tree

StateDict: TypeAlias = dict[str, Any]
"""A state as nested dictionaries with arrays at the leaves."""

# Of 0.1.0: a tuple of one array or none, and a number that was kept without it, too.
OLD_FIELDS = ("second_moment", "second_moment_steps")


def from_orbax(like: Tree, restored: Tree) -> Tree:
    """A state from what orbax restores without a template: `checkpointer.restore(path)`; also of what 0.1.0 saved.

    Args:
        like: a state of the same structure, for instance a fresh one: `optimizer.init(params)`.
        restored: lists and dictionaries with arrays at the leaves.

    Raises:
        ValueError: it is the state of other layers.
    """
    return serialization.from_state_dict(like, _as_state_dict(restored))


def _as_state_dict(node: Tree) -> Tree:
    """What orbax restores in flax's form: lists as dictionaries by number, and such for nothing."""
    if isinstance(node, Mapping):
        return {str(key): _as_state_dict(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return {str(number): _as_state_dict(value) for number, value in enumerate(node)}
    return {} if node is None else node


def layer_to_dict(state: LayerState) -> StateDict:
    """A layer's state, or that of a stack, as nested dictionaries."""
    return {name: serialization.to_state_dict(getattr(state, name)) for name in FIELDS}


def layer_from_dict(like: LayerState, saved: StateDict) -> LayerState:
    """The inverse of `layer_to_dict`; also of what 0.1.0 saved.

    Args:
        like: a state of the same structure, for instance a fresh one.
        saved: the dictionaries.

    Raises:
        ValueError: the dictionaries are those of another state.
    """
    saved = _renewed(saved)
    if saved.keys() != set(FIELDS):
        raise ValueError(f"a layer's state has the fields {sorted(FIELDS)}, the saved one {sorted(saved)}")
    parts = {name: serialization.from_state_dict(getattr(like, name), saved[name], name=name) for name in FIELDS}
    if like.kept.keys() != parts["kept"].keys():
        raise ValueError(f"the scaling keeps {sorted(like.kept)}, the saved state has {sorted(parts['kept'])}")
    return LayerState(**parts)


def _renewed(saved: StateDict) -> StateDict:
    """What 0.1.0 saved with the fields of today."""
    saved = dict(saved)
    if "taken" not in saved:  # not counted then: at least those of the refreshes
        saved["taken"] = np.asarray(saved["refreshes"])
    if "idle" not in saved:
        saved["idle"] = np.zeros_like(saved["refreshes"])
    if "vanished" not in saved:
        saved["vanished"] = np.zeros_like(saved["drift"])
    moment = saved.get("second_moment")
    if not isinstance(moment, dict):
        return saved
    kept = {"second_moment": moment["0"], "second_moment_steps": saved["second_moment_steps"]} if moment else {}
    return {name: value for name, value in saved.items() if name not in OLD_FIELDS} | {"kept": kept}


def stacks_to_dict(stacks: Stacks) -> StateDict:
    """The states of all layers with the layers' names, as text in an array: a loaded state is checked by them."""
    names = {key: "\n".join(members.names).encode() for key, members in stacks.members.items()}
    paced = {} if stacks.pace is None else {"pace": stacks.pace}
    return {
        "states": {key: serialization.to_state_dict(state) for key, state in stacks.items()},
        "names": {key: np.frombuffer(text, np.uint8) for key, text in names.items()},
        **paced,
    }


def stacks_from_dict(like: Stacks, saved: StateDict) -> Stacks:
    """The inverse of `stacks_to_dict`; also of what 0.1.0 saved. A pace is taken where there is one to be kept.

    Args:
        like: states of the same layers, for instance fresh ones.
        saved: the dictionaries.

    Raises:
        ValueError: the dictionaries are those of other layers.
    """
    orders = {key: members.names for key, members in like.members.items()}
    pace = like.pace
    if "states" in saved:
        pace = None if pace is None else saved.get("pace", pace)
        saved = {key: value for key, value in saved.items() if key != "pace"}
    if saved.keys() == {"states"}:  # orbax keeps arrays alone
        states = saved["states"]
        found = {key: orders.get(key, (key,)) for key in states}
    elif saved.keys() == {"states", "names"}:
        states = saved["states"]
        found = {key: tuple(bytes(np.asarray(text)).decode().split("\n")) for key, text in saved["names"].items()}
    else:
        # Layers of a stack were in the order of their calls, under the name of the first.
        states, found = {}, {}
        for key, members in like.members.items():
            order = [place for _, place in sorted(zip(members.numbers, itertools.count()))]
            first, back = members.names[order[0]], np.argsort(order)
            if first in saved:
                found[key] = members.names
                states[key] = jax.tree.map(lambda leaf, back=back: np.asarray(leaf)[back], saved[first])
        if len(found) < len(saved):
            found = {key: (key,) for key in saved}
    if found != orders:
        raise ValueError(
            f"the saved state is of the layers {_all(found)}, the state to load it into of {_all(orders)}"
        )
    loaded = {key: serialization.from_state_dict(state, states[key], name=key) for key, state in like.items()}
    return Stacks(loaded, like.members, masked=like.masked, pace=pace)


def _all(names: Mapping[str, tuple[str, ...]]) -> str:
    return listed(sorted(name for members in names.values() for name in members))


serialization.register_serialization_state(LayerState, layer_to_dict, layer_from_dict)
serialization.register_serialization_state(Stacks, stacks_to_dict, stacks_from_dict)
