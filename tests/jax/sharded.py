"""Runs in a process of its own, with eight devices: trains on some of them and on one; prints the differences."""

from __future__ import annotations

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from algoperf_kfac.jax import KFAC, batch_mesh, replicate, shard_batch
from tests.jax import dealt, explicit, mapped
from tests.jax.toys import OPTIONS, batch, cross_entropy, mlp, mlp_params, steps

EIGEN: dict[str, Any] = {"preconditioner": "eigen"}
INVERSE: dict[str, Any] = {"preconditioner": "inverse", "damping_mode": "absolute"}
# By the number of devices: each is compiled for one and for several, which takes its time.
CONFIGURATIONS = {
    2: (("reduce", EIGEN),),
    4: (("expand", INVERSE),),
    8: (("reduce", EIGEN),),
}


def positions_mlp(params: Any, x: Any, y: Any) -> Any:
    """Three positions an example, averaged before the loss."""
    return mlp(params, jnp.stack([x, jnp.sin(x), x * x], 1)).mean(1)


def train(mesh: Any, approximation: str, options: dict[str, Any]) -> tuple[Any, Any, str]:
    """Parameters and state after twelve steps, and the program of a step with statistics under the mesh."""
    x, y = batch()
    ours = KFAC(
        positions_mlp,
        cross_entropy,
        mlp_params(),
        x,
        y,
        mesh=mesh,
        approximation=approximation,
        **OPTIONS | options,
    )
    params, state = mlp_params(), ours.init(mlp_params())
    if mesh is not None:
        params, state = replicate((params, state), mesh)
        x, y = shard_batch((x, y), mesh)
    plain, with_statistics, _traces = steps(ours, apply=positions_mlp)
    run = jax.jit(plain), jax.jit(with_statistics)
    text = "" if mesh is None else run[1].lower(params, state, x, y).compile().as_text()
    for step in range(12):
        params, state = run[ours.is_statistics_step(step)](params, state, x, y)
    return params, state, text


def shapes_of(text: str, size: int) -> list[int]:
    """Leading dimensions of the batches of matrices of one size that go into a decomposition."""
    found = set()
    for line in text.splitlines():
        if "custom-call" in line and any(word in line for word in ("syevd", "potrf", "Cholesky", "cholesky")):
            for piece in line.split("f64[")[1:]:
                dims = piece.split("]")[0].split(",")
                if len(dims) == 3 and dims[1] == dims[2] == str(size):
                    found.add(int(dims[0]))
    return sorted(found)


@functools.cache
def trained_alone(approximation: str, preconditioner: str) -> tuple[Any, Any, str]:
    return train(None, approximation, {"eigen": EIGEN, "inverse": INVERSE}[preconditioner])


def compared(devices: int) -> list[dict[str, Any]]:
    """What the trainings on some devices are beside those on one."""
    mesh, out = batch_mesh(jax.devices()[:devices]), []
    for approximation, options in CONFIGURATIONS[devices]:
        params, state, text = train(mesh, approximation, options)
        alone, alone_state, _ = trained_alone(approximation, options["preconditioner"])
        worst = max(
            float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())
            for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(alone), strict=True)
        )
        factors = max(
            float(np.abs(np.asarray(a) - np.asarray(b)).max() / max(np.abs(np.asarray(b)).max(), 1e-300))
            for key, stack in state[0].stacks.items()
            for side in ("a", "b")
            for a, b in zip(getattr(stack, side), getattr(alone_state[0].stacks[key], side), strict=True)
        )  # fmt: skip
        out.append(
            {
                "configuration": [approximation, options], "parameters": worst, "factors": factors,
                "batches": shapes_of(text, 5),
                "gathers": text.count("all-gather"), "reduces": text.count("all-reduce"),
                "replicated": all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves((params, state))),
            }
        )  # fmt: skip
    return out


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)
    assert jax.device_count() == max(CONFIGURATIONS)
    others = {"explicit": explicit.worst(), "mapped": mapped.worst(), "directions": dealt.found()}
    print(json.dumps({devices: compared(devices) for devices in CONFIGURATIONS} | others))


if __name__ == "__main__":
    main()
