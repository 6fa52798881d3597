"""From the factors A and B to a preconditioned gradient: averages, damping, products. One layer at a time;
`transform` maps these functions over layers of equal shape, `refresh` decomposes, `scalings` say what is applied.

For a layer's gradient G as a matrix (P_out x P_in), per channel group,

    inverse:              (B + l_B I)^-1 G (A + l_A I)^-1
    eigen, power p:       U_B [ (U_B^T G U_A) / ((b + l_B)(a + l_A)^T)^p ] U_A^T
    eigen, second_moment: U_B [ (U_B^T M U_A) / sqrt(v) ] U_A^T,  v the second moment of U_B^T G U_A

with B = U_B diag(b) U_B^T and A = U_A diag(a) U_A^T. Factors are tuples of diagonal blocks, usually one; an empty
tuple stands for the identity. Nothing here waits for the device: what depends on values is selected on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.jax.reductions import are_finite, dots, nonzero, traces
from algoperf_kfac.jax.statistics import Statistics
from algoperf_kfac.layers import LayerSpec

if TYPE_CHECKING:
    from algoperf_kfac.jax.scalings import Scaling

# Least mean eigenvalue assumed for damping: a channel group whose factor is zero still decomposes with the others.
MEAN_FLOOR = 1e-15

Blocks: TypeAlias = tuple[Array, ...]
"""The diagonal blocks of a matrix, (groups, size, size) each; none for the identity."""


@dataclasses.dataclass(frozen=True)
class LayerState:
    """Statistics and preconditioner of one layer; a pytree of arrays.

    Attributes:
        a, b: moving averages of A and of B per example (blocks of (groups, size, size)), not corrected.
        weight: what the averages are divided by to correct their bias, ().
        examples: moving average of the number of examples, not corrected; (), or (groups,) of scanned layers.
        dropped: how many statistics were left out because they were not finite, ().
        taken: how many statistics went into the averages, ().
        idle: statistics steps in a row that went by without the layer, ().
        vanished: share of the output features for which the identity stands for B, as their gradients sum to zero
            over positions, at the last statistics step, ().
        a_operator, b_operator: what the momentum is multiplied by, the identity before the first refresh; empty
            for a scaling without operators.
        a_basis, b_basis: eigenbases, where the scaling keeps them.
        a_values, b_values: damped eigenvalues, (groups, size) per block; kept as the bases are.
        kept: what else the scaling keeps, by name.
        refreshes: successful refreshes so far, ().
        failures: failed decompositions so far, retries included, ().
        skipped: refreshes that kept the basis because it had not drifted, ().
        drift: off-diagonal share of the factors in the old basis at the last refresh, ().
        graft_ratio: length of the first-order direction over that of K-FAC's, at the last statistics step, ().
        cosine: between K-FAC direction and momentum, at the last statistics step, (); 0 where they are zero.
    """

    a: Blocks
    b: Blocks
    weight: Array
    examples: Array
    dropped: Array
    taken: Array
    idle: Array
    vanished: Array
    a_operator: Blocks
    b_operator: Blocks
    a_basis: Blocks
    b_basis: Blocks
    a_values: Blocks
    b_values: Blocks
    kept: dict[str, Array]
    refreshes: Array
    failures: Array
    skipped: Array
    drift: Array
    graft_ratio: Array
    cosine: Array


FIELDS = tuple(field.name for field in dataclasses.fields(LayerState))
jax.tree_util.register_dataclass(LayerState, data_fields=FIELDS, meta_fields=())

# Scalars of a state that are counters (int32), and those that are numbers.
NUM_COUNTERS, NUM_NUMBERS = 6, 6


def init_layer(spec: LayerSpec, slices: int, scaling: Scaling, dtype: DTypeLike) -> LayerState:
    """Averages at zero (starting at the identity would bias the early steps) and operators at the identity.

    Args:
        spec: the layer.
        slices: number of layers that the parameter holds.
        scaling: decides what is kept.
        dtype: of the factors, at least float32.
    """

    def zeros(sizes: tuple[int, ...]) -> Blocks:
        return tuple(jnp.zeros((spec.groups, size, size), dtype) for size in sizes)

    def eyes(sizes: tuple[int, ...], *, kept: bool) -> Blocks:
        return tuple(jnp.tile(jnp.eye(size, dtype=dtype), (spec.groups, 1, 1)) for size in sizes if kept)

    def ones(sizes: tuple[int, ...]) -> Blocks:
        return tuple(jnp.ones((spec.groups, size), dtype) for size in sizes if scaling.keeps_bases)

    ins, outs = spec.in_blocks, spec.out_blocks
    return LayerState(
        a=zeros(ins),
        b=zeros(outs),
        weight=jnp.zeros((), dtype),
        examples=jnp.zeros(() if slices == 1 else (spec.groups,), dtype),
        dropped=jnp.zeros((), jnp.int32),
        taken=jnp.zeros((), jnp.int32),
        idle=jnp.zeros((), jnp.int32),
        vanished=jnp.zeros((), dtype),
        a_operator=eyes(ins, kept=scaling.keeps_operators),
        b_operator=eyes(outs, kept=scaling.keeps_operators),
        a_basis=eyes(ins, kept=scaling.keeps_bases),
        b_basis=eyes(outs, kept=scaling.keeps_bases),
        a_values=ones(ins),
        b_values=ones(outs),
        kept=scaling.keeps(spec, dtype),
        refreshes=jnp.zeros((), jnp.int32),
        failures=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        drift=jnp.zeros((), dtype),
        graft_ratio=jnp.ones((), dtype),
        cosine=jnp.ones((), dtype),
    )


def update_statistics(state: LayerState, new: Statistics, decay: float) -> LayerState:
    """Move the averages towards the statistics of one step; non-finite statistics are left out.

    So is a step without examples, where no position counted (`Positions.mask`). Of several layers in one parameter,
    those without examples (experts without tokens) keep what they have.
    """
    weight = state.weight
    idle = new.examples == 0 if new.examples.ndim else jnp.zeros((), bool)
    keeping = idle & (new.examples > 0).any()  # while others have some

    def mean(m: Array, count: Array, average: Array) -> Array:
        if not count.ndim:
            return m / nonzero(count)
        # What leaves a corrected average as it is.
        kept = average / jnp.maximum(weight, jnp.finfo(weight.dtype).tiny)
        return jnp.where(keeping[:, None, None], kept, m / nonzero(count)[:, None, None])

    a = tuple(mean(m, new.a_count, old) for m, old in zip(new.a, state.a, strict=True))
    b = tuple(mean(m, new.examples, old) for m, old in zip(new.b, state.b, strict=True))
    counts = [count for count, blocks in ((new.a_count, a), (new.examples, b)) if blocks]
    counted = [((count != 0) | keeping).all() for count in counts]
    finite = jnp.stack([*counted, *(are_finite(m[None])[0] for m in (*a, *b))]).all()
    rate = jnp.where(finite, 1 - decay, 0.0).astype(state.weight.dtype)

    first = (state.examples == 0) & finite & (weight > 0) if new.examples.ndim else None
    new_weight = weight + rate * (1 - weight)

    def moved(average: Array, value: Array) -> Array:
        after = average + rate * (jnp.where(finite, value, average) - average)
        if first is None:
            return after
        # The first examples of a layer whose average is one of nothing so far.
        return jnp.where(
            first.reshape(-1, *[1] * (value.ndim - 1)), jnp.where(finite, value, 0) * new_weight, after
        )

    return dataclasses.replace(
        state,
        a=tuple(map(moved, state.a, a)),
        b=tuple(map(moved, state.b, b)),
        examples=state.examples
        + rate * (jnp.where(finite, new.examples.astype(state.examples.dtype), state.examples) - state.examples),
        weight=new_weight,
        dropped=state.dropped + (~finite & (new.examples > 0).any()),
        taken=state.taken + finite,
        vanished=(new.vanished / jnp.maximum(new.examples.mean(), 1)).astype(state.vanished.dtype),
    )


def corrected(state: LayerState) -> tuple[Blocks, Blocks]:
    """A and B per example, the bias of the averages corrected."""
    scale = 1 / jnp.maximum(state.weight, jnp.finfo(state.weight.dtype).tiny)
    return tuple(m * scale for m in state.a), tuple(m * scale for m in state.b)


def mean_eigenvalue(blocks: Blocks) -> Array:
    """(groups,): trace divided by dimension, over the blocks of a factor."""
    trace = sum(map(traces, blocks))
    return jnp.asarray(trace) / sum(m.shape[-1] for m in blocks)


def damping_terms(a: Blocks, b: Blocks, config: KFACConfig, noise_level: float) -> tuple[Array, Array]:
    """lambda_A and lambda_B, (groups,) each; see `KFACConfig.damping` and `KFACConfig.floor`.

    Args:
        a, b: corrected blocks of the factors.
        config: the configuration.
        noise_level: of the layer, see `KFACConfig.noise_level`.
    """
    damping = config.damping
    one = jnp.ones((a or b)[0].shape[0], (a or b)[0].dtype)
    mean_a = jnp.maximum(mean_eigenvalue(a), MEAN_FLOOR) if a else one
    mean_b = jnp.maximum(mean_eigenvalue(b), MEAN_FLOOR) if b else one
    if config.damping_mode == "relative":
        damping_a, damping_b = _relative(mean_a, damping), _relative(mean_b, damping)
    else:
        pi = jnp.sqrt(mean_a / mean_b)
        damping_a, damping_b = pi * damping**0.5, damping**0.5 / pi
    floor = config.floor * noise_level
    if not floor:
        return damping_a, damping_b
    damping_a = jnp.maximum(damping_a, floor * frobenius_norm(a)) if a else damping_a
    return damping_a, jnp.maximum(damping_b, floor * frobenius_norm(b)) if b else damping_b


def frobenius_norm(blocks: Blocks) -> Array:
    """(groups,): of a factor, over its blocks. At least its largest eigenvalue; hardly more if few are large."""
    return jnp.sqrt(jnp.asarray(sum(dots(m, m) for m in blocks)))


def _relative(mean: Array, damping: float) -> Array:
    """(groups,): the mean eigenvalues times `damping`.

    A group without anything so far (an expert without tokens) takes the mean of the others as if it were its own
    factor: next to damping alone its first gradients would drown theirs.
    """
    if mean.shape[0] == 1:
        return damping * mean
    silent = mean <= MEAN_FLOOR
    others = jnp.where(silent, 0, mean).sum() / jnp.maximum((~silent).sum(), 1)
    return jnp.where(silent, jnp.maximum(others, MEAN_FLOOR), damping * mean)


def from_eigenvalues(bases: Blocks, values: Sequence[Array]) -> Blocks:
    """U diag(v) U^T, block by block.

    Args:
        bases: U.
        values: v, (groups, size) per block.
    """
    return tuple((u * v[:, None, :]) @ u.transpose(0, 2, 1) for u, v in zip(bases, values, strict=True))


def multiply(
    left: Sequence[Array],
    m: Array,
    right: Sequence[Array],
    *,
    transpose_left: bool = False,
    transpose_right: bool = False,
) -> Array:
    """diag(left) m diag(right) with block-diagonal matrices; an empty sequence is the identity.

    Args:
        left: blocks (groups, b, b) whose sizes sum to P_out.
        m: (groups, P_out, P_in).
        right: blocks whose sizes sum to P_in.
        transpose_left: transpose the left blocks.
        transpose_right: transpose the right blocks.
    """
    if transpose_left:
        left = [block.transpose(0, 2, 1) for block in left]
    if transpose_right:
        right = [block.transpose(0, 2, 1) for block in right]
    if len(left) == 1:
        m = left[0] @ m
    elif left:
        parts = _parts(m, left, 1)
        m = jnp.concatenate([block @ part for block, part in zip(left, parts, strict=True)], 1)
    if len(right) == 1:
        m = m @ right[0]
    elif right:
        parts = _parts(m, right, 2)
        m = jnp.concatenate([part @ block for block, part in zip(right, parts, strict=True)], 2)
    return m


def _parts(m: Array, blocks: Sequence[Array], axis: int) -> list[Array]:
    ends: list[int] = []
    for block in blocks[:-1]:
        ends.append((ends[-1] if ends else 0) + block.shape[-1])
    return list(jnp.split(m, ends, axis))
