"""A small classifier for tests of the optimizer's machinery, with both kinds of step."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from algoperf_kfac.jax import KFAC
from tests.jax.support import normal

SIZES = (4, 4, 4, 3)
OPTIONS = {"factor_interval": 2, "refresh_interval": 4, "initial_statistics": 2, "damping": 1e-2}


def mlp_params(sizes: tuple[int, ...] = SIZES) -> dict[str, Any]:
    shapes = itertools.pairwise(sizes)
    return {f"l{i}": {"w": normal(i, a, b) / a**0.5, "b": normal(50 + i, b)} for i, (a, b) in enumerate(shapes)}


def mlp(params: Any, x: Array, *_: Any) -> Array:
    for i in range(len(params)):
        x = (jnp.tanh(x) if i else x) @ params[f"l{i}"]["w"] + params[f"l{i}"]["b"]
    return x


def cross_entropy(f: Array, x: Array, y: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(f, y).mean()


def batch(n: int = 24) -> tuple[Array, Array]:
    return normal(9, n, 4), jnp.arange(n) % 3


def optimizer(**options: Any) -> KFAC:
    return KFAC(mlp, cross_entropy, mlp_params(), *batch(), **OPTIONS | options)


Step = Callable[[Any, Any, Array, Array], tuple[Any, Any]]


def steps(
    kfac: KFAC,
    transformation: Any = None,
    apply: Callable[..., Any] = mlp,
    loss: Callable[..., Any] = cross_entropy,
) -> tuple[Step, Step, list[int]]:
    """A plain step, a step with statistics (neither compiled), and how often each was traced."""
    update = (transformation or kfac.transformation).update
    traces = [0, 0]

    def plain(params: Any, state: Any, x: Array, y: Array) -> tuple[Any, Any]:
        traces[0] += 1
        gradient = jax.grad(lambda p: loss(apply(p, x, y), x, y))(params)
        updates, state = update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    def with_statistics(params: Any, state: Any, x: Array, y: Array) -> tuple[Any, Any]:
        traces[1] += 1
        _, gradient, statistics = kfac.value_grad_and_statistics(params, x, y)
        updates, state = update(gradient, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state

    return plain, with_statistics, traces


def train(kfac: KFAC, plain: Step, with_statistics: Step, params: Any, state: Any, start: int, stop: int) -> Any:
    x, y = batch()
    for step in range(start, stop):
        params, state = (with_statistics if kfac.is_statistics_step(step) else plain)(params, state, x, y)
    return params, state
