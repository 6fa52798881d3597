"""Statistics under pmap and shard_map, summed over the devices; `sharded.py` runs it, on several devices."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from algoperf_kfac.jax import KFAC
from tests.jax.explicit import apply, loss
from tests.jax.support import normal


def worst() -> dict[str, float]:
    """By way, the largest difference between statistics of two devices, summed, and of the whole batch."""
    params = {"in": normal(0, 4, 5), "b": normal(1, 5), "out": normal(2, 5, 3)}
    x, y = normal(3, 8, 4), jnp.arange(8) % 3
    optimizer = KFAC(apply, loss, params, x, y, approximation="reduce")

    def summed(params: Any, x: Array, y: Array) -> Any:
        return jax.lax.psum(optimizer.value_grad_and_statistics(params, x, y)[2], "batch")

    want = jax.jit(lambda *args: optimizer.value_grad_and_statistics(*args)[2])(params, x, y)
    mesh = jax.make_mesh((2,), ("batch",), devices=jax.devices()[:2])
    one, split = PartitionSpec(), PartitionSpec("batch")
    by_shards = functools.partial(jax.shard_map, summed, mesh=mesh, in_specs=(one, split, split), out_specs=one)
    replicas = jax.pmap(summed, "batch", in_axes=(None, 0, 0), devices=jax.devices()[:2])(
        params, x.reshape(2, 4, 4), y.reshape(2, 4)
    )
    found = {
        "pmap": jax.tree.map(lambda t: t[0], replicas),
        "shard_map": jax.jit(by_shards())(params, x, y),
        "shard_map, unchecked": jax.jit(by_shards(check_vma=False))(params, x, y),
    }
    return {
        way: max(
            float(jnp.abs(a - b).max())
            for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(jax.device_get(got)), strict=True)
        )
        for way, got in found.items()
    }
