"""States in flax's format (`flax.serialization`), those that version 0.1.0 saved included.

A `KFACState` is a tuple of arrays and dictionaries, which flax and orbax save as they are. Of the states of layers,
flax is told here: in 0.1.0 what the scaling keeps stood in fields of its own.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from flax import serialization

from algoperf_kfac.jax.preconditioner import FIELDS, LayerState

StateDict: TypeAlias = dict[str, Any]
"""A state as nested dictionaries with arrays at the leaves."""

# Of 0.1.0: a tuple of one array or none, and a number that was kept without it, too.
OLD_FIELDS = ("second_moment", "second_moment_steps")


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
    moment = saved.get("second_moment")
    if not isinstance(moment, dict):
        return saved
    kept = {"second_moment": moment["0"], "second_moment_steps": saved["second_moment_steps"]} if moment else {}
    return {name: value for name, value in saved.items() if name not in OLD_FIELDS} | {"kept": kept}


serialization.register_serialization_state(LayerState, layer_to_dict, layer_from_dict)
