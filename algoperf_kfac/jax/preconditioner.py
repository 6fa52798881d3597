"""From the factors A and B to a preconditioned gradient: damping, decomposition, application.

For a layer's gradient G as a matrix (P_out x P_in), per channel group,

    inverse:              (B + l_B I)^-1 G (A + l_A I)^-1
    eigen, power p:       U_B [ (U_B^T G U_A) / ((b + l_B)(a + l_A)^T)^p ] U_A^T
    eigen, second_moment: U_B [ (U_B^T M U_A) / sqrt(v) ] U_A^T,  v the second moment of U_B^T G U_A

with B = U_B diag(b) U_B^T and A = U_A diag(a) U_A^T. Factors are tuples of diagonal blocks, usually one; an empty
tuple stands for the identity. Nothing here waits for the device: what depends on values is selected on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.jax.statistics import Statistics
from algoperf_kfac.layers import LayerSpec

# Least mean eigenvalue assumed for damping: a factor that is zero altogether (a layer that saw no gradient yet)
# still decomposes.
MEAN_FLOOR = 1e-15

# Damping of the attempts at a decomposition, as multiples of the configured one.
RETRIES = (1.0, 10.0, 100.0)

Blocks = tuple[Array, ...]


class LayerState(NamedTuple):
    """Statistics and preconditioner of one layer; all arrays.

    Attributes:
        a, b: moving averages of A and of B per example (blocks of (groups, size, size)), not corrected.
        weight: what the averages are divided by to correct their bias, ().
        examples: moving average of the number of examples, not corrected; (), or (groups,) of stacked layers.
        dropped: how many statistics were left out because they were not finite, ().
        a_operator, b_operator: what the momentum is multiplied by, the identity before the first refresh.
        a_basis, b_basis: eigenbases; kept for scaling="second_moment" and a drift_tolerance only.
        a_values, b_values: damped eigenvalues, (groups, size) per block; kept as the bases are.
        second_moment: one (groups, P_out, P_in) for scaling="second_moment", else empty.
        second_moment_steps: updates of `second_moment`, ().
        refreshes: successful refreshes so far, ().
        failures: failed decompositions so far, retries included, ().
        skipped: refreshes that kept the basis because it had not drifted, ().
        drift: off-diagonal share of the factors in the old basis at the last refresh, ().
        graft_ratio: length of the first-order direction over that of K-FAC's, at the last statistics step, ().
        cosine: between K-FAC direction and momentum, at the last statistics step, ().
    """

    a: Blocks
    b: Blocks
    weight: Array
    examples: Array
    dropped: Array
    a_operator: Blocks
    b_operator: Blocks
    a_basis: Blocks
    b_basis: Blocks
    a_values: Blocks
    b_values: Blocks
    second_moment: Blocks
    second_moment_steps: Array
    refreshes: Array
    failures: Array
    skipped: Array
    drift: Array
    graft_ratio: Array
    cosine: Array


def init_layer(spec: LayerSpec, stack: int, config: KFACConfig, dtype: Any) -> LayerState:
    """Averages at zero (starting at the identity would bias the early steps) and operators at the identity.

    Args:
        spec: the layer.
        stack: number of stacked layers.
        config: decides which fields are kept.
        dtype: of the factors, at least float32.
    """

    def zeros(sizes: tuple[int, ...]) -> Blocks:
        return tuple(jnp.zeros((spec.groups, size, size), dtype) for size in sizes)

    def eyes(sizes: tuple[int, ...]) -> Blocks:
        return tuple(jnp.tile(jnp.eye(size, dtype=dtype), (spec.groups, 1, 1)) for size in sizes)

    def ones(sizes: tuple[int, ...]) -> Blocks:
        return tuple(jnp.ones((spec.groups, size), dtype) for size in sizes)

    ins, outs = spec.in_blocks, spec.out_blocks
    kept = _keeps_bases(config)
    moment = config.preconditioner == "eigen" and config.scaling == "second_moment"
    shape = (spec.groups, spec.out_dim, spec.factor_in_dim)
    return LayerState(
        a=zeros(ins),
        b=zeros(outs),
        weight=jnp.zeros((), dtype),
        examples=jnp.zeros(() if stack == 1 else (spec.groups,), dtype),
        dropped=jnp.zeros((), jnp.int32),
        a_operator=() if moment else eyes(ins),
        b_operator=() if moment else eyes(outs),
        a_basis=eyes(ins) if kept else (),
        b_basis=eyes(outs) if kept else (),
        a_values=ones(ins) if kept else (),
        b_values=ones(outs) if kept else (),
        second_moment=(jnp.zeros(shape, dtype),) if moment else (),
        second_moment_steps=jnp.zeros((), jnp.int32),
        refreshes=jnp.zeros((), jnp.int32),
        failures=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        drift=jnp.zeros((), dtype),
        graft_ratio=jnp.ones((), dtype),
        cosine=jnp.ones((), dtype),
    )


def _keeps_bases(config: KFACConfig) -> bool:
    return config.preconditioner == "eigen" and (config.scaling == "second_moment" or config.drift_tolerance > 0)


def update_statistics(state: LayerState, new: Statistics, decay: float) -> LayerState:
    """Move the averages towards the statistics of one step; non-finite statistics are left out."""

    def mean(m: Array, count: Array) -> Array:
        return m / (count[:, None, None] if count.ndim else count)

    a = tuple(mean(m, new.a_count) for m in new.a)
    b = tuple(mean(m, new.examples) for m in new.b)
    finite = jnp.stack([jnp.isfinite(m).all() for m in (*a, *b)]).all()
    rate = jnp.where(finite, 1 - decay, 0.0).astype(state.weight.dtype)

    def moved(average: Array, value: Array) -> Array:
        return average + rate * (jnp.where(finite, value, average) - average)

    return state._replace(
        a=tuple(map(moved, state.a, a)),
        b=tuple(map(moved, state.b, b)),
        examples=moved(state.examples, new.examples.astype(state.examples.dtype)),
        weight=state.weight + rate * (1 - state.weight),
        dropped=state.dropped + ~finite,
    )


def corrected(state: LayerState) -> tuple[Blocks, Blocks]:
    """A and B per example, the bias of the averages corrected."""
    scale = 1 / jnp.maximum(state.weight, jnp.finfo(state.weight.dtype).tiny)
    return tuple(m * scale for m in state.a), tuple(m * scale for m in state.b)


def mean_eigenvalue(blocks: Blocks) -> Array:
    """(groups,): trace divided by dimension, over the blocks of a factor."""
    trace = sum(jnp.trace(m, axis1=-2, axis2=-1) for m in blocks)
    return jnp.asarray(trace) / sum(m.shape[-1] for m in blocks)


def damping_terms(a: Blocks, b: Blocks, config: KFACConfig, multiple: Array | float = 1.0) -> tuple[Array, Array]:
    """lambda_A and lambda_B, (groups,) each; see `KFACConfig.damping`."""
    damping = config.damping * multiple
    one = jnp.ones((a or b)[0].shape[0], (a or b)[0].dtype)
    mean_a = jnp.maximum(mean_eigenvalue(a), MEAN_FLOOR) if a else one
    mean_b = jnp.maximum(mean_eigenvalue(b), MEAN_FLOOR) if b else one
    if config.damping_mode == "relative":
        return damping * mean_a, damping * mean_b
    pi = jnp.sqrt(mean_a / mean_b)
    return pi * damping**0.5, damping**0.5 / pi


class _Batch(NamedTuple):
    """Matrices of one size, from several layers, stacked for one batched decomposition.

    Attributes:
        owners: (layer, which of its blocks, A's first, number of matrices) in order.
        matrices: (matrices, size, size), undamped.
        damping: (matrices,).
    """

    owners: tuple[tuple[str, int, int], ...]
    matrices: Array
    damping: Array


def _batches(states: Mapping[str, LayerState], config: KFACConfig) -> list[_Batch]:
    grouped: dict[tuple[int, Any], list[tuple[str, int, Array, Array]]] = {}
    for name, state in states.items():
        a, b = corrected(state)
        damping_a, damping_b = damping_terms(a, b, config)
        for i, m in enumerate((*a, *b)):
            damping = damping_a if i < len(a) else damping_b
            grouped.setdefault((m.shape[-1], m.dtype), []).append((name, i, m, damping))
    return [
        _Batch(
            tuple((name, i, m.shape[0]) for name, i, m, _ in members),
            jnp.concatenate([m for _, _, m, _ in members]),
            jnp.concatenate([damping for _, _, _, damping in members]),
        )
        for members in grouped.values()
    ]


def refresh(
    states: Mapping[str, LayerState], due: Mapping[str, Array], config: KFACConfig, mesh: Mesh | None = None
) -> dict[str, LayerState]:
    """Recompute the preconditioners of the layers that are due from their current statistics.

    Matrices of equal size are decomposed in one batched call, split over the devices of `mesh`. What fails is
    retried with more damping; what still fails keeps the last good decomposition. Both are counted in the states.

    Args:
        states: by layer.
        due: which of them to refresh, boolean scalars.
        config: the configuration.
        mesh: a one-dimensional mesh whose devices share the work; None to do it where the state lies.
    """
    drifted = _drifts(states, config)
    needed = {name: due[name] & drifted[name][0] for name in states}
    batches = _batches(states, config)
    solved = [_solve(batch, needed, config, mesh) for batch in batches]
    parts: dict[str, list[tuple[int, Array, Array, Array, Array]]] = {name: [] for name in states}
    for batch, (solved_values, solved_matrices, ok, failed) in zip(batches, solved, strict=True):
        start = 0
        for name, block, count in batch.owners:
            piece = slice(start, start + count)
            parts[name].append(
                (block, solved_values[piece], solved_matrices[piece], ok[piece].all(), failed[piece].max())
            )
            start += count
    new = {}
    for name, state in states.items():
        blocks = sorted(parts[name], key=lambda part: part[0])
        solved_all = jnp.stack([part[3] for part in blocks]).all()
        failures = jnp.stack([part[4] for part in blocks]).max()
        values, matrices = tuple(part[1] for part in blocks), tuple(part[2] for part in blocks)
        new[name] = _installed(
            state, values, matrices, needed[name] & solved_all, due[name] & ~drifted[name][0], config
        )
        drift = jnp.where(due[name], drifted[name][1], state.drift)
        counted = jnp.where(needed[name], failures, 0).astype(jnp.int32)
        new[name] = new[name]._replace(failures=state.failures + counted, drift=drift)
    return new


def _installed(
    state: LayerState, values: Blocks, matrices: Blocks, fresh: Array, kept: Array, config: KFACConfig
) -> LayerState:
    """The state with a new decomposition where `fresh`, with new eigenvalues in the old basis where `kept`."""
    k = len(state.a)

    def select(new: Blocks, old: Blocks) -> Blocks:
        return tuple(jnp.where(fresh, n, o) for n, o in zip(new, old, strict=True))

    was_refreshed = state.refreshes > 0
    state = state._replace(
        refreshes=state.refreshes + fresh.astype(jnp.int32), skipped=state.skipped + kept.astype(jnp.int32)
    )
    if config.preconditioner == "inverse":
        a, b = select(matrices[:k], state.a_operator), select(matrices[k:], state.b_operator)
        return state._replace(a_operator=a, b_operator=b)
    if not _keeps_bases(config):
        new = tuple(_operator(u, v, config) for u, v in zip(matrices, values, strict=True))
        a, b = select(new[:k], state.a_operator), select(new[k:], state.b_operator)
        return state._replace(a_operator=a, b_operator=b)
    blocks_a, blocks_b = corrected(state)
    damping = damping_terms(blocks_a, blocks_b, config)
    old_bases, old_values = (*state.a_basis, *state.b_basis), (*state.a_values, *state.b_values)
    old_values = tuple(
        jnp.where(kept, _rotated_diagonal(m, u, damping[i >= k]), v)
        for i, (m, u, v) in enumerate(zip((*blocks_a, *blocks_b), old_bases, old_values, strict=True))
    )
    bases = select(matrices, old_bases)
    chosen = select(values, old_values)
    moment = state.second_moment
    if moment:
        moved = fresh & was_refreshed
        moment = (jnp.where(moved, _transport(moment[0], state, bases[:k], bases[k:]), moment[0]),)
    operators: Blocks = ()
    if not moment:
        operators = tuple(_operator(u, v, config) for u, v in zip(bases, chosen, strict=True))
        known = fresh | was_refreshed
        old = (*state.a_operator, *state.b_operator)
        operators = tuple(jnp.where(known, n, o) for n, o in zip(operators, old, strict=True))
    return state._replace(
        a_basis=bases[:k],
        b_basis=bases[k:],
        a_values=chosen[:k],
        b_values=chosen[k:],
        a_operator=operators[:k],
        b_operator=operators[k:],
        second_moment=moment,
    )


def _operator(basis: Array, values: Array, config: KFACConfig) -> Array:
    """U f(v) U^T, formed once per refresh: scaling by eigenvalues is separable, so a step costs two products."""
    return (basis * (values**-config.exponent)[:, None, :]) @ basis.transpose(0, 2, 1)


def _drifts(states: Mapping[str, LayerState], config: KFACConfig) -> dict[str, tuple[Array, Array]]:
    """Per layer, whether it needs a new decomposition, and how far its factors are from diagonal in the old one."""
    out = {}
    for name, state in states.items():
        if config.preconditioner != "eigen" or config.drift_tolerance == 0:
            out[name] = (jnp.ones((), bool), state.drift)
            continue
        a, b = corrected(state)
        worst = []
        for m, basis in zip((*a, *b), (*state.a_basis, *state.b_basis), strict=True):
            rotated = basis.transpose(0, 2, 1) @ m @ basis
            off = rotated * (1 - jnp.eye(m.shape[-1], dtype=m.dtype))
            total = jnp.maximum(jnp.square(rotated).sum(), jnp.finfo(m.dtype).tiny)
            worst.append(jnp.sqrt(jnp.square(off).sum() / total))
        drift = jnp.stack(worst).max()
        out[name] = ((state.refreshes == 0) | ~(drift <= config.drift_tolerance), drift)
    return out


def _rotated_diagonal(m: Array, basis: Array, damping: Array) -> Array:
    return jnp.maximum((basis * (m @ basis)).sum(1), 0) + damping[:, None]


def _transport(v: Array, state: LayerState, a_basis: Blocks, b_basis: Blocks) -> Array:
    """The second moment in new bases, its entries taken as uncorrelated in the old ones.

    (Q^T X P)_ij has variance sum_kl Q_ki^2 P_lj^2 var(X_kl) for the rotations Q, P between old and new bases.
    """

    def rotations(old: Blocks, new: Blocks) -> Blocks:
        return tuple(jnp.square(o.transpose(0, 2, 1) @ n) for o, n in zip(old, new, strict=True))

    return multiply(rotations(state.b_basis, b_basis), v, rotations(state.a_basis, a_basis), transpose_left=True)


def _solve(
    batch: _Batch, needed: Mapping[str, Array], config: KFACConfig, mesh: Mesh | None
) -> tuple[Array, Array, Array, Array]:
    """Decompose a batch, with retries.

    Returns:
        Damped eigenvalues (matrices, size), of no meaning for inverses; bases or inverses (matrices, size, size);
        which succeeded; the number of failed attempts of each.
    """
    size, dtype = batch.matrices.shape[-1], batch.matrices.dtype
    count = batch.matrices.shape[0]
    wanted = jnp.concatenate([jnp.broadcast_to(needed[name], (n,)) for name, _, n in batch.owners])
    eye = jnp.eye(size, dtype=dtype)
    decompose = _split(_inverse if config.preconditioner == "inverse" else _eigh, mesh)
    multiples = jnp.asarray(RETRIES, dtype)
    if config.damping_mode == "absolute":
        multiples = jnp.sqrt(multiples)

    def attempt(carry: Any) -> Any:
        number, values, matrices, ok, failed = carry
        damping = batch.damping * multiples[number]
        damped = batch.matrices + damping[:, None, None] * eye
        finite = jnp.isfinite(damped).all((1, 2))
        new_values, new = decompose(jnp.where(finite[:, None, None], damped, eye))
        good = finite & jnp.isfinite(new).all((1, 2)) & jnp.isfinite(new_values).all(1)
        # Damping was added before the decomposition, so that rank-deficient factors decompose.
        new_values = jnp.maximum(new_values, damping[:, None])
        take = ~ok & good
        values = jnp.where(take[:, None], new_values, values)
        matrices = jnp.where(take[:, None, None], new, matrices)
        return number + 1, values, matrices, ok | good, failed + (~ok & ~good)

    def undone(carry: Any) -> Array:
        return (carry[0] < len(RETRIES)) & ~carry[3].all()

    start = (
        jnp.zeros((), jnp.int32),
        jnp.ones((count, size), dtype),
        jnp.tile(eye, (count, 1, 1)),
        ~wanted,
        jnp.zeros((count,), jnp.int32),
    )
    _, values, matrices, ok, failed = lax.while_loop(undone, attempt, start)
    return values, matrices, ok, failed


def _eigh(matrices: Array) -> tuple[Array, Array]:
    """Batched eigenvalues and bases."""
    values, vectors = jnp.linalg.eigh(matrices)
    return values, vectors


def _inverse(matrices: Array) -> tuple[Array, Array]:
    """Batched inverses of positive definite matrices, NaN where one is not; zeros in place of eigenvalues."""
    root = jnp.linalg.cholesky(matrices)
    eye = jnp.broadcast_to(jnp.eye(matrices.shape[-1], dtype=matrices.dtype), matrices.shape)
    half = lax.linalg.triangular_solve(root, eye, left_side=True, lower=True)
    return jnp.zeros(matrices.shape[:-1], matrices.dtype), half.transpose(0, 2, 1) @ half


Decomposition = Callable[[Array], tuple[Array, Array]]


def _split(decompose: Decomposition, mesh: Mesh | None) -> Decomposition:
    """The decomposition with its batch split over the devices of a mesh and gathered again."""
    if mesh is None or mesh.size == 1:
        return decompose
    axis = PartitionSpec(mesh.axis_names)

    def run(matrices: Array) -> tuple[Array, Array]:
        count, size = matrices.shape[:2]
        padding = -count % mesh.size
        if padding:
            filler = jnp.tile(jnp.eye(size, dtype=matrices.dtype), (padding, 1, 1))
            matrices = jnp.concatenate([matrices, filler])
        mapped = jax.shard_map(decompose, mesh=mesh, in_specs=axis, out_specs=(axis, axis), check_vma=False)
        everywhere = NamedSharding(mesh, PartitionSpec())
        values, out = (lax.with_sharding_constraint(t, everywhere)[:count] for t in mapped(matrices))
        return values, out

    return run


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


def precondition(
    state: LayerState, momentum: Array, gradient: Array, config: KFACConfig
) -> tuple[Array, LayerState]:
    """The preconditioned direction of one layer.

    Args:
        state: the layer's state.
        momentum: (groups, P_out, P_in), what is preconditioned.
        gradient: (groups, P_out, P_in), the step's gradient, for the second moment.
        config: the configuration.

    Returns:
        (groups, P_out, P_in), `momentum` itself before the first successful refresh; and the state, its second
        moment updated where the scaling uses one.
    """
    if not state.second_moment:
        return multiply(state.b_operator, momentum, state.a_operator), state

    def rotate(m: Array) -> Array:
        return multiply(state.b_basis, m, state.a_basis, transpose_left=True)

    known = state.refreshes > 0
    rotated = jnp.square(rotate(gradient))
    moment = state.second_moment[0]
    moment = jnp.where(known, config.beta2 * moment + (1 - config.beta2) * rotated, moment)
    steps = state.second_moment_steps + known.astype(jnp.int32)
    v = moment / (1 - config.beta2 ** jnp.maximum(steps, 1).astype(moment.dtype))
    # The floor keeps the noise of null-space directions from being scaled up to full steps.
    floor = config.damping * v.mean((1, 2), keepdims=True)
    scaled = rotate(momentum) / jnp.maximum(jnp.sqrt(v + floor), jnp.finfo(v.dtype).tiny)
    direction = multiply(state.b_basis, scaled, state.a_basis, transpose_right=True)
    state = state._replace(second_moment=(moment,), second_moment_steps=steps)
    return jnp.where(known, direction, momentum), state
