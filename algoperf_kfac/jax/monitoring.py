"""What a state shows: the factors, and counts and ratios for monitoring."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from algoperf_kfac.cadence import is_statistics_step
from algoperf_kfac.config import KFACConfig
from algoperf_kfac.errors import check_reduction, no_statistics, warn
from algoperf_kfac.jax.kinds import kind_of
from algoperf_kfac.jax.layer_book import Layers
from algoperf_kfac.jax.mistakes import never_seen
from algoperf_kfac.jax.preconditioner import Blocks, LayerState, corrected, damping_terms
from algoperf_kfac.jax.promotion import with_promotion
from algoperf_kfac.jax.stacks import layer_numbers, layer_states
from algoperf_kfac.jax.transform import find_state
from algoperf_kfac.jax.types import Tree
from algoperf_kfac.judging import Judged, table, worst_first
from algoperf_kfac.layers import NEVER_SEEN
from algoperf_kfac.pace import interval_at


class FactorPair(NamedTuple):
    """A and B of a layer: (P, P), or (groups, P, P) for several groups; a tuple of diagonal blocks above
    `max_factor_dim` (empty where the factor is taken as the identity)."""

    A: Array | tuple[Array, ...]
    B: Array | tuple[Array, ...]


@with_promotion
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
    for name, layer in states.items():
        covered = layers.covered[name]
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


@with_promotion
def metrics(state: Tree, layers: Layers, config: KFACConfig | None = None) -> dict[str, float]:
    """Counts and ratios for monitoring; reading them waits for the device.

    `statistics_steps` counts the updates that came with statistics, `stand_ins` K-FAC directions that vanished or
    overflowed and were replaced by first-order ones. `coverage` is the share of the parameters whose layers have
    statistics: 0 before the first. Per layer: refreshes, failures, skipped refreshes, dropped statistics, drift,
    statistics steps in a row that went by without it (`idle`; of all, how many layers they are), the share of its
    outputs for which the identity stands for B (`vanished`, with approximation="mixed"; counted alike), the graft
    ratio and the cosine between K-FAC direction and momentum, both at the last statistics step and NaN before the
    first; and their totals or means over layers.

    Args:
        state: of `scale_by_kfac`, `kfac`, or a chain with one of them.
        layers: from `discover`.
        config: the configuration: warns if statistics are missing on most statistics steps, and says the
            `refresh_interval` in force, which a `refresh_budget` may have stretched.

    Raises:
        MissingStatisticsError: naming layers that none of many statistics steps has called.
        ValueError: a state without K-FAC.
    """
    inner = find_state(state)
    each = ("refreshes", "failures", "skipped", "dropped", "idle", "vanished", "drift", "graft_ratio", "cosine")
    numbers = layer_numbers(inner.stacks, layers, ("taken", *each))
    took = {name: int(values["taken"]) for name, values in numbers.items()}
    unseen = [name for name, own in numbers.items() if not own["taken"] and own["idle"] >= NEVER_SEEN]
    if unseen:
        raise never_seen(unseen, len(numbers))
    if config is not None or not any(took.values()):  # without any, whatever the intervals are
        check_statistics(int(inner.steps), took, config or KFACConfig())
    at_work = sum(layers.covered[name].spec.num_parameters for name, count in took.items() if count)
    out = {
        "steps": float(inner.steps),
        "statistics_steps": float(max(took.values(), default=0)),
        "stand_ins": float(inner.stand_ins),
        "coverage": at_work / max(layers.coverage().num_parameters, 1),
    }
    if config is not None:
        pace = inner.stacks.pace
        out["refresh_interval"] = float(interval_at(config, 1 if pace is None else int(pace)))
    for key in each:
        values = {name: own[key] for name, own in numbers.items()}
        if key in ("graft_ratio", "cosine"):
            values = {name: _defined(key, value) if took[name] else math.nan for name, value in values.items()}
            seen = [value for value in values.values() if not math.isnan(value)]
            out[key] = sum(seen) / len(seen) if seen else math.nan
        elif key in ("idle", "vanished"):
            out[key] = float(sum(value > 0 for value in values.values()))
        elif key != "drift":
            out[key] = sum(values.values())
        out |= {f"{name}/{key}": value for name, value in values.items()}
    return out


@with_promotion
def summary(state: Tree, layers: Layers, config: KFACConfig, worst: int = 8) -> str:
    """A table of the layers whose directions are the most doubtful, for a person to read; see `KFAC.summary`.

    Args:
        state: of `scale_by_kfac`, `kfac`, or a chain with one of them.
        layers: from `discover`.
        config: the configuration.
        worst: number of layers, those with the smallest graft ratio first.
    """
    stacks = find_state(state).stacks
    numbers = layer_numbers(stacks, layers, ("taken", "refreshes", "idle", "graft_ratio", "cosine"))
    seen = {name: own for name, own in numbers.items() if own["taken"]}
    ratios = {name: own["graft_ratio"] for name, own in seen.items()} if config.length_rule == "graft" else {}
    names = worst_first(numbers, ratios)
    states = layer_states(stacks, layers)
    shown = {}
    for name in names[:worst]:
        cosine = _defined("cosine", seen[name]["cosine"]) if name in seen else None
        level = layers.covered[name].noise_level(config)
        a, b, noise = _eigenvalues(states[name], config, level) if name in seen else (None, None, None)
        own = numbers[name]
        shown[name] = Judged(ratios.get(name), cosine, a, b, int(own["refreshes"]), int(own["idle"]), noise)
    return table(shown, len(names) - len(shown))


def _defined(key: str, value: float) -> float:
    """A number of a layer's state; NaN for the cosine of a layer whose gradient is zero, which has 0 in the state,
    as NaN would stop a run under `jax_debug_nans`."""
    return math.nan if key == "cosine" and value == 0 else value


def _eigenvalues(state: LayerState, config: KFACConfig, level: float) -> tuple[float | None, float | None, int]:
    """Of damped eigenvalues: for A and for B, the share within twice the smallest (None for the identity); and how
    many of both are less than twice the level of rounding."""
    factors, noise = corrected(state), 0

    def share(blocks: Blocks, damping: Array) -> float | None:
        nonlocal noise
        values = [jnp.maximum(jnp.linalg.eigvalsh(m), 0) + damping[:, None] for m in blocks]
        noise += sum(int((v < 2 * level * v.max(-1, keepdims=True)).sum()) for v in values)
        near = sum(int((v < 2 * v.min(-1, keepdims=True)).sum()) for v in values)
        return near / sum(v.size for v in values) if values else None

    a, b = map(share, factors, damping_terms(*factors, config, level))
    return a, b, noise


def check_statistics(steps: int, took: Mapping[str, int], config: KFACConfig) -> None:
    """Warns if by far not every statistics step brought statistics.

    Args:
        steps: updates made.
        took: by layer, how many statistics went into its averages.
        config: says which updates are statistics steps.
    """
    due = sum(is_statistics_step(config, step) for step in range(steps))
    most = max(took.values(), default=due)
    if 2 * most < due:
        warn(
            f"of the {steps} updates so far {due} were statistics steps, and statistics came with {most}: pass "
            "them on the steps of is_statistics_step, update(gradient, state, params, statistics=statistics). "
            "Inside optax.MultiSteps only those of a last micro-batch arrive: ask is_statistics_step(step // k), "
            "and pass the sum (`add`) over the micro-batches with the last"
        )


def _present(blocks: Blocks) -> Array | tuple[Array, ...]:
    """One block as a matrix, without the group dimension where there is one group."""
    squeezed = [m[0] if m.shape[0] == 1 else m for m in blocks]
    return squeezed[0] if len(squeezed) == 1 else tuple(squeezed)
