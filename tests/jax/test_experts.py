"""Mixtures of experts: `ragged_dot`, expert by expert against products of its own rows."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, lax

from algoperf_kfac.jax import KFAC, Positions, layer_states
from algoperf_kfac.jax.transform import find_state
from tests.jax.models import wavy
from tests.jax.support import factors, normal

SIZES = (3, 0, 2)  # rows of three experts; a sixth row has none


def apply(p: Any, x: Array, sizes: Array) -> Array:
    return jnp.tanh(lax.ragged_dot(jnp.tanh(x @ p["in"]), p["experts"], sizes)) @ p["out"]


def apart(p: Any, x: Array, sizes: Array) -> Array:
    """The same with a product for each expert, for sizes that are known."""
    h = jnp.tanh(x @ p["in"])
    parts, start = [], 0
    for expert, size in enumerate(SIZES):
        parts.append(h[start : start + size] @ p[f"expert{expert}"])
        start += size
    return jnp.tanh(jnp.concatenate([*parts, jnp.zeros((len(x) - start, 3))])) @ p["out"]


def params() -> Any:
    return {"in": normal(0, 4, 5), "experts": normal(1, 3, 5, 3), "out": normal(2, 3, 2)}


def data() -> tuple[Array, Array]:
    return normal(3, 6, 4), jnp.array(SIZES)


@pytest.mark.filterwarnings("ignore:K-FAC. the batch has")
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("positions", [None, "gradient", "mask"])
def test_each_expert_is_a_layer_of_its_rows(approximation: str, positions: str | None) -> None:
    """B of each is scaled by the examples of the batch, not by those of the expert."""
    together, (x, sizes) = params(), data()
    mask = jnp.array([1.0, 0, 1, 1, 1, 1])
    loss = lambda f, *_: wavy(f * mask[:, None]) / 6  # noqa: E731
    given = {"mask": Positions(mask), "gradient": Positions("gradient")}.get(positions or "")
    options = {"approximation": approximation, "loss_normalizer": 6.0}
    got = factors(apply, loss, together, x, sizes, positions=given, **options)
    separate = {"in": together["in"], "out": together["out"]}
    separate |= {f"expert{i}": together["experts"][i] for i in range(3)}
    # Those of the slices take a mask of their own.
    given = [mask, mask[:3], mask[3:5]] if positions == "mask" else given
    want = factors(apart, loss, separate, x, sizes, positions=given, exclude=["expert1"], **options)
    pair = got["experts"]
    for expert in (0, 2):
        np.testing.assert_allclose(pair.A[expert], want[f"expert{expert}"].A, atol=1e-12)
        np.testing.assert_allclose(pair.B[expert], want[f"expert{expert}"].B, atol=1e-12)
    assert not pair.A[1].any()
    assert not pair.B[1].any()


def test_tokens_of_experts_are_not_warned_of(recwarn: pytest.WarningsRecorder) -> None:
    """With expand it only changes the scale of B which of them belong to one example; with reduce it does more."""

    def mixed(p: Any, x: Array, sizes: Array) -> Array:
        h = jnp.tanh(x @ p["in"])
        return lax.ragged_dot(h.reshape(-1, 5), p["experts"], sizes).reshape(2, 3, 3) @ p["out"]

    x, sizes = normal(3, 2, 3, 4), jnp.array(SIZES)
    for approximation in ("expand", "reduce"):
        ours = KFAC(mixed, lambda f, *_: wavy(f), params(), x, sizes, approximation=approximation)
        jax.eval_shape(ours.value_grad_and_statistics, params(), x, sizes)  # warnings come with the trace
        said = [str(w.message) for w in recwarn]
        assert [("experts (6)" in text) for text in said] == [True] * (approximation == "reduce"), said


@pytest.mark.filterwarnings("ignore:K-FAC. the batch has")
def test_an_expert_without_rows_keeps_its_factors() -> None:
    """It is seen first, or again, with the right average; the others do not lose a step for it."""
    x, _ = data()
    optimizer = KFAC(apply, lambda f, *_: wavy(f), params(), *data(), factor_interval=1, refresh_interval=1)
    run = jax.jit(optimizer.value_grad_and_statistics)
    update = jax.jit(optimizer.update)
    state, seen = optimizer.init(params()), {0: [], 1: [], 2: []}
    for sizes in ((3, 0, 2), (2, 2, 2), (0, 3, 3), (1, 0, 5)):
        _, gradient, statistics = run(params(), x, jnp.array(sizes), loss_normalizer=1.0)
        updates, state = update(gradient, state, params(), statistics=statistics)
        assert all(bool(jnp.isfinite(u).all()) for u in jax.tree.leaves(updates))
        for expert, size in enumerate(sizes):
            if size:
                seen[expert].append(statistics["experts"].a[0][expert] / size)
    layer = layer_states(find_state(state).stacks, optimizer.layers)["experts"]
    assert int(layer.taken) == 4
    assert int(layer.dropped) == 0
    np.testing.assert_allclose(layer.a[0][2] / layer.weight, average(seen[2]), rtol=1e-10)
    for expert in (0, 1):  # means over what they saw, whatever the weights
        found = layer.a[0][expert] / layer.weight
        weights = np.linalg.lstsq(np.stack([m.ravel() for m in seen[expert]], 1), np.ravel(found), rcond=None)[0]
        np.testing.assert_allclose(sum(weights), 1, rtol=1e-8)


def average(values: list[Array], decay: float = 0.9) -> np.ndarray:
    total, weight = np.zeros_like(values[0]), 0.0
    for value in values:
        total, weight = decay * total + (1 - decay) * np.asarray(value), decay * weight + 1 - decay
    return total / weight


@pytest.mark.filterwarnings("ignore:K-FAC. the batch has")
def test_the_first_rows_of_an_expert_do_not_drown_the_others() -> None:
    """On a step without statistics its direction is about as long as theirs."""
    x, sizes = data()
    optimizer = KFAC(apply, lambda f, *_: wavy(f), params(), x, sizes, learning_rate=1.0, initial_statistics=1)
    update = jax.jit(optimizer.update)
    _, gradient, statistics = jax.jit(optimizer.value_grad_and_statistics)(params(), x, sizes)
    _, state = update(gradient, optimizer.init(params()), params(), statistics=statistics)
    gradient["experts"] = gradient["experts"].at[1].set(gradient["experts"][0])
    updates, _ = update(gradient, state, params())
    lengths = np.linalg.norm(updates["experts"], axis=(1, 2))
    assert lengths[1] < 3 * lengths[0]
    assert lengths[0] > 1e-3 * lengths[1]


def test_stacked_experts_in_a_scan() -> None:
    """Experts of several layers in one parameter: covered, and trained."""

    def deep(p: Any, x: Array, sizes: Array) -> Array:
        return lax.scan(lambda h, w: (jnp.tanh(lax.ragged_dot(h, w, sizes)), None), x, p["w"])[0]

    args = normal(1, 6, 4), jnp.array([2, 4])
    p = {"w": normal(0, 3, 2, 4, 4)}
    pair = factors(deep, wavy, p, *args)["w"]
    first = factors(lambda p, x, s: deep({"w": jnp.stack([p["a"], *p["rest"]])}, x, s), wavy, {
        "a": p["w"][0], "rest": p["w"][1:]}, *args)  # fmt: skip
    assert not first  # what is stacked from parts is no parameter
    assert pair.A.shape == (6, 4, 4)
    x = np.asarray(args[0])
    np.testing.assert_allclose(pair.A[0], x[:2].T @ x[:2] / 2, atol=1e-12)
    np.testing.assert_allclose(pair.A[1], x[2:].T @ x[2:] / 4, atol=1e-12)
