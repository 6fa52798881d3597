"""When preconditioners are recomputed, and how: layers take turns, matrices of one size are decomposed together.

The program holds one decomposition per size of matrix, however many layers and turns there are. Which layers are
due is decided on the device: their states are gathered, decomposed and put back.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh

from algoperf_kfac import cadence
from algoperf_kfac.jax.decompositions import Decomposed, decompose, eigh, follow, inverse
from algoperf_kfac.jax.preconditioner import Blocks, LayerState, corrected, damping_terms, mean_eigenvalue
from algoperf_kfac.jax.reductions import take
from algoperf_kfac.jax.scalings import Scaling
from algoperf_kfac.jax.stacks import Stack, choose
from algoperf_kfac.jax.types import Tree

# What a refresh changes of a state.
WRITTEN = (
    *("a_operator", "b_operator", "a_basis", "b_basis", "a_values", "b_values", "kept"),
    *("refreshes", "failures", "skipped", "drift"),
)

States: TypeAlias = dict[str, LayerState]
"""By stack, the layer as leading dimension."""


def refresh_due(
    states: States,
    stacks: Mapping[str, Stack],
    count: Array,
    scaling: Scaling,
    mesh: Mesh | None = None,
    pace: Array | None = None,
) -> States:
    """The states with the preconditioners that are due recomputed from their current statistics.

    A layer is due at its turn, while the statistics are young, and as long as it never succeeded (`cadence.is_due`,
    decided on the device). Layers take turns in the model's order.

    Args:
        states: by stack.
        stacks: what is stacked.
        count: updates made so far, int32 ().
        scaling: what is made of the decompositions.
        mesh: a one-dimensional mesh whose devices share the work; None to do it where the state lies.
        pace: see `cadence`, int32 (); None without a `refresh_budget`.
    """
    if not states:
        return states
    config = scaling.config
    cycle = cadence.cycle(config)
    levels = {key: stack.noise_level(config) for key, stack in stacks.items()}
    turns = min(cycle, sum(len(stack.names) for stack in stacks.values()))
    turn = cadence.turn(config, count, 1 if pace is None else pace)
    all_due = cadence.all_are_due(config, count, 1 if pace is None else pace)
    due = {key: all_due | (state.refreshes == 0) for key, state in states.items()}
    if turns == 1:
        return refresh(states, {key: flags | (turn == 0) for key, flags in due.items()}, levels, scaling, mesh)

    windows = {key: _windows(stack, cycle, turns) for key, stack in stacks.items()}
    numbers = jnp.arange(turns)
    busy = [(windows[key].inside & flags).any(1) for key, flags in due.items()]
    is_due = jnp.stack([*busy, numbers == turn]).any(0)

    def from_turn(i: Array | int) -> Array:
        """The first turn from `i` on with layers that are due, `turns` if there is none."""
        return jnp.where(is_due & (numbers >= i), numbers, turns).min()

    def take_turn(i: Array, written: Mapping[str, Tree]) -> dict[str, Tree]:
        """What a refresh changes, with the layers of turn `i` refreshed."""
        current = {key: dataclasses.replace(state, **written[key]) for key, state in states.items()}
        members, wanted = {}, {}
        for key, state in current.items():
            rows, valid = windows[key].of_turn(i)
            members[key] = jax.tree.map(lambda leaf, rows=rows: take(leaf, rows), state)
            wanted[key] = valid & (take(due[key], rows) | (i == turn))
        new = refresh(members, wanted, levels, scaling, mesh)
        return {key: windows[key].put_back(i, _written(current[key]), _written(new[key])) for key in states}

    start = (from_turn(0), {key: _written(state) for key, state in states.items()})
    _, written = lax.while_loop(
        lambda carry: carry[0] < turns, lambda carry: (from_turn(carry[0] + 1), take_turn(*carry)), start
    )
    return {key: dataclasses.replace(state, **written[key]) for key, state in states.items()}


def _written(state: LayerState) -> Tree:
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

    def put_back(self, turn: Array, whole: Tree, of_turn: Tree) -> Tree:
        """Arrays over all layers with those of one turn in their places."""
        slots, inside = (lax.dynamic_index_in_dim(of_all, turn, keepdims=False) for of_all in self[2:])
        return jax.tree.map(lambda old, new: choose(inside, take(new, slots), old), whole, of_turn)

    def of_turn(self, turn: Array) -> tuple[Array, Array]:
        """Rows of one turn, and whether they are valid."""
        rows, valid = (lax.dynamic_index_in_dim(of_all, turn, keepdims=False) for of_all in self[:2])
        return rows, valid


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


def refresh(
    states: States, due: Mapping[str, Array], levels: Mapping[str, float], scaling: Scaling, mesh: Mesh | None
) -> States:
    """Recompute the preconditioners of the layers that are due.

    Matrices of equal size are decomposed in one batched call, split over the devices of `mesh`. What fails is
    retried with more damping (`decompositions.py`); what still fails keeps the last good decomposition. Both are
    counted in the states. A layer that saw no input or no gradient yet has nothing to decompose, and stays due.

    Args:
        states: by stack, the layer as leading dimension.
        due: which layers to refresh, (layers,) for each stack.
        levels: noise level of each stack.
        scaling: what is made of the decompositions.
        mesh: a one-dimensional mesh whose devices share the work; None to do it where the state lies.
    """
    # Without TF32, which XLA takes by default where the device has it: its ten bits are too few for eigenvalues
    # that span five orders of magnitude, and for an operator that stays for an interval.
    with jax.default_matmul_precision("highest"):
        prepared = {
            key: jax.vmap(functools.partial(_prepare, level=levels[key], scaling=scaling))(state)
            for key, state in states.items()
        }
        due = {key: due[key] & ~one.silent for key, one in prepared.items()}
        needed = {key: due[key] & one.drifted for key, one in prepared.items()}
        decomposed = _decompose_by_size(prepared, needed, scaling, mesh)
        install = jax.vmap(functools.partial(_install, scaling=scaling))
        return {key: install(state, decomposed[key], due[key], prepared[key]) for key, state in states.items()}


class _Prepared(NamedTuple):
    """What a layer's refresh needs to know.

    Attributes:
        matrices: undamped blocks of A, then of B, (groups, size, size).
        damping: of each block, (groups,).
        silent: whether a factor is zero altogether.
        drifted: whether the factors are too far from diagonal in the old bases to keep these.
        drift: how far.
        bases: what the blocks are decomposed from, (groups, size, size), the largest eigenvalue first; empty where
            they are decomposed anew.
        has_bases: whether there was a refresh already.
    """

    matrices: list[Array]
    damping: list[Array]
    silent: Array
    drifted: Array
    drift: Array
    bases: list[Array]
    has_bases: Array


def _prepare(state: LayerState, level: float, scaling: Scaling) -> _Prepared:
    config = scaling.config
    a, b = corrected(state)
    damping_a, damping_b = damping_terms(a, b, config, level)
    # NaN is not zero: it shall fail and be counted.
    silent = jnp.stack([mean_eigenvalue(blocks).max() == 0 for blocks in (a, b) if blocks]).any()
    damping = [damping_a] * len(a) + [damping_b] * len(b)
    has_bases = state.refreshes > 0
    bases = _descending(state) if config.decomposition == "qr" else []
    if not scaling.keeps_bases or config.drift_tolerance == 0:
        return _Prepared([*a, *b], damping, silent, jnp.ones((), bool), state.drift, bases, has_bases)
    drift = _drift((*a, *b), (*state.a_basis, *state.b_basis))
    drifted = ~has_bases | ~(drift <= config.drift_tolerance)
    return _Prepared([*a, *b], damping, silent, drifted, drift, bases, has_bases)


def _descending(state: LayerState) -> list[Array]:
    """The bases of the blocks of A, then of B, each with the largest eigenvalue first."""
    values, bases = (*state.a_values, *state.b_values), (*state.a_basis, *state.b_basis)
    orders = (jnp.argsort(v, 1, descending=True) for v in values)
    return [jnp.take_along_axis(q, order[:, None, :], 2) for q, order in zip(bases, orders, strict=True)]


def _drift(matrices: Blocks, bases: Blocks) -> Array:
    """(): the largest off-diagonal share of the Frobenius norm of U^T M U, over the blocks."""
    worst = []
    for m, basis in zip(matrices, bases, strict=True):
        rotated = basis.transpose(0, 2, 1) @ m @ basis
        off = rotated * (1 - jnp.eye(m.shape[-1], dtype=m.dtype))
        total = jnp.maximum(jnp.square(rotated).sum(), jnp.finfo(m.dtype).tiny)
        worst.append(jnp.sqrt(jnp.square(off).sum() / total))
    return jnp.stack(worst).max()


def _decompose_by_size(
    prepared: Mapping[str, _Prepared], needed: Mapping[str, Array], scaling: Scaling, mesh: Mesh | None
) -> dict[str, list[Decomposed]]:
    """The decompositions of each stack's blocks, matrices of one size and type together in one batch.

    Args:
        prepared: by stack.
        needed: which layers are to be decomposed, (layers,) for each stack.
        scaling: says which decomposition.
        mesh: see `refresh`.
    """
    config = scaling.config
    by_size: dict[tuple[int, jnp.dtype], list[tuple[str, int]]] = {}
    for key, one in prepared.items():
        for block, matrices in enumerate(one.matrices):
            by_size.setdefault((matrices.shape[-1], matrices.dtype), []).append((key, block))
    found: dict[tuple[str, int], Decomposed] = {}
    for places in by_size.values():
        shapes = [prepared[key].matrices[block].shape[:2] for key, block in places]  # layers, groups

        def by_layer(flags: Mapping[str, Array], places: list[tuple[str, int]] = places) -> Array:
            """(layers,) for each stack -> (matrices,)."""
            every = [jnp.broadcast_to(flags[k][:, None], prepared[k].matrices[b].shape[:2]) for k, b in places]
            return _together(every)

        matrices = _together([prepared[key].matrices[block] for key, block in places])
        damping = _together([prepared[key].damping[block] for key, block in places])
        wanted = by_layer(needed)
        followed = None
        if scaling.uses_bases and config.decomposition == "qr":
            bases = _together([prepared[key].bases[block] for key, block in places])
            known = wanted & by_layer({key: one.has_bases for key, one in prepared.items()})
            followed = follow(matrices, damping, bases, known, mesh=mesh)
            wanted &= ~followed.ok
        results = decompose(
            eigh if scaling.uses_bases else inverse,
            matrices,
            damping,
            wanted,
            absolute=config.damping_mode == "absolute",
            mesh=mesh,
        )
        if followed is not None:
            results = _joined(followed, results)
        ends = np.cumsum([count * groups for count, groups in shapes])[:-1].tolist()
        pieces = zip(*(jnp.split(result, ends) for result in results), strict=True)
        for place, shape, piece in zip(places, shapes, pieces, strict=True):
            found[place] = Decomposed(*(part.reshape(*shape, *part.shape[1:]) for part in piece))
    return {key: [found[key, block] for block in range(len(one.matrices))] for key, one in prepared.items()}


def _joined(followed: Decomposed, anew: Decomposed) -> Decomposed:
    """Bases that followed their matrices where that succeeded, and those decomposed anew elsewhere."""
    took = followed.ok
    return Decomposed(
        jnp.where(took[:, None], followed.values, anew.values),
        jnp.where(took[:, None, None], followed.matrices, anew.matrices),
        took | anew.ok,
        followed.failures + anew.failures,
    )


def _together(pieces: list[Array]) -> Array:
    """(layers, groups, ...) each -> (matrices, ...)."""
    return jnp.concatenate([piece.reshape(-1, *piece.shape[2:]) for piece in pieces])


def _install(
    state: LayerState, decomposed: list[Decomposed], due: Array, prepared: _Prepared, scaling: Scaling
) -> LayerState:
    """The state of one layer with a new decomposition, or with new eigenvalues in the old basis."""
    needed = due & prepared.drifted
    fresh = needed & jnp.stack([block.ok.all() for block in decomposed]).all()
    same_bases = due & ~prepared.drifted
    failures = jnp.stack([block.failures.max() for block in decomposed]).max()
    was_refreshed, renewed = state.refreshes > 0, fresh
    values, bases = tuple(block.values for block in decomposed), tuple(block.matrices for block in decomposed)
    if scaling.keeps_bases:
        old_bases = (*state.a_basis, *state.b_basis)
        rotated = map(_rotated_diagonal, prepared.matrices, old_bases, prepared.damping)
        values = _select(fresh, values, _select(same_bases, tuple(rotated), (*state.a_values, *state.b_values)))
        bases = _select(fresh, bases, old_bases)
        renewed = fresh | was_refreshed
    k = len(state.a)
    renewed_bases = dataclasses.replace(
        state, a_basis=bases[:k], b_basis=bases[k:], a_values=values[:k], b_values=values[k:]
    )
    a_operator, b_operator = scaling.operators(renewed_bases)
    kept = state.kept
    if scaling.keeps_bases:
        moved = scaling.transport(state, bases[:k], bases[k:])
        kept = {name: jnp.where(fresh & was_refreshed, moved[name], old) for name, old in kept.items()}
    return dataclasses.replace(
        renewed_bases if scaling.keeps_bases else state,
        a_operator=_select(renewed, a_operator, state.a_operator),
        b_operator=_select(renewed, b_operator, state.b_operator),
        kept=kept,
        refreshes=state.refreshes + fresh,
        skipped=state.skipped + same_bases,
        failures=state.failures + jnp.where(needed, failures, 0),
        drift=jnp.where(due, prepared.drift, state.drift),
    )


def _select(chosen: Array, new: Blocks, old: Blocks) -> Blocks:
    return tuple(lax.select(chosen, n, o) for n, o in zip(new, old, strict=True))


def _rotated_diagonal(m: Array, basis: Array, damping: Array) -> Array:
    """(groups, size): the damped diagonal of U^T M U."""
    return jnp.maximum((basis * (m @ basis)).sum(1), 0) + damping[:, None]
