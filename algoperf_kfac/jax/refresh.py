"""When preconditioners are recomputed, and how: layers take turns, matrices of one size are decomposed together.

The program holds one decomposition per size of matrix, however many layers and turns there are. Which layers are
due is decided on the device: their states are gathered, decomposed and put back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.jax.preconditioner import (
    Blocks,
    LayerState,
    corrected,
    damping_terms,
    keeps_bases,
    mean_eigenvalue,
    multiply,
)
from algoperf_kfac.jax.stacks import Stack, broadcast

# Damping of the attempts at a decomposition, as multiples of the configured one.
RETRIES = (1.0, 10.0, 100.0)

# What a refresh changes of a state.
WRITTEN = (
    *("a_operator", "b_operator", "a_basis", "b_basis", "a_values", "b_values", "second_moment"),
    *("refreshes", "failures", "skipped", "drift"),
)

States = dict[str, LayerState]


def refresh_due(
    states: States, stacks: Mapping[str, Stack], count: Array, config: KFACConfig, mesh: Mesh | None = None
) -> States:
    """The states with the preconditioners that are due recomputed from their current statistics.

    A layer is due at its turn, while the statistics are young, and as long as it never succeeded. Layers take turns
    in the model's order.

    Args:
        states: by stack.
        stacks: what is stacked.
        count: updates made so far, int32 ().
        config: the configuration.
        mesh: a one-dimensional mesh whose devices share the work; None to do it where the state lies.
    """
    if not states:
        return states
    cycle = config.refresh_interval // config.factor_interval
    turns = min(cycle, sum(len(stack.names) for stack in stacks.values()))
    young = count < max(config.refresh_interval, config.initial_statistics)
    turn = -(count // config.factor_interval) % cycle
    due = {key: young | (state.refreshes == 0) for key, state in states.items()}
    if turns == 1:
        return refresh(states, {key: flags | (turn == 0) for key, flags in due.items()}, config, mesh)

    windows = {key: _windows(stack, cycle, turns) for key, stack in stacks.items()}

    def take_turn(i: Array, written: Any) -> Any:
        current = {key: state._replace(**written[key]) for key, state in states.items()}
        members, wanted = {}, {}
        for key, state in current.items():
            rows, valid = windows[key].rows[i], windows[key].valid[i]
            members[key] = jax.tree.map(lambda leaf, rows=rows: leaf[rows], state)
            wanted[key] = valid & (due[key][rows] | (i == turn))
        new = refresh(members, wanted, config, mesh)
        out = {}
        for key, state in current.items():
            slots, inside = windows[key].slots[i], windows[key].inside[i]

            def put(old: Array, new: Array, slots: Array = slots, inside: Array = inside) -> Array:
                return jnp.where(broadcast(inside, old), new[slots], old)

            out[key] = jax.tree.map(put, _written(state), _written(new[key]))
        return out

    numbers = jnp.arange(turns)
    busy = [(windows[key].inside & flags).any(1) for key, flags in due.items()]
    is_due = jnp.stack([*busy, numbers == turn]).any(0)

    def from_turn(i: Array | int) -> Array:
        """The first turn from `i` on with layers that are due, `turns` if there is none."""
        return jnp.where(is_due & (numbers >= i), numbers, turns).min()

    start = (from_turn(0), {key: _written(state) for key, state in states.items()})
    _, written = lax.while_loop(
        lambda carry: carry[0] < turns, lambda carry: (from_turn(carry[0] + 1), take_turn(*carry)), start
    )
    return {key: state._replace(**written[key]) for key, state in states.items()}


def _written(state: LayerState) -> dict[str, Any]:
    return {name: getattr(state, name) for name in WRITTEN}


class _Windows(NamedTuple):
    """Which layers of a stack have which turn.

    Attributes:
        rows: (turns, width): the layers of a turn, filled up with layer 0.
        valid: (turns, width): whether an entry of `rows` is no filling.
        slots: (turns, layers): where in `rows` a layer stands, 0 if it has another turn.
        inside: (turns, layers): whether it is this layer's turn.
    """

    rows: Array
    valid: Array
    slots: Array
    inside: Array


def _windows(stack: Stack, cycle: int, turns: int) -> _Windows:
    members = [[i for i, number in enumerate(stack.numbers) if number % cycle == turn] for turn in range(turns)]
    width, count = max(map(len, members)), len(stack.numbers)
    rows, slots = np.zeros((turns, width), np.int32), np.zeros((turns, count), np.int32)
    valid, inside = np.zeros((turns, width), bool), np.zeros((turns, count), bool)
    for turn, of_turn in enumerate(members):
        rows[turn, : len(of_turn)] = of_turn
        valid[turn, : len(of_turn)] = True
        slots[turn, of_turn] = range(len(of_turn))
        inside[turn, of_turn] = True
    return _Windows(*map(jnp.asarray, (rows, valid, slots, inside)))


def refresh(states: States, due: Mapping[str, Array], config: KFACConfig, mesh: Mesh | None = None) -> States:
    """Recompute the preconditioners of the layers that are due.

    Matrices of equal size are decomposed in one batched call, split over the devices of `mesh`. What fails is
    retried with more damping; what still fails keeps the last good decomposition. Both are counted in the states. A
    layer that saw no input or no gradient yet has nothing to decompose, and stays due.

    Args:
        states: by stack, the layer as leading dimension.
        due: which layers to refresh, (layers,) for each stack.
        config: the configuration.
        mesh: a one-dimensional mesh whose devices share the work; None to do it where the state lies.
    """
    plans = {key: jax.vmap(functools.partial(_prepare, config=config))(state) for key, state in states.items()}
    due = {key: due[key] & ~plan.silent for key, plan in plans.items()}
    needed = {key: due[key] & plan.drifted for key, plan in plans.items()}
    by_size: dict[tuple[int, Any], list[tuple[str, int]]] = {}
    for key, plan in plans.items():
        for block, matrices in enumerate(plan.matrices):
            by_size.setdefault((matrices.shape[-1], matrices.dtype), []).append((key, block))
    solved: dict[tuple[str, int], _Solved] = {}
    for places in by_size.values():
        shapes = [plans[key].matrices[block].shape[:2] for key, block in places]  # layers, groups

        def together(pieces: list[Array]) -> Array:
            return jnp.concatenate([piece.reshape(-1, *piece.shape[2:]) for piece in pieces])

        results = _solve(
            together([plans[key].matrices[block] for key, block in places]),
            together([plans[key].damping[block] for key, block in places]),
            together(
                [jnp.broadcast_to(needed[key][:, None], s) for (key, _), s in zip(places, shapes, strict=True)]
            ),
            config,
            mesh,
        )
        ends = np.cumsum([count * groups for count, groups in shapes])[:-1].tolist()
        pieces = zip(*(jnp.split(result, ends) for result in results), strict=True)
        for place, shape, piece in zip(places, shapes, pieces, strict=True):
            solved[place] = _Solved(*(part.reshape(*shape, *part.shape[1:]) for part in piece))
    install = jax.vmap(functools.partial(_install, config=config))
    return {
        key: install(state, [solved[key, i] for i in range(len(plans[key].matrices))], due[key], plans[key])
        for key, state in states.items()
    }


class _Plan(NamedTuple):
    """What a layer's refresh needs to know.

    Attributes:
        matrices: undamped blocks of A, then of B, (groups, size, size).
        damping: of each block, (groups,).
        silent: whether a factor is zero altogether.
        drifted: whether the factors are too far from diagonal in the old bases to keep these.
        drift: how far.
    """

    matrices: list[Array]
    damping: list[Array]
    silent: Array
    drifted: Array
    drift: Array


def _prepare(state: LayerState, config: KFACConfig) -> _Plan:
    a, b = corrected(state)
    damping_a, damping_b = damping_terms(a, b, config)
    # NaN is not zero: it shall fail and be counted.
    silent = jnp.stack([mean_eigenvalue(blocks).max() == 0 for blocks in (a, b) if blocks]).any()
    damping = [damping_a] * len(a) + [damping_b] * len(b)
    if config.preconditioner != "eigen" or config.drift_tolerance == 0:
        return _Plan([*a, *b], damping, silent, jnp.ones((), bool), state.drift)
    worst = []
    for m, basis in zip((*a, *b), (*state.a_basis, *state.b_basis), strict=True):
        rotated = basis.transpose(0, 2, 1) @ m @ basis
        off = rotated * (1 - jnp.eye(m.shape[-1], dtype=m.dtype))
        total = jnp.maximum(jnp.square(rotated).sum(), jnp.finfo(m.dtype).tiny)
        worst.append(jnp.sqrt(jnp.square(off).sum() / total))
    drift = jnp.stack(worst).max()
    return _Plan([*a, *b], damping, silent, (state.refreshes == 0) | ~(drift <= config.drift_tolerance), drift)


class _Solved(NamedTuple):
    """Decompositions of matrices of one size.

    Attributes:
        values: damped eigenvalues, (..., size), of no meaning for inverses.
        matrices: bases or inverses, (..., size, size).
        ok: which succeeded, (...).
        failures: failed attempts at each, (...).
    """

    values: Array
    matrices: Array
    ok: Array
    failures: Array


def _solve(matrices: Array, damping: Array, wanted: Array, config: KFACConfig, mesh: Mesh | None) -> _Solved:
    """Decompose a batch, with retries; nothing is computed if nothing is wanted.

    Args:
        matrices: (matrices, size, size), undamped.
        damping: (matrices,).
        wanted: which are of interest, (matrices,).
        config: the configuration.
        mesh: see `refresh`.
    """
    count, size = matrices.shape[:2]
    dtype = matrices.dtype
    eye = jnp.eye(size, dtype=dtype)
    decompose = _split(_inverse if config.preconditioner == "inverse" else _eigh, mesh)
    multiples = jnp.asarray(RETRIES, dtype)
    if config.damping_mode == "absolute":
        multiples = jnp.sqrt(multiples)

    def attempt(carry: tuple[Array, _Solved]) -> tuple[Array, _Solved]:
        number, done = carry
        scaled = damping * multiples[number]
        damped = matrices + scaled[:, None, None] * eye
        # What is not wanted, fillings among it, costs least as the identity.
        usable = wanted & jnp.isfinite(damped).all((1, 2))
        values, new = decompose(jnp.where(usable[:, None, None], damped, eye))
        good = usable & jnp.isfinite(new).all((1, 2)) & jnp.isfinite(values).all(1)
        # Damping was added before the decomposition, so that rank-deficient factors decompose.
        values = jnp.maximum(values, scaled[:, None])
        take = ~done.ok & good
        return number + 1, _Solved(
            jnp.where(take[:, None], values, done.values),
            jnp.where(take[:, None, None], new, done.matrices),
            done.ok | good,
            done.failures + (~done.ok & ~good),
        )

    def undone(carry: tuple[Array, _Solved]) -> Array:
        return (carry[0] < len(RETRIES)) & ~carry[1].ok.all()

    start = _Solved(
        jnp.ones((count, size), dtype), jnp.tile(eye, (count, 1, 1)), ~wanted, jnp.zeros((count,), jnp.int32)
    )
    return lax.while_loop(undone, attempt, (jnp.zeros((), jnp.int32), start))[1]


def _install(state: LayerState, solved: list[_Solved], due: Array, plan: _Plan, config: KFACConfig) -> LayerState:
    """The state of one layer with a new decomposition, or with new eigenvalues in the old basis."""
    needed = due & plan.drifted
    fresh = needed & jnp.stack([block.ok.all() for block in solved]).all()
    kept = due & ~plan.drifted
    failures = jnp.stack([block.failures.max() for block in solved]).max()
    k, was_refreshed = len(state.a), state.refreshes > 0
    state = state._replace(
        refreshes=state.refreshes + fresh,
        skipped=state.skipped + kept,
        failures=state.failures + jnp.where(needed, failures, 0),
        drift=jnp.where(due, plan.drift, state.drift),
    )
    values, matrices = [block.values for block in solved], [block.matrices for block in solved]

    def select(chosen: Array, new: list[Array], old: Blocks) -> Blocks:
        return tuple(jnp.where(chosen, n, o) for n, o in zip(new, old, strict=True))

    old_operators = (*state.a_operator, *state.b_operator)
    if config.preconditioner == "inverse":
        operators = select(fresh, matrices, old_operators)
        return state._replace(a_operator=operators[:k], b_operator=operators[k:])
    if not keeps_bases(config):
        new = [_operator(u, v, config) for u, v in zip(matrices, values, strict=True)]
        operators = select(fresh, new, old_operators)
        return state._replace(a_operator=operators[:k], b_operator=operators[k:])
    old_bases = (*state.a_basis, *state.b_basis)
    rotated = [
        _rotated_diagonal(m, u, damping)
        for m, u, damping in zip(plan.matrices, old_bases, plan.damping, strict=True)
    ]
    chosen = select(fresh, values, select(kept, rotated, (*state.a_values, *state.b_values)))
    bases = select(fresh, matrices, old_bases)
    moment = state.second_moment
    if moment:
        moved = fresh & was_refreshed
        moment = (jnp.where(moved, _transport(moment[0], state, bases[:k], bases[k:]), moment[0]),)
    operators = ()
    if not moment:
        new = [_operator(u, v, config) for u, v in zip(bases, chosen, strict=True)]
        operators = select(fresh | was_refreshed, new, old_operators)
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


def _rotated_diagonal(m: Array, basis: Array, damping: Array) -> Array:
    return jnp.maximum((basis * (m @ basis)).sum(1), 0) + damping[:, None]


def _transport(v: Array, state: LayerState, a_basis: Blocks, b_basis: Blocks) -> Array:
    """The second moment in new bases, its entries taken as uncorrelated in the old ones.

    (Q^T X P)_ij has variance sum_kl Q_ki^2 P_lj^2 var(X_kl) for the rotations Q, P between old and new bases.
    """

    def rotations(old: Blocks, new: Blocks) -> Blocks:
        return tuple(jnp.square(o.transpose(0, 2, 1) @ n) for o, n in zip(old, new, strict=True))

    return multiply(rotations(state.b_basis, b_basis), v, rotations(state.a_basis, a_basis), transpose_left=True)


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
