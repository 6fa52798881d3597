"""What a state shows: the factors, and counts and ratios for monitoring."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from algoperf_kfac.errors import check_reduction, no_statistics
from algoperf_kfac.jax.kinds import kind_of
from algoperf_kfac.jax.layer_book import Layers
from algoperf_kfac.jax.preconditioner import Blocks, corrected
from algoperf_kfac.jax.stacks import layer_states, take_apart
from algoperf_kfac.jax.transform import find_state
from algoperf_kfac.jax.types import Tree


class FactorPair(NamedTuple):
    """A and B of a layer: (P, P), or (groups, P, P) for several groups; a tuple of diagonal blocks above
    `max_factor_dim` (empty where the factor is taken as the identity)."""

    A: Array | tuple[Array, ...]
    B: Array | tuple[Array, ...]


def factors(state: Tree, layers: Layers, *, reduction: str = "sum") -> dict[str, FactorPair]:
    """Each covered layer's A and B from the moving averages: undamped, bias-corrected.

    The product of B and A approximates the layer's block of the Gauss-Newton matrix of the summed loss,
    B = sum_n sum_r ... as in the paper (section 3.2), n over the (average) number of examples of a step; with
    reduction="mean", of the loss averaged over examples. Zero for a layer that no gradient reached yet.

    Args:
        state: of `scale_by_kfac`, `kfac`, or a chain with one of them.
        layers: from `discover`.
        reduction: "sum" or "mean".

    Raises:
        RuntimeError: before the first statistics step; inside a transformation all factors are zero then.
        ValueError: for an unknown reduction, or a state without K-FAC.
    """
    check_reduction(reduction)
    pairs = {}
    states = layer_states(find_state(state).stacks, layers)
    weights = [layer.weight for layer in states.values()]
    known = not any(isinstance(weight, jax.core.Tracer) for weight in weights)
    if states and known and not any(float(weight) for weight in weights):
        raise no_statistics()
    for name, covered in layers.covered.items():
        layer = states[name]
        a, b = corrected(layer)
        if reduction == "sum":
            examples = layer.examples / jnp.maximum(layer.weight, jnp.finfo(layer.weight.dtype).tiny)
            scale = examples[:, None, None] if examples.ndim else examples
            if kind_of(covered.spec).product_in_a:
                a = tuple(m * scale for m in a)
            else:
                b = tuple(m * scale for m in b)
        pairs[name] = FactorPair(_present(a), _present(b))
    return pairs


def metrics(state: Tree, layers: Layers) -> dict[str, float]:
    """Counts and ratios for monitoring; reading them waits for the device.

    `stand_ins` counts K-FAC directions that vanished or overflowed and were replaced by first-order ones. Per
    layer: refreshes, failures, skipped refreshes, dropped statistics, drift, the graft ratio and the cosine between
    K-FAC direction and momentum, both at the last statistics step; and their totals or means over layers.

    Args:
        state: of `scale_by_kfac`, `kfac`, or a chain with one of them.
        layers: from `discover`.
    """
    inner = find_state(state)
    out = {
        "steps": float(inner.steps),
        "stand_ins": float(inner.stand_ins),
        "coverage": layers.coverage().fraction,
    }
    for key in ("refreshes", "failures", "skipped", "dropped", "drift", "graft_ratio", "cosine"):
        rows = jax.device_get({name: getattr(stack, key) for name, stack in inner.stacks.items()})
        values = {name: float(value) for name, value in take_apart(rows, layers).items()}
        out |= {f"{name}/{key}": value for name, value in values.items()}
        total = sum(values.values())
        if key in ("graft_ratio", "cosine") and values:
            out[key] = total / len(values)
        elif key != "drift":
            out[key] = total
    return out


def _present(blocks: Blocks) -> Array | tuple[Array, ...]:
    """One block as a matrix, without the group dimension where there is one group."""
    squeezed = [m[0] if m.shape[0] == 1 else m for m in blocks]
    return squeezed[0] if len(squeezed) == 1 else tuple(squeezed)
