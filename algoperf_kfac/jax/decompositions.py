"""Eigendecompositions and damped inverses of many matrices of one size at once, with retries.

A decomposition that fails is retried twice, with 10 and 100 times the damping, in the precision of the factors:
float32, or float64 where the parameters are. (A retry in a wider precision would be a second program to compile for
each size of matrix.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from algoperf_kfac.jax.reductions import are_finite

# Damping of the attempts at a decomposition, as multiples of the configured one.
RETRIES = (1.0, 10.0, 100.0)

Decomposition: TypeAlias = Callable[[Array], tuple[Array, Array]]
"""From (matrices, size, size) to eigenvalues (matrices, size) and as many matrices."""


class Decomposed(NamedTuple):
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


def decompose(
    decomposition: Decomposition,
    matrices: Array,
    damping: Array,
    wanted: Array,
    *,
    absolute: bool,
    mesh: Mesh | None,
) -> Decomposed:
    """Decompose a batch, with retries; nothing is computed if nothing is wanted.

    Args:
        decomposition: `eigh` or `inverse`.
        matrices: (matrices, size, size), undamped.
        damping: (matrices,).
        wanted: which are of interest, (matrices,).
        absolute: whether the damping of a factor is the root of that of the product.
        mesh: a one-dimensional mesh whose devices share the work; None to do it where the matrices lie.
    """
    count, size = matrices.shape[:2]
    dtype = matrices.dtype
    eye = jnp.eye(size, dtype=dtype)
    run = _split(decomposition, mesh)
    multiples = jnp.asarray(RETRIES, dtype)
    if absolute:
        multiples = jnp.sqrt(multiples)

    def attempt(carry: tuple[Array, Decomposed]) -> tuple[Array, Decomposed]:
        number, done = carry
        scaled = damping * multiples[number]
        damped = matrices + scaled[:, None, None] * eye
        # What is not wanted, fillings among it, costs least as the identity.
        usable = wanted & are_finite(damped)
        values, new = run(jnp.where(usable[:, None, None], damped, eye))
        good = usable & are_finite(new) & are_finite(values)
        # Damping was added before the decomposition, so that rank-deficient factors decompose.
        values = jnp.maximum(values, scaled[:, None])
        take = ~done.ok & good
        return number + 1, Decomposed(
            jnp.where(take[:, None], values, done.values),
            jnp.where(take[:, None, None], new, done.matrices),
            done.ok | good,
            done.failures + (~done.ok & ~good),
        )

    def undone(carry: tuple[Array, Decomposed]) -> Array:
        return (carry[0] < len(RETRIES)) & ~carry[1].ok.all()

    start = Decomposed(
        jnp.ones((count, size), dtype), jnp.tile(eye, (count, 1, 1)), ~wanted, jnp.zeros((count,), jnp.int32)
    )
    result: Decomposed = lax.while_loop(undone, attempt, (jnp.zeros((), jnp.int32), start))[1]
    return result


def follow(matrices: Array, damping: Array, bases: Array, wanted: Array, *, mesh: Mesh | None) -> Decomposed:
    """One step of orthogonal iteration from known bases, without retries; nothing is computed if nothing is wanted.

    Args:
        matrices: (matrices, size, size), undamped.
        damping: (matrices,).
        bases: (matrices, size, size), the largest eigenvalue first: in this order the iteration converges, because
            what a column has of those before it is taken out of it.
        wanted: which are of interest, (matrices,).
        mesh: as in `decompose`.
    """
    count, size = matrices.shape[:2]
    dtype = matrices.dtype
    damped = matrices + damping[:, None, None] * jnp.eye(size, dtype=dtype)
    usable = wanted & are_finite(damped)
    pairs = jnp.concatenate([jnp.where(usable[:, None, None], damped, jnp.eye(size, dtype=dtype)), bases], 2)

    def idle(_: Array) -> tuple[Array, Array]:
        return jnp.ones((count, size), dtype), jnp.zeros((count, size, size), dtype)

    values, new = lax.cond(usable.any(), _split(qr, mesh), idle, pairs)
    good = usable & are_finite(new) & are_finite(values)
    return Decomposed(jnp.maximum(values, damping[:, None]), new, good, (wanted & ~good).astype(jnp.int32))


def qr(pairs: Array) -> tuple[Array, Array]:
    """The basis Q' of M Q = Q' R, behind the Rayleigh quotients of its columns.

    By Householder reflections, which are backward stable: columns may differ in length as much as eigenvalues do.

    Args:
        pairs: (matrices, size, 2 size), each M with Q beside it.
    """
    matrices, bases = jnp.split(pairs, 2, 2)
    vectors = jnp.linalg.qr(matrices @ bases)[0]
    return (vectors * (matrices @ vectors)).sum(1), vectors


def eigh(matrices: Array) -> tuple[Array, Array]:
    """Batched eigenvalues and bases."""
    values, vectors = jnp.linalg.eigh(matrices)
    return values, vectors


def inverse(matrices: Array) -> tuple[Array, Array]:
    """Batched inverses of positive definite matrices, NaN where one is not; zeros in place of eigenvalues."""
    root = jnp.linalg.cholesky(matrices)
    eye = jnp.broadcast_to(jnp.eye(matrices.shape[-1], dtype=matrices.dtype), matrices.shape)
    half = lax.linalg.triangular_solve(root, eye, left_side=True, lower=True)
    return jnp.zeros(matrices.shape[:-1], matrices.dtype), half.transpose(0, 2, 1) @ half


def _split(decomposition: Decomposition, mesh: Mesh | None) -> Decomposition:
    """The decomposition with its batch split over the devices of a mesh and gathered again."""
    if mesh is None or mesh.size == 1:
        return decomposition
    axis = PartitionSpec(mesh.axis_names)

    def run(matrices: Array) -> tuple[Array, Array]:
        count, size = matrices.shape[:2]
        padding = -count % mesh.size
        if padding:
            filler = jnp.tile(jnp.eye(size, matrices.shape[2], dtype=matrices.dtype), (padding, 1, 1))
            matrices = jnp.concatenate([matrices, filler])
        mapped = jax.shard_map(decomposition, mesh=mesh, in_specs=axis, out_specs=(axis, axis), check_vma=False)
        everywhere = NamedSharding(mesh, PartitionSpec())
        values, out = (lax.with_sharding_constraint(t, everywhere)[:count] for t in mapped(matrices))
        return values, out

    return run
