"""Parameters of 16 bits: what rounds to zero in float16 stops nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from algoperf_kfac import jax as kfac_jax
from algoperf_kfac import pytorch as kfac_torch

STEPS = 10


def in_pytorch(dtype: str, x: np.ndarray, y: np.ndarray) -> list[float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).to(getattr(torch, dtype))
    inputs, labels = torch.tensor(x).to(getattr(torch, dtype)), torch.tensor(y)
    optimizer, losses = kfac_torch.KFAC(model, learning_rate=0.03), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        with optimizer.capture():
            loss = F.cross_entropy(model(inputs).float(), labels)
            loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def in_jax(dtype: str, x: np.ndarray, y: np.ndarray) -> list[float]:
    keys = jax.random.split(jax.random.key(0))
    params = {
        "first": 0.4 * jax.random.normal(keys[0], (6, 8)),
        "bias": jnp.zeros(8),
        "second": 0.4 * jax.random.normal(keys[1], (8, 3)),
    }
    params, inputs = jax.tree.map(lambda leaf: leaf.astype(dtype), (params, jnp.asarray(x)))

    def apply(params, x):
        return jax.nn.relu(x @ params["first"] + params["bias"]) @ params["second"]

    def loss_fn(outputs, _):
        return optax.softmax_cross_entropy_with_integer_labels(outputs.astype(jnp.float32), jnp.asarray(y)).mean()

    optimizer, losses = kfac_jax.KFAC(apply, loss_fn, params, inputs, learning_rate=0.03), []

    @jax.jit
    def step(params, state):
        loss, gradient, statistics = optimizer.value_grad_and_statistics(params, inputs)
        updates, state = optimizer.update(gradient, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state, loss

    state = optimizer.init(params)
    for _ in range(STEPS):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("train", [in_pytorch, in_jax])
def test_it_trains_where_gradients_are_zero(train, dtype: str) -> None:
    """An input that is always zero, whose gradients are: eps rounds to zero in float16, too."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 6)).astype(np.float32)
    x[:, 0] = 0
    losses = train(dtype, x, rng.integers(0, 3, 32))
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.9 * losses[0]
