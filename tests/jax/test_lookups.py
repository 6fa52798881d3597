"""Lookups of a tied table in every way that JAX has for them, against the uses taken apart and counted by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from algoperf_kfac.jax import KFAC, Positions
from tests.jax.support import factors, normal

N, T, V, P = 4, 3, 5, 2
INSIDE = jnp.arange(N * T).reshape(N, T) % V
OUTSIDE = INSIDE.at[0, 0].set(V).at[1, 2].set(V + 3)

Look = Callable[[Array, Array], Array]


def at(mode: str, **options: Any) -> Look:
    return lambda table, tokens: table.at[tokens].get(mode=mode, **options)


# By name: the tokens, how they are looked up, and the rows of the table that this reads, as one-hot vectors.
ONE_HOT: Any = np.eye(V)
CASES: dict[str, tuple[Array, Look, np.ndarray]] = {
    "plain": (INSIDE, lambda table, tokens: table[tokens], ONE_HOT[INSIDE]),
    "one by one": (
        INSIDE,
        lambda table, tokens: jax.vmap(jax.vmap(lambda i: table[i]))(tokens),
        ONE_HOT[INSIDE],
    ),
    "dynamic slices": (
        INSIDE,
        jax.vmap(jax.vmap(lambda table, i: jax.lax.dynamic_slice_in_dim(table, i, 1), (None, 0)), (None, 0)),
        ONE_HOT[INSIDE],
    ),
    "clipped": (OUTSIDE, at("clip"), ONE_HOT[np.minimum(OUTSIDE, V - 1)]),
    "wrapped": (INSIDE - V, lambda table, tokens: table[tokens], ONE_HOT[INSIDE]),
    "filled": (
        OUTSIDE,
        at("fill", fill_value=0.5),
        ONE_HOT[np.minimum(OUTSIDE, V - 1)] * (np.asarray(OUTSIDE) < V)[..., None],
    ),
    "of few bits": (
        INSIDE.astype(jnp.uint8),
        lambda table, tokens: table.at[tokens].get(mode="fill", fill_value=0.5),
        ONE_HOT[INSIDE],
    ),
    "filled with nothing": (INSIDE, at("fill"), ONE_HOT[INSIDE]),
}


def body(rows: Array) -> Array:
    return jnp.tanh(rows.reshape(N, T, P))


def wavy(outputs: Array) -> Array:
    """A loss with a gradient of its own at every output."""
    return (jnp.sin(outputs) * jnp.arange(1.0, V + 1)).sum()


def by_hand(table: Array, rows: Array, hot: np.ndarray, approximation: str) -> np.ndarray:
    """(tr(B_out) A_out + tr(A_emb) B_emb) / V of the summed loss, each use perturbed for itself."""

    def loss(rows: Array, shift: Array) -> Array:
        return wavy(body(rows) @ table.T + shift)

    of_rows, of_outputs = (
        np.asarray(g) for g in jax.grad(loss, (0, 1))(rows.reshape(N, T, P), jnp.zeros((N, T, V)))
    )
    hidden, counts = np.asarray(body(rows)), hot.sum(-1, keepdims=True)  # lookups that read the table
    of_rows = of_rows * counts
    if approximation == "expand":
        a_out = np.einsum("nti,ntj->ij", hidden, hidden) / (N * T)
        b_out = np.square(of_outputs).sum()
        a_emb = np.square(hot).sum() / counts.sum()
        b_emb = np.einsum("nti,ntj->ij", of_rows, of_rows)
    else:
        mean = hidden.mean(1)
        a_out, b_out = mean.T @ mean / N, np.square(of_outputs.sum(1)).sum()
        a_emb = np.square(hot.sum(1) / counts.sum(1)).sum() / N
        b_emb = of_rows.sum(1).T @ of_rows.sum(1)
    return (b_out * a_out + a_emb * b_emb) / V


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("positions", [None, Positions("gradient")], ids=["all", "gradient"])
@pytest.mark.parametrize("case", CASES)
def test_lookups(case: str, positions: Positions | None, approximation: str) -> None:
    tokens, look, hot = CASES[case]
    params = {"table": normal(1, V, P)}

    def apply(p: Any, tokens: Array) -> Array:
        return body(look(p["table"], tokens)) @ p["table"].T

    pairs = factors(apply, lambda f, _: wavy(f), params, tokens, positions=positions, approximation=approximation)
    expected = by_hand(params["table"], look(params["table"], tokens), hot, approximation)
    np.testing.assert_allclose(pairs["table"].A, expected, rtol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_their_products_are_the_gradient(case: str) -> None:
    """What the check beside the gradient makes of them, a number outside of the table included."""
    tokens, look, _ = CASES[case]
    params = {"table": normal(1, V, P)}

    def apply(p: Any, tokens: Array) -> Array:
        return body(look(p["table"], tokens)) @ p["table"].T

    errors = KFAC(apply, lambda f, _: wavy(f), params, tokens).check(params, tokens)
    assert max(errors.values()) < 1e-10


def test_a_number_further_below_than_the_table_is_long_is_no_row_from_its_end() -> None:
    """JAX counts once from the end; of what is still below, the derivative takes nothing."""
    tokens, params = INSIDE.at[1, 1].set(-V - 2), {"table": normal(1, V, P)}

    def apply(p: Any, tokens: Array) -> Array:
        return body(p["table"][tokens]) @ p["table"].T

    errors = KFAC(apply, lambda f, _: wavy(f), params, tokens).check(params, tokens)
    assert max(errors.values()) < 1e-10


@pytest.mark.parametrize(
    "look",
    [
        lambda bias, tokens: bias[tokens, 0],
        lambda bias, tokens: bias[tokens][..., 0],
        jax.vmap(jax.vmap(lambda bias, i: bias[i, 0], (None, 0)), (None, 0)),
        lambda bias, tokens: bias[:1][tokens * 0, tokens * 0],
    ],
)
def test_a_table_of_single_numbers(look: Look) -> None:
    """Biases of items: nothing of them is covered, and they are in nobody's way."""
    x, params = normal(0, N, T, P), {"w": normal(1, P, V), "bias": normal(2, V, 1)}

    def apply(p: Any, tokens: Array, x: Array) -> Array:
        return x @ p["w"] + look(p["bias"], tokens)[..., None]

    pairs = factors(apply, lambda f, *_: wavy(f), params, INSIDE, x)
    assert pairs.keys() == {"w"}
    np.testing.assert_allclose(pairs["w"].A, np.einsum("nti,ntj->ij", x, x) / (N * T), rtol=1e-10)
