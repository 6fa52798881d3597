"""What a `state_dict` of `KFAC` holds beside groups and moments: its entry "kfac", made, checked and read.

Plain containers, numbers and tensors only, so that torch.load(weights_only=True) takes it.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.layers import FallbackSpec, LayerSpec
from algoperf_kfac.pytorch.preconditioner import LayerState
from algoperf_kfac.pytorch.scalings import Scaling

Entry: TypeAlias = Mapping[str, Any]  # of plain containers, numbers and tensors, as deep as they come
Value = TypeVar("Value")

# Of the entry as tensors: its structure, and the numbers in it; and below what a float64 holds an int exactly.
_TEXT, _NUMBERS = "structure", "numbers"
_EXACT = 2**53

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
    # Where the state has no moments, torch.distributed.checkpoint gives {} for them, or those of the optimizer that
    # is to load it.
    states = {
        key: {
            name: v for name, v in value.items() if value.get("step") and name != "kfac" and not isinstance(v, dict)
        }
        for key, value in state_dict["state"].items()
    }
    beside = [entry for value in state_dict["state"].values() if (entry := value.get("kfac"))]
    kfac = state_dict.get("kfac", beside[0] if beside else None)
    if kfac is None:
        raise ValueError("this state_dict is not KFAC's: it has no entry 'kfac'")
    if _TEXT in kfac:
        kfac = _from_tensors(kfac)
    return kfac, {**{k: v for k, v in state_dict.items() if k != "kfac"}, "state": states}


def to_tensors(kfac: Entry, like: Tensor) -> dict[str, Tensor]:
    """The entry "kfac" as tensors with a dimension: what every option of torch.distributed.checkpoint passes on.

    Strings, lists and what is empty get lost or are refused when it flattens a state, and numbers that are new to
    the optimizer that loads it when it distributes a full one. So the structure is a text, and numbers are beside
    it: its size is that of the structure alone, as loading into tensors of another size fails.

    Args:
        kfac: from `to_dict`.
        like: a tensor on the device to use.
    """
    tensors: dict[str, Tensor] = {}
    numbers: list[float] = []

    def put(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors[f"t{len(tensors)}"] = value.reshape(1) if value.dim() == 0 else value
            return {"tensor": len(tensors) - 1, "scalar": value.dim() == 0}
        if isinstance(value, Mapping):
            return {"dict": [[key, put(v)] for key, v in value.items()]}
        if isinstance(value, list | tuple):
            return {"list": [put(v) for v in value]}
        if type(value) in (int, float) and (type(value) is float or abs(value) < _EXACT):
            numbers.append(value)
            return {"number": len(numbers) - 1, "type": type(value).__name__}
        return {"value": value}

    text = json.dumps(put(kfac)).encode()
    for name, data in ((_TEXT, text), (_NUMBERS, struct.pack(f"<{len(numbers)}d", *numbers))):
        tensors[name] = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(like.device)
    return tensors


def _from_tensors(tensors: Entry) -> dict[str, Any]:
    """The entry "kfac" from what `to_tensors` made of it."""
    text, packed = (tensors[name].cpu().numpy().tobytes() for name in (_TEXT, _NUMBERS))
    numbers = struct.unpack(f"<{len(packed) // 8}d", packed)

    def get(node: Any) -> Any:
        if "tensor" in node:
            tensor = tensors[f"t{node['tensor']}"]
            return tensor.reshape(()) if node["scalar"] else tensor
        if "dict" in node:
            return {key: get(v) for key, v in node["dict"]}
        if "list" in node:
            return [get(v) for v in node["list"]]
        if "number" in node:
            return int(numbers[node["number"]]) if node["type"] == "int" else numbers[node["number"]]
        return node["value"]

    return dict(get(json.loads(text)))


def check(
    kfac: Entry,
    scaling: Scaling,
    known: Mapping[str, LayerSpec],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Compare an entry "kfac" with the optimizer that is to load it.

    Args:
        kfac: the entry.
        scaling: the optimizer's.
        known: its covered layers, by name.
        shapes: shapes of its parameters, by name.

    Raises:
        ValueError: naming the layer or parameter of another model, or the other preconditioner; or it was saved
            without the eigenbases that this configuration reads.
    """
    here = scaling.config.preconditioner
    if kfac["preconditioner"] != here:
        raise ValueError(f"state_dict: its preconditioner was {kfac['preconditioner']!r}, and is {here!r} here")
    for name, entry in kfac["layers"].items():
        if scaling.keeps_bases and entry["state"]["refreshes"] and not _has_bases(entry["state"]):
            raise ValueError(
                f"state_dict: layer {name} was saved without eigenbases, which scaling={scaling.config.scaling!r} "
                f"with drift_tolerance={scaling.config.drift_tolerance} and "
                f"decomposition={scaling.config.decomposition!r} reads; load it with those it was saved with"
            )
    saved: dict[str, tuple[int, ...] | None] = {f.name: f.shape for f in fallbacks_of(kfac)}
    for name, spec in specs_of(kfac).items():
        mine = known.get(name, spec)
        if spec.bias is None:  # it may have proved to be read apart
            mine = dataclasses.replace(mine, bias=None, in_blocks=spec.in_blocks)
        if mine != spec:
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
    fields.setdefault("vanished", zeros.vanished)  # version 0.1.0 had none
    state = LayerState(**{key: _to(value, like) for key, value in fields.items()})
    # What the scaling does not keep is left behind; what it keeps anew begins at the beginning.
    state.kept = {key: _to(kept.get(key, value), like) for key, value in zeros.kept.items()}
    if _has_bases(fields):
        # Made anew: version 0.1.0 saved bases in any case.
        state.a_operator, state.b_operator = scaling.operators(state)
        if not scaling.keeps_bases:
            state.a_basis, state.b_basis = [], []
    return state


def _has_bases(state: Entry) -> bool:
    """Whether a saved layer has bases or inverses: from its first refresh on, where they were kept."""
    return bool(state["a_basis"] or state["b_basis"])


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
