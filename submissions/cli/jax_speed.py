"""The operations of a refresh and a direction in JAX, to be timed; see `calibration`."""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from submissions.cli.calibration import Operation, rows_of


def name() -> str:
    """See `calibration.Device`."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return f"{platform.machine()} CPU, {len(os.sched_getaffinity(0))} cores, jax {jax.__version__}"
    return f"{device.device_kind}, jax {jax.__version__}"


def operations(size: int) -> Mapping[str, Operation]:
    """See `calibration.Device`."""
    x = jax.random.normal(jax.random.PRNGKey(size), (size, size))
    definite = x @ x.T / size + jnp.eye(size)

    def iteration(m: jax.Array, basis: jax.Array) -> jax.Array:
        new = jnp.linalg.qr(m @ basis)[0]
        return new * (m @ new)

    def inverse(m: jax.Array) -> jax.Array:
        root = jnp.linalg.cholesky(m)
        eye = jnp.eye(len(m))
        return jax.scipy.linalg.cho_solve((root, True), eye)

    return {
        "products": _finished(jnp.matmul, x, definite),
        "decompositions": _finished(jnp.linalg.eigh, definite),
        "iterations": _finished(iteration, definite, jnp.linalg.qr(x)[0]),
        "inverses": _finished(inverse, definite),
    }


def sum_of(entries: int) -> Operation:
    """See `calibration.Device`."""
    return _finished(functools.partial(jnp.sum, axis=1), jnp.ones(rows_of(entries)))


def _finished(operation: Callable[..., object], *arrays: jax.Array) -> Operation:
    return functools.partial(_run, jax.jit(operation), arrays)


def _run(compiled: Callable[..., object], arrays: tuple[jax.Array, ...]) -> None:
    jax.block_until_ready(compiled(*arrays))
