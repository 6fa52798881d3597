"""Statistics from a part of the batch and "mixed" in JAX: those of the chosen examples, and PyTorch's."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import Array
from torch import nn

from algoperf_kfac import jax as kfac_jax
from algoperf_kfac import pytorch as kfac_torch
from algoperf_kfac.jax.transform import find_state, move_averages
from tests.jax.support import normal

N = 12


def model(params: Any, x: Array) -> Array:
    """A convolution in front of an instance norm, another one, linear layers over positions and behind them."""

    def conv(x: Array, w: Array) -> Array:
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    h = conv(x, params["first"])
    h = (h - h.mean((1, 2), keepdims=True)) / (h.std((1, 2), keepdims=True) + 0.1)
    h = jnp.tanh(conv(jnp.tanh(h), params["second"]))
    h = jnp.tanh(h @ params["rows"])
    return h.mean((1, 2)) @ params["head"]


class Model(nn.Module):
    """The same."""

    def __init__(self, params: Any) -> None:
        super().__init__()
        for name in ("first", "second"):
            weight = torch.tensor(np.asarray(params[name]).transpose(3, 2, 0, 1))
            conv = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1, bias=False, dtype=weight.dtype)
            conv.weight.data = weight
            self.add_module(name, conv)
        for name in ("rows", "head"):
            weight = torch.tensor(np.asarray(params[name]).T)
            linear = nn.Linear(*weight.shape[::-1], bias=False, dtype=weight.dtype)
            linear.weight.data = weight
            self.add_module(name, linear)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x.permute(0, 3, 1, 2))
        std = h.std((2, 3), keepdim=True, unbiased=False)
        h = (h - h.mean((2, 3), keepdim=True)) / (std + 0.1)
        h = self.second(h.tanh()).tanh().permute(0, 2, 3, 1)
        return self.head(self.rows(h).tanh().mean((1, 2)))


SHAPES = {"first": (3, 3, 2, 4), "second": (3, 3, 4, 5), "rows": (5, 4), "head": (4, 3)}
LAYERS = tuple(SHAPES)


@pytest.fixture
def params() -> Any:
    return {name: normal(i, *shape) / 2 for i, (name, shape) in enumerate(SHAPES.items())}


@pytest.fixture
def x() -> Array:
    return normal(7, N, 4, 4, 2)


def mean_loss(outputs: Any, *_: Any) -> Any:
    return (outputs**2).sum() / len(outputs)


def in_jax(params: Any, x: Array, positions: Any = None, **options: Any) -> tuple[Any, dict[str, float]]:
    """Factors of a batch, and metrics; without the refresh of a whole step."""
    optimizer = kfac_jax.KFAC(model, mean_loss, params, x, **options)

    @jax.jit
    def step(params: Any, x: Array) -> Any:
        *_, statistics = optimizer.value_grad_and_statistics(params, x, positions=positions)
        state = find_state(optimizer.init(params))
        stacks = move_averages(state.stacks, statistics, optimizer.layers, optimizer.config)
        return state._replace(stacks=stacks)

    state = step(params, x)
    return optimizer.factors(state), optimizer.metrics(state)


def in_torch(params: Any, x: Array, positions: Any = None, **options: Any) -> tuple[Any, dict[str, float]]:
    optimizer = kfac_torch.KFAC(Model(params), **options)
    with optimizer.capture(positions):
        mean_loss(optimizer._model(torch.tensor(np.asarray(x)))).backward()
    optimizer.step()
    return optimizer.factors(), optimizer.metrics()


def assert_alike(ours: Any, torchs: Any) -> None:
    for name in LAYERS:
        for mine, other in zip(ours[name], torchs[name], strict=True):
            np.testing.assert_allclose(np.asarray(mine), np.asarray(other), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "positions"),
    [
        ({"approximation": "expand", "statistics_rows": 64}, None),
        ({"approximation": "expand", "statistics_rows": 20}, "gradient"),  # of 4 examples, every third position
        ({"approximation": "reduce", "statistics_rows": 4}, "gradient"),
        ({"approximation": "mixed"}, None),
        ({"approximation": "mixed", "statistics_rows": 4}, "gradient"),
        ({"approximation": "reduce", "statistics_rows": 2, "statistics_rows_by_side": True}, None),
    ],
    ids=["expand", "thinned", "reduce", "mixed", "mixed in part", "by side"],
)
def test_both_frameworks_agree(params: Any, x: Array, options: dict[str, Any], positions: Any) -> None:
    ours, said = in_jax(params, x, positions, **options)
    theirs, told = in_torch(params, x, positions, **options)
    assert_alike(ours, theirs)
    if options["approximation"] == "mixed":
        assert [said[f"{name}/vanished"] for name in LAYERS] == [1, 0, 0, 0]
        assert [told[f"{name}/vanished"] for name in LAYERS] == [1, 0, 0, 0]
        assert said["vanished"] == told["vanished"] == 1
        b = np.asarray(ours["first"].B)
        np.testing.assert_allclose(b, b[0, 0] * np.eye(4), rtol=1e-12)
        assert b[0, 0] > 0
    else:
        assert said["vanished"] == told["vanished"] == 0


def test_they_are_those_of_every_nth_example(params: Any, x: Array) -> None:
    """With expand A of a third is that of the third; B sums over all, so it is three times as large."""
    found, _ = in_jax(params, x, approximation="expand", statistics_rows=64)
    chosen, _ = in_jax(params, x[::3], approximation="expand")
    for name in ("first", "second", "rows"):
        np.testing.assert_allclose(found[name].A, chosen[name].A, rtol=1e-9)
        np.testing.assert_allclose(found[name].B, 3 * chosen[name].B, rtol=1e-9, atol=1e-12)
    whole, _ = in_jax(params, x, approximation="expand")
    np.testing.assert_allclose(found["head"].B, whole["head"].B)  # one row each, so all are taken


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_a_tied_table(approximation: str) -> None:
    params, tokens = {"table": normal(3, 7, 4)}, jnp.asarray(np.random.default_rng(0).integers(7, size=(N, 5)))

    def tied(params: Any, tokens: Array) -> Array:
        return jnp.tanh(params["table"][tokens]) @ params["table"].T

    def summed(outputs: Array, *_: Any) -> Array:
        return (jnp.sin(outputs) + outputs**2).sum()

    def of(tokens: Array, rows: int | None) -> Array:
        optimizer = kfac_jax.KFAC(tied, summed, params, tokens, approximation=approximation, statistics_rows=rows)
        run = jax.jit(lambda *args: optimizer.value_grad_and_statistics(*args, loss_normalizer=1.0))
        return run(params, tokens)[2]["table"].a[0]

    rows = N // 3 if approximation == "reduce" else N * 5 // 3
    np.testing.assert_allclose(of(tokens, rows), of(tokens[::3], None), rtol=1e-9)


def test_other_values_are_refused(params: Any, x: Array) -> None:
    with pytest.raises(ValueError, match="hyperparameter statistics_rows=0"):
        kfac_jax.KFAC(model, mean_loss, params, x, statistics_rows=0)
