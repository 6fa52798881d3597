"""Statistics under a mesh with explicit axes, and without one; `sharded.py` runs it, on several devices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from algoperf_kfac.jax import KFAC
from tests.jax.support import normal


def apply(p: Any, x: Array, y: Array) -> Array:
    h = jnp.tanh(jnp.stack([x, x * x], 1) @ p["in"] + p["b"]).mean(1)
    return h @ p["out"]


def loss(f: Array, x: Array, y: Array) -> Array:
    return -(jax.nn.log_softmax(f) * jax.nn.one_hot(y, 3)).sum(-1).mean()


def worst() -> float:
    """The largest difference of statistics, and of the gradient, on two devices and on one."""
    params = {"in": normal(0, 4, 5), "b": normal(1, 5), "out": normal(2, 5, 3)}
    x, y = normal(3, 8, 4), jnp.arange(8) % 3
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    largest = 0.0
    for approximation in ("expand", "reduce"):
        optimizer = KFAC(apply, loss, params, x, y, approximation=approximation)
        alone = jax.jit(optimizer.value_grad_and_statistics)(params, x, y)
        with jax.sharding.use_mesh(mesh):
            split = NamedSharding(mesh, PartitionSpec("batch"))
            sharded = [jax.device_put(t, split) for t in (x, y)]
            whole = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
            found = jax.jit(optimizer.value_grad_and_statistics)(whole, *sharded)
        for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(jax.device_get(found)), strict=True):
            largest = max(largest, float(jnp.abs(a - b).max()))
    return largest
