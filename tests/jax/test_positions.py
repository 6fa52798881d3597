"""Which positions count and to which example they belong; scales of the loss."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from algoperf_kfac.jax import KFAC, Positions
from tests.jax import naive, support
from tests.jax.models import of, wavy
from tests.jax.support import assert_equal, factors, normal, observe

MASK = np.array([[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=float)


def split(rows: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
    return [r[m > 0] for r, m in zip(rows, mask, strict=True)]


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize(
    "kind",
    [
        *("mask", "boolean", "weights", "bytes", "gradient"),
        *("length-first", "length-first-segments", "conv", "conv-many-offsets"),
    ],
)
def test_masks(kind: str, approximation: str) -> None:
    """Masked positions count neither in R nor in the sums, others once whatever number stands for them; an example
    without positions is no example."""
    mask = MASK
    if kind.startswith("conv"):
        kernel = (3,) if kind == "conv" else (70,)  # above MAX_WINDOWS patches are built after all
        module: nn.Module = nn.Conv(3, kernel, strides=2)
        x = normal(1, 4, 8, 2)
    elif kind.startswith("length-first"):
        module, x = nn.Dense(3), normal(1, 4, 4, 2)
    else:
        module, x = nn.Dense(3), normal(1, 4, 4, 2)
    weights = jnp.asarray(mask.T if kind.startswith("length-first") else mask)
    positions = {
        "mask": weights, "boolean": weights > 0, "weights": weights * jnp.array([0.5, 2, 1, 3]),
        "bytes": (255 * weights).astype(jnp.uint8), "gradient": Positions("gradient"), "conv": weights,
        "conv-many-offsets": weights, "length-first": Positions(mask=weights, batch_dim=1),
        "length-first-segments": Positions(3 * weights, np.broadcast_to(np.arange(4), (4, 4)), 4),
    }[kind]  # fmt: skip

    def loss(f: Array, *args: Any) -> Array:
        return (jnp.sin(f + jnp.arange(f.size).reshape(f.shape)).sum(-1) * weights).sum()

    apply, params, args = of(module, x)
    (call,) = naive.record(apply, loss, params, *args)["kernel"]
    inputs, grads = call.input_rows(), call.gradient_rows()
    if kind.startswith("length-first"):
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
        Positions(mask=jnp.asarray(0.5 * mask), segment_ids=nodes, **options),
        Positions(segment_ids=edges, **options),
    ]
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


# One number of examples for the batch -----------------------------------------------------------------------------


def window_model(p: Any, x: Array) -> Array:
    """(3, 4, 2): a layer on examples, one on windows of two positions, one on examples again."""
    h = jnp.tanh(x @ p["in"])
    h = jnp.tanh(h.reshape(6, 2, 3) @ p["windows"]).reshape(3, 4, 3)
    return h.mean(1) @ p["out"]


def windowed() -> Any:
    return {"in": normal(0, 2, 3), "windows": normal(1, 3, 3), "out": normal(2, 3, 2)}


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_layers_that_disagree(approximation: str) -> None:
    """Of a mean over three examples, B of six windows is that of the sum over three; they are named once."""
    x = normal(3, 3, 4, 2)
    optimizer = KFAC(window_model, lambda f, x: wavy(f) / 3, windowed(), x, approximation=approximation)
    with pytest.warns(
        UserWarning, match=r"K-FAC: the batch has 3 examples, as in sees .*: windows \(6\)\. B is"
    ) as seen:
        _, got = observe(optimizer, windowed(), x)
    assert seen[0].filename == support.__file__  # where the step calls the library
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        observe(optimizer, windowed(), x)
    with pytest.warns(UserWarning, match="other layers have other numbers of rows"):
        want = factors(window_model, lambda f, x: wavy(f), windowed(), x, approximation=approximation)
    for name, pair in want.items():
        assert_equal(got[name], pair)


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_windows_described_by_name(approximation: str) -> None:
    """The remedy that the warning names: then the layer is as if it had not cut its rows into windows."""

    def uncut(p: Any, x: Array) -> Array:
        return jnp.tanh(jnp.tanh(x @ p["in"]) @ p["windows"]).mean(1) @ p["out"]

    x, ids = normal(3, 3, 4, 2), jnp.array([0, 0, 1, 1, 2, 2])
    positions = {"win*": Positions(segment_ids=ids, num_segments=3)}
    loss = lambda f, x: wavy(f) / 3  # noqa: E731
    options = {"loss_normalizer": None, "approximation": approximation}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = factors(window_model, loss, windowed(), x, positions=positions, **options)
    for name, pair in factors(uncut, loss, windowed(), x, **options).items():
        assert_equal(got[name], pair)


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("bias", [True, False])
def test_calls_on_different_examples(approximation: str, bias: bool) -> None:
    """Calls with different numbers of examples see different ones, with equal numbers the same."""

    def apply(p: Any, x: Array, y: Array) -> tuple[Array, ...]:
        def layer(x: Array) -> Array:
            return x @ p["w"] + p["b"] if bias else x @ p["w"]

        return layer(x), layer(jnp.cos(x)), layer(y)

    params = {"w": normal(0, 2, 3), **({"b": normal(1, 3)} if bias else {})}
    args = normal(2, 3, 2, 2), normal(3, 5, 2, 2)
    first, view, other = naive.record(apply, wavy, params, *args)["w"]
    rows = [
        [*np.concatenate([t(first), t(view)], 1), *t(other)]
        for t in (naive.Recorded.input_rows, naive.Recorded.gradient_rows)
    ]
    got = factors(apply, wavy, params, *args, approximation=approximation)
    (pair,) = got.values()
    assert_equal(pair, naive.factors(*rows, bias=bias, approximation=approximation))


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_a_tied_table_called_on_different_examples(approximation: str) -> None:
    """Two batches through one model, as in semi-supervised training, are one batch of all their examples."""

    def model(p: Any, tokens: Array) -> Array:
        return jnp.tanh(p["table"][tokens]) @ p["table"].T

    def both(p: Any, x: Array, y: Array) -> Array:
        return jnp.concatenate([model(p, x), model(p, y)])

    params, x, y = {"table": normal(0, 5, 3)}, jnp.array([[0, 1], [4, 1]]), jnp.array([[2, 2], [3, 0], [1, 1]])
    got = factors(both, wavy, params, x, y, approximation=approximation)["table"]
    want = factors(model, wavy, params, jnp.concatenate([x, y]), approximation=approximation)["table"]
    np.testing.assert_allclose(got.A, want.A, atol=1e-12)


# Descriptions that concern no layer -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (
            np.ones((2, 3)),
            r"^positions: a mask of shape \(2, 3\) fits no layer\. Their rows are: in \(3, 4\), windows",
        ),
        (np.ones((4, 3)), r"a mask of shape \(4, 3\) fits no layer"),
        (Positions(np.ones((3, 5)), readout="sum"), r"a mask of shape \(3, 5\) fits no layer"),
        ([np.ones((2, 3)), np.ones(7)], r"a mask of shape \(2, 3\) and \(7,\) fits no layer"),
        ({"in": [np.ones((3, 5)), np.ones((6, 2))]}, r"positions\['in'\]: .* fits no layer\. Their rows are: in"),
        ({"windws": np.ones((6, 2))}, r"positions: no layer matches 'windws'"),
    ],
)
@pytest.mark.filterwarnings("ignore:K-FAC. the batch has")
def test_what_fits_nothing(positions: Any, message: str) -> None:
    x = normal(3, 3, 4, 2)
    with pytest.raises(ValueError, match=message):
        factors(window_model, lambda f, x: wavy(f), windowed(), x, positions=positions)


@pytest.mark.filterwarnings("ignore:K-FAC. the batch has")
def test_descriptions_for_layers_that_are_not_covered() -> None:
    """A pattern may mean an excluded layer; a list may hold a kind of rows that only such a layer has."""
    x = normal(3, 3, 4, 2)
    want = factors(window_model, lambda f, x: wavy(f), windowed(), x, exclude=["windows"])
    for positions in ([jnp.ones((6, 2)), jnp.ones((3, 4))], {"windows": jnp.ones((6, 2))}):
        got = factors(window_model, lambda f, x: wavy(f), windowed(), x, exclude=["windows"], positions=positions)
        for name, pair in want.items():
            assert_equal(got[name], pair)


@pytest.mark.parametrize("examples", [3, 5])
def test_an_embedding_needs_no_positions(examples: int) -> None:
    """A table that is looked up once per batch has no rows that positions could fit, and none is asked for."""

    def apply(p: Any, kinds: Array, of_node: Array) -> Array:
        return jax.ops.segment_sum((p["table"][kinds] @ p["in"])[of_node], of_node % 2, 2)

    params = {"table": normal(0, 4, 3), "in": normal(1, 3, 2)}
    nodes = jnp.arange(examples) % 4
    positions = Positions(segment_ids=jnp.array([0, 0, 1, 1]), num_segments=2)
    pairs = factors(apply, wavy, params, jnp.arange(4), nodes, positions=positions)
    assert pairs.keys() == {"in"}


def test_a_sequence_that_comes_first_is_named() -> None:
    """Where the outputs show it: (T, N, P) in, (N, C) out; not with the positions that it asks for."""
    params, x = {"w": normal(0, 2, 3)}, normal(1, 8, 4, 2)  # T = 8, N = 4
    optimizer = KFAC(lambda p, x: (x @ p["w"]).mean(0), lambda f, x: wavy(f), params, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        positions = Positions(batch_dim=1)
        jax.eval_shape(lambda p: optimizer.value_grad_and_statistics(p, x, positions=positions), params)
        swapped = KFAC(lambda p, x: (x @ p["w"]).swapaxes(0, 1), lambda f, x: wavy(f), params, x)
        jax.eval_shape(swapped.value_grad_and_statistics, params, x)
    with pytest.warns(UserWarning, match=r"layer w has inputs \(8, 4, features\).*batch_dim=1") as said:
        optimizer.value_grad_and_statistics(params, x)
    assert said[0].filename == __file__
