"""Directions of one state with and without a mesh; `sharded.py` runs it, on several devices."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from algoperf_kfac.jax import KFAC, batch_mesh, replicate
from tests.jax.toys import OPTIONS, batch, cross_entropy, mlp, mlp_params, steps

SIZES = (4, *[32] * 10, 3)  # nine equal layers
SCALINGS: dict[str, dict[str, Any]] = {
    "power": {},
    "polar": {"scaling": "polar", "length": "rms"},
    "second_moment": {"scaling": "second_moment"},
}
# Which layers a device takes depends on their number alone: all numbers under one scaling, two under the others.
DEVICES = {"power": (2, 4, 8), "polar": (2, 8), "second_moment": (4, 8)}


def made(mesh: Any, options: dict[str, Any]) -> KFAC:
    return KFAC(mlp, cross_entropy, mlp_params(SIZES), *batch(), mesh=mesh, **OPTIONS | options)


def distance(one: Any, other: Any) -> float:
    """The largest relative one of all leaves."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-300)) for a, b in jax.device_get(list(pairs)))


def found() -> dict[str, dict[int, dict[str, Any]]]:
    """What the directions of a step without statistics are beside those on one device, by scaling and devices.

    "flops" are those of one device as a share of those without a mesh.
    """
    out: dict[str, dict[int, dict[str, Any]]] = {}
    for scaling, options in SCALINGS.items():
        alone = made(None, options)
        params = mlp_params(SIZES)
        state = alone.init(params)
        _, with_statistics, _traces = steps(alone)
        params, state = jax.jit(with_statistics)(params, state, *batch())
        gradient = jax.jit(jax.grad(lambda p: cross_entropy(mlp(p, *batch()), *batch())))(params)
        program = jax.jit(alone.transformation.update).lower(gradient, state, params).compile()
        want, flops = program(gradient, state, params), program.cost_analysis()["flops"]
        out[scaling] = {}
        for devices in DEVICES[scaling]:
            mesh = batch_mesh(jax.devices()[:devices])
            operands = replicate((gradient, state, params), mesh)
            program = jax.jit(made(mesh, options).transformation.update).lower(*operands).compile()
            got = program(*operands)
            out[scaling][devices] = {
                "directions": distance(got[0], want[0]),
                "state": distance(got[1], want[1]),
                "replicated": all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(got)),
                "flops": program.cost_analysis()["flops"] / flops,
            }
    return out
