"""What the layers' states show: the factors, counts and ratios, and a table for a person to read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from algoperf_kfac.config import TABLE, KFACConfig
from algoperf_kfac.errors import check_reduction, no_statistics
from algoperf_kfac.judging import Judged, table, worst_first
from algoperf_kfac.pytorch.layer_book import Layers
from algoperf_kfac.pytorch.preconditioner import LayerState

COUNTED = ("refreshes", "failures", "skipped")


class FactorPair(NamedTuple):
    """A and B of a layer: (P, P), or (groups, P, P) for grouped convolutions; a tuple of diagonal blocks above
    `max_factor_dim` (empty where the factor is taken as the identity)."""

    A: Tensor | tuple[Tensor, ...]
    B: Tensor | tuple[Tensor, ...]


def factors(layers: Layers, reduction: str) -> dict[str, FactorPair]:
    """Each covered layer's A and B; see `KFAC.factors`."""
    check_reduction(reduction)
    states = layers.states
    if states and not any(float(state.weight) for state in states.values()):
        raise no_statistics()
    pairs = {}
    for name, state in states.items():
        a, b = state.corrected()
        if reduction == "sum":
            examples = state.examples / state.weight.clamp(min=torch.finfo(state.weight.dtype).tiny)
            if layers.covered[name].spec.kind == TABLE:  # one factor for both
                a = [m * examples for m in a]
            b = [m * examples for m in b]
        pairs[name] = FactorPair(_present(a), _present(b))
    return pairs


def metrics(
    layers: Layers, config: KFACConfig, judged: Mapping[str, Mapping[str, Tensor]], errors: Mapping[str, float]
) -> dict[str, float]:
    """Counts and ratios, of all layers and of each; see `KFAC.metrics`.

    Args:
        layers: the book of layers.
        config: the configuration.
        judged: by name of a ratio, by layer: its value at the last statistics step.
        errors: by layer, how far what was captured was from the weight's gradient.
    """
    states = layers.states
    out = {"coverage": layers.coverage().fraction, "missed_layers": float(len(layers.missed))}
    for key in COUNTED:
        out[key] = float(sum(getattr(state, key) for state in states.values()))
    out["dropped"] = sum(float(state.dropped) for state in states.values())
    out["vanished"] = float(sum(float(state.vanished) > 0 for state in states.values()))
    out["idle"] = float(sum(count > 0 for count in layers.missed_steps.values()))
    for key, values in judged.items():
        numbers = {name: float(value) for name, value in values.items() if name in states}
        if numbers:
            out[key] = sum(numbers.values()) / len(numbers)
        out |= {f"{name}/{key}": number for name, number in numbers.items()}
    out |= {f"{name}/gradient_error": error for name, error in errors.items()}
    for name, state in states.items():
        out |= {f"{name}/{key}": float(getattr(state, key)) for key in (*COUNTED, "drift", "dropped", "vanished")}
        out[f"{name}/idle"] = float(layers.missed_steps.get(name, 0))
        out[f"{name}/noise"] = float(_noise(state, config))
    out["noise"] = sum(out[f"{name}/noise"] for name in states)
    return out


def summary(
    layers: Layers, config: KFACConfig, ratios: Mapping[str, Tensor], cosines: Mapping[str, Tensor], worst: int
) -> str:
    """A table for a person to read; see `KFAC.summary`."""
    known = {name: float(ratio) for name, ratio in ratios.items()}
    names = worst_first((name for name in layers.covered if name in layers.states), known)
    shown = {}
    for name in names[:worst]:
        state = layers.states[name]
        shown[name] = Judged(
            known.get(name),
            float(cosines[name]) if name in cosines else None,
            _at_damping(state.a_values),
            _at_damping(state.b_values),
            state.refreshes,
            layers.missed_steps.get(name, 0),
            _noise(state, config) if state.a_values or state.b_values else None,
        )
    return table(shown, len(names) - len(shown))


def _at_damping(values: list[Tensor]) -> float | None:
    """The share of a factor's damped eigenvalues within twice the smallest; None where there are none."""
    if not values:
        return None
    near = sum(int((v < 2 * v.amin(-1, keepdim=True)).sum()) for v in values)
    return near / sum(v.numel() for v in values)


def _noise(state: LayerState, config: KFACConfig) -> int:
    """How many eigenvalues of A and B, damping included, are less than twice the level of rounding.

    They are those below it where damping is that level itself, and none where it is more than twice that.
    """
    twice = 2 * state.noise_level(config)
    values = [*state.a_values, *state.b_values]
    return sum(int((v < twice * v.amax(-1, keepdim=True)).sum()) for v in values)


def _present(blocks: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
    """One block as a matrix, without the group dimension where there is one group."""
    squeezed = [m[0] if len(m) == 1 else m for m in blocks]
    return squeezed[0] if len(squeezed) == 1 else tuple(squeezed)
