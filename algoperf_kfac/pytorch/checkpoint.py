"""What a `state_dict` of `KFAC` holds beside groups and moments: its entry "kfac", made, checked and read.

Plain containers, numbers and tensors only, so that torch.load(weights_only=True) takes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias, TypeVar

from torch import Tensor

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.layers import FallbackSpec, LayerSpec
from algoperf_kfac.pytorch.preconditioner import LayerState
from algoperf_kfac.pytorch.scalings import Scaling

Entry: TypeAlias = Mapping[str, Any]  # of plain containers, numbers and tensors, as deep as they come
Value = TypeVar("Value")

# What version 0.1.0 kept for its one scaling that kept anything, beside the fields of `LayerState`.
_OLD_KEPT = ("second_moment", "second_moment_steps")


def to_dict(
    specs: Iterable[LayerSpec],
    states: Mapping[str, LayerState],
    fallbacks: Iterable[FallbackSpec],
    config: KFACConfig,
    **rest: object,
) -> dict[str, Any]:
    """The entry "kfac"; tensors are not copied.

    Args:
        specs: the covered layers.
        states: their states, by name.
        fallbacks: the other parameters.
        config: the configuration, of which the preconditioner is remembered.
        **rest: taken in as it is.
    """
    return {
        **rest,
        "preconditioner": config.preconditioner,
        "fallbacks": [dataclasses.asdict(f) for f in fallbacks],
        "layers": {
            spec.name: {
                "spec": dataclasses.asdict(spec),
                # Fields by hand: dataclasses.asdict would copy every tensor.
                "state": {f.name: getattr(states[spec.name], f.name) for f in dataclasses.fields(LayerState)},
            }
            for spec in specs
        },
    }


def take_apart(state_dict: dict[str, Any]) -> tuple[Entry, dict[str, Any]]:
    """The entry "kfac" of a state_dict, and groups and moments without it.

    Raises:
        ValueError: if it has none.
    """
    states = {key: dict(value) for key, value in state_dict["state"].items()}
    beside = [entry for value in states.values() if (entry := value.pop("kfac", None)) is not None]
    kfac = state_dict.get("kfac", beside[0] if beside else None)
    if kfac is None:
        raise ValueError("this state_dict is not KFAC's: it has no entry 'kfac'")
    return kfac, {**{k: v for k, v in state_dict.items() if k != "kfac"}, "state": states}


def check(
    kfac: Entry,
    config: KFACConfig,
    known: Mapping[str, LayerSpec],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Compare an entry "kfac" with the optimizer that is to load it.

    Args:
        kfac: the entry.
        config: the optimizer's configuration.
        known: its covered layers, by name.
        shapes: shapes of its parameters, by name.

    Raises:
        ValueError: naming the layer or parameter of another model, or the other preconditioner.
    """
    if kfac["preconditioner"] != config.preconditioner:
        raise ValueError(
            f"state_dict: its preconditioner was {kfac['preconditioner']!r}, and is {config.preconditioner!r} here"
        )
    saved: dict[str, tuple[int, ...] | None] = {f.name: f.shape for f in fallbacks_of(kfac)}
    for name, spec in specs_of(kfac).items():
        here = known.get(name, spec)
        if spec.bias is None:  # it may have proved to be read apart
            here = dataclasses.replace(here, bias=None, in_blocks=spec.in_blocks)
        if here != spec:
            raise ValueError(f"state_dict: layer {name} was {spec}, and is {known[name]} here")
        saved[spec.weight] = spec.weight_shape
        if spec.bias is not None:
            saved[spec.bias] = None  # follows from the layer
    for name in sorted(saved.keys() ^ shapes.keys()):
        what = "missing in it" if name in shapes else "unknown here"
        raise ValueError(f"state_dict: parameter {name} is {what}")
    for name, shape in saved.items():
        if shape not in (None, shapes[name]):
            raise ValueError(f"state_dict: parameter {name} had shape {shape}, and has {shapes[name]} here")


def specs_of(kfac: Entry) -> dict[str, LayerSpec]:
    """The covered layers, by name."""

    def spec(fields: Entry) -> LayerSpec:
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in fields.items()}
        return LayerSpec(**values)

    return {name: spec(entry["spec"]) for name, entry in kfac["layers"].items()}


def fallbacks_of(kfac: Entry) -> list[FallbackSpec]:
    return [FallbackSpec(f["name"], tuple(f["shape"]), f["reason"]) for f in kfac["fallbacks"]]


def layer_state(kfac: Entry, name: str, zeros: LayerState, scaling: Scaling) -> LayerState:
    """A layer's state, copied to the device and dtype of a new one.

    Args:
        kfac: the entry.
        name: the layer's.
        zeros: its state as at the beginning.
        scaling: the optimizer's.
    """
    fields = dict(kfac["layers"][name]["state"])
    old = {key: fields.pop(key) for key in _OLD_KEPT if key in fields}
    kept = fields.pop("kept", {}) | {key: value for key, value in old.items() if value is not None}
    like = zeros.weight
    state = LayerState(**{key: _to(value, like) for key, value in fields.items()})
    # What the scaling does not keep is left behind; what it keeps anew begins at the beginning.
    state.kept = {key: _to(kept.get(key, value), like) for key, value in zeros.kept.items()}
    if state.refreshes:
        state.a_operator, state.b_operator = scaling.operators(state)
    return state


def seed_of(kfac: Entry) -> int:
    """The seed of the label draws. Version 0.1.0 saved a generator instead, which begins with its seed."""
    if "seed" in kfac:
        return int(kfac["seed"])
    return int.from_bytes(bytes(kfac["generator"][:8].tolist()), "little")


def _to(value: Value, like: Tensor) -> Value:
    """Tensors (and lists of them) copied to the device and dtype of the factors."""
    if isinstance(value, Tensor):
        return value.detach().to(device=like.device, dtype=like.dtype, copy=True)  # type: ignore[return-value]
    return [_to(v, like) for v in value] if isinstance(value, list) else value  # type: ignore[return-value]
