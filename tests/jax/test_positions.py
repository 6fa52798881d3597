"""Which positions count and to which example they belong; scales of the loss."""

from __future__ import annotations

import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from algoperf_kfac.jax import KFAC, Positions
from tests.jax import naive
from tests.jax.models import of, wavy
from tests.jax.support import assert_equal, factors, normal, observe

MASK = np.array([[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=float)


def split(rows: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
    return [r[m > 0] for r, m in zip(rows, mask, strict=True)]


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("kind", ["mask", "boolean", "gradient", "length-first", "conv", "conv-many-offsets"])
def test_masks(kind: str, approximation: str) -> None:
    """Masked positions count neither in R nor in the sums; an example without positions is no example."""
    mask = MASK
    if kind.startswith("conv"):
        kernel = (3,) if kind == "conv" else (70,)  # above MAX_WINDOWS patches are built after all
        module: nn.Module = nn.Conv(3, kernel, strides=2)
        x = normal(1, 4, 8, 2)
    elif kind == "length-first":
        module, x = nn.Dense(3), normal(1, 4, 4, 2)
    else:
        module, x = nn.Dense(3), normal(1, 4, 4, 2)
    weights = jnp.asarray(mask.T if kind == "length-first" else mask)
    positions = {
        "mask": weights, "boolean": weights > 0, "gradient": Positions("gradient"), "conv": weights,
        "conv-many-offsets": weights, "length-first": Positions(mask=weights, batch_dim=1),
    }[kind]  # fmt: skip

    def loss(f: Array, *args: Any) -> Array:
        return (jnp.sin(f + jnp.arange(f.size).reshape(f.shape)).sum(-1) * weights).sum()

    apply, params, args = of(module, x)
    (call,) = naive.record(apply, loss, params, *args)["kernel"]
    inputs, grads = call.input_rows(), call.gradient_rows()
    if kind == "length-first":
        inputs, grads = inputs.swapaxes(0, 1), grads.swapaxes(0, 1)
    got = factors(apply, loss, params, *args, positions=positions, approximation=approximation)["kernel"]
    want = naive.factors(split(inputs, mask), split(grads, mask), bias=True, approximation=approximation)
    assert_equal(got, want)


@pytest.mark.parametrize("readout", ["sum", "mean"])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_segments(approximation: str, readout: str) -> None:
    """Rows of a packed batch by segment, a mask over rows included; node and edge layers have their own ids."""
    nodes, edges = jnp.array([0, 0, 1, 2, 2, 2]), jnp.array([0, 1, 1, 2, 2, 1, 2])
    mask = np.array([1, 1, 1, 0, 1, 1], dtype=float)

    def apply(p: Any, x: Array, e: Array) -> Array:
        h = jnp.tanh(x @ p["node"]) * mask[:, None]
        m = jnp.tanh(e @ p["edge"] + p["b"])
        pooled = jax.ops.segment_sum(h, nodes, 3) + jax.ops.segment_sum(m, edges, 3)
        return pooled @ p["head"]

    params = {"node": normal(0, 4, 3), "edge": normal(1, 2, 3), "b": normal(2, 3), "head": normal(3, 3, 2)}
    args = normal(4, 6, 4), normal(5, 7, 2)
    options = {"num_segments": 3, "readout": readout}
    positions = [
        Positions(mask=jnp.asarray(mask), segment_ids=nodes, **options), Positions(segment_ids=edges, **options)
    ]  # fmt: skip
    recorded = {name: calls[0] for name, calls in naive.record(apply, wavy, params, *args).items()}
    pairs = factors(apply, wavy, params, *args, positions=positions, approximation=approximation)
    for name, ids, keep in (
        ("node", nodes, mask),
        ("edge", edges, np.ones(7)),
        ("head", jnp.arange(3), np.ones(3)),
    ):
        rows = [
            [t[(np.asarray(ids) == n) & (keep > 0), 0] for n in range(3)]
            for t in (recorded[name].input_rows(), recorded[name].gradient_rows())
        ]
        want = naive.factors(*rows, bias=name == "edge", approximation=approximation, readout=readout)
        assert_equal(pairs[name], want)


def test_blocks_above_the_largest_factor() -> None:
    """Block-diagonal and one-sided factors are the blocks of the whole ones."""
    apply, params, args = of(nn.Dense(3), normal(1, 6, 9))
    whole = factors(apply, wavy, params, *args)["kernel"]
    parts = factors(apply, wavy, params, *args, max_factor_dim=4)["kernel"]
    ends = [0, 4, 7, 10]
    for block, (start, stop) in zip(parts.A, itertools.pairwise(ends), strict=True):
        np.testing.assert_allclose(block, whole.A[start:stop, start:stop], atol=1e-12)
    one = factors(apply, wavy, params, *args, max_factor_dim=4, large_factor="one_sided")["kernel"]
    assert one.A == ()
    np.testing.assert_allclose(one.B, whole.B, atol=1e-12)


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_scales_of_mean_losses(approximation: str) -> None:
    """A mean loss, the summed one with its count, and AlgoPerf's mapping have the same factors."""
    apply, params, (x,) = of(nn.Dense(3), normal(1, 5, 2, 4))
    summed = factors(apply, wavy, params, x, approximation=approximation)["kernel"]
    mean = factors(apply, lambda f, x: wavy(f) / 5, params, x, loss_normalizer=None, approximation=approximation)
    assert_equal(mean["kernel"], summed)
    tokens = factors(apply, lambda f, x: wavy(f) / 10, params, x, loss_normalizer=10, approximation=approximation)
    assert_equal(tokens["kernel"], summed)
    optimizer = KFAC(
        apply, lambda f, x: {"summed": wavy(f), "n_valid_examples": jnp.asarray(7.0)}, params, x,
        approximation=approximation,
    )  # fmt: skip
    _, pairs = observe(optimizer, params, x)
    assert_equal(pairs["kernel"], summed)
