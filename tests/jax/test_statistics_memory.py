"""What a statistics step holds beside the gradient's own temporaries, by XLA's figures for a CPU."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.jax.capture import value_grad_and_statistics
from algoperf_kfac.jax.discovery import discover
from algoperf_kfac.jax.factors import outer_sums
from algoperf_kfac.jax.reductions import MANY, any_nonzero, by_block
from algoperf_kfac.jax.vanishing import block_squares

EXAMPLES, POSITIONS, WIDTH, WORDS = 64, 128, 32, 4096


class Tagger(nn.Module):
    """A model most of whose memory is that of its outputs."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        return nn.Dense(WORDS)(nn.relu(nn.Dense(WIDTH)(nn.Embed(16, WIDTH)(tokens))))


def temporaries(function, *args) -> int:
    return jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ("approximation", "rows"),
    [("expand", 2048), ("reduce", None), ("mixed", 2048)],
    ids=["expand", "reduce", "mixed"],
)
def test_output_gradients_are_not_copied(approximation, rows):
    tokens = jnp.zeros((EXAMPLES, POSITIONS), jnp.int32)
    params = jax.eval_shape(lambda: Tagger().init(jax.random.PRNGKey(0), tokens))
    config = KFACConfig(approximation=approximation, statistics_rows=rows, max_factor_dim=1024)

    def loss(outputs, tokens):
        return optax.softmax_cross_entropy_with_integer_labels(outputs, tokens).mean()

    layers = discover(Tagger().apply, params, tokens, config=config)
    step = value_grad_and_statistics(Tagger().apply, loss, layers, config)
    plain = jax.value_and_grad(lambda params, tokens: loss(Tagger().apply(params, tokens), tokens))
    alone = temporaries(plain, params, tokens)
    with_statistics = temporaries(lambda *given: step(*given, positions="gradient"), params, tokens)
    outputs = EXAMPLES * POSITIONS * WORDS * 4
    chosen = 2048 * WORDS * 4 if approximation == "expand" else 0  # rows of a part are copied, as the plan says
    assert with_statistics - alone - chosen < 0.15 * outputs


@pytest.mark.parametrize("blocks", [(5,), (2, 3), (2, 2, 1), (1, 2, 2), ()])
def test_blocks_one_by_one(blocks):
    rows = np.random.default_rng(0).normal(size=(4, 3, 2, 5)).astype(np.float32)
    parts = np.split(rows, np.cumsum(blocks)[:-1], -1) if blocks else []
    found = by_block(lambda part: part.sum(-1), jnp.asarray(rows), blocks)
    assert len(found) == len(parts)
    for one, part in zip(found, parts, strict=True):
        np.testing.assert_allclose(one, part.sum(-1), rtol=1e-6)


@pytest.mark.parametrize("groups", [1, 2])
def test_sums_of_blocks(groups):
    rows = np.random.default_rng(1).normal(size=(4, 3, groups, 5))
    squares = block_squares(jnp.asarray(rows), (2, 2, 1))
    expected = np.stack([np.square(part).sum((1, 3)) for part in np.split(rows, [2, 4], -1)], -1)
    np.testing.assert_allclose(squares, expected, rtol=1e-5)
    flat = rows.reshape(-1, groups, 5)
    for found, part in zip(outer_sums(jnp.asarray(flat), None, (2, 2, 1)), np.split(flat, [2, 4], -1), strict=True):
        np.testing.assert_allclose(found, np.einsum("mgi,mgj->gij", part, part), rtol=1e-5)


@pytest.mark.parametrize("size", [3, MANY])
def test_any_nonzero(size):
    x = np.zeros((6, size), np.float32)
    x[1, 1], x[2, 0], x[3, 2], x[4, 1] = 1e-40, np.nan, -1e-30, -0.0
    x[5] = 1.0
    # The smallest of these is a denormal, which XLA on a CPU may take for zero.
    assert any_nonzero(jnp.asarray(x), 1).tolist()[2:] == [True, True, False, True]
    assert not any_nonzero(jnp.asarray(x), 1)[0]
