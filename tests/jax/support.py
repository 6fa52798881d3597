"""Factors through the library's public interface, in one call, and the exact Gauss-Newton matrix beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import settings
from jax import Array

from algoperf_kfac.jax import KFAC, FactorPair
from algoperf_kfac.jax.transform import find_state, move_averages

# Summed losses as functions of the outputs alone: none of their Hessians depends on the labels.
LOSSES: dict[str, Callable[[Array], Array]] = {
    "mean_squared_error": lambda f: jnp.square(f).sum(),
    "softmax_cross_entropy": lambda f: -jax.nn.log_softmax(f)[..., 0].sum(),
    "sigmoid_cross_entropy": lambda f: jax.nn.softplus(f).sum(),
    "mean_absolute_error": lambda f: 0.5 * jnp.square(f).sum(),
}


def examples(count: int) -> settings:
    """Property tests that are the same on every run and bounded in time."""
    return settings(max_examples=count, derandomize=True, deadline=None, database=None)


def normal(seed: int, *shape: int) -> Array:
    """Standard normal numbers, in the default precision; the same for equal arguments."""
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape))


def initialise(module: Any, *args: Any, seed: int = 0, scale: float = 1.0) -> Any:
    """A flax module's parameters, all of them random (biases too) and in the default precision."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *args))["params"]
    leaves, tree = jax.tree.flatten(shapes)
    values = [
        scale * normal(seed + i, *leaf.shape) / max(np.prod(leaf.shape[:-1]), 1) ** 0.5
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, values)


def applier(module: Any) -> Callable[..., Any]:
    """The module as a function of parameters."""
    return lambda params, *args: module.apply({"params": params}, *args)


def observe(optimizer: KFAC, params: Any, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, FactorPair]]:
    """The gradient and the factors of one batch, compiled as one; without the refresh of a whole step.

    Args:
        optimizer: with the arguments of `args`.
        params: parameters.
        args: the batch.
        kwargs: for `value_grad_and_statistics`.
    """

    def step(params: Any, args: Sequence[Any], kwargs: Any) -> Any:
        _, gradient, statistics = optimizer.value_grad_and_statistics(params, *args, **kwargs)
        state = find_state(optimizer.init(params))
        stacks = move_averages(state.stacks, statistics, optimizer.layers, optimizer.config)
        return gradient, optimizer.factors(state._replace(stacks=stacks))

    return jax.jit(step)(params, args, kwargs)


def factors(
    apply_fn: Callable[..., Any],
    loss_fn: Callable[..., Any],
    params: Any,
    *args: Any,
    positions: Any = None,
    loss_normalizer: float | None = 1.0,
    rng: Array | None = None,
    **options: Any,
) -> dict[str, FactorPair]:
    """A and B of one batch, by default of the summed loss `loss_fn`; the gradient is checked along the way.

    Args:
        apply_fn, loss_fn, params, args, options: as `KFAC` takes them.
        positions, loss_normalizer, rng: as `value_grad_and_statistics` takes them.
    """
    optimizer = KFAC(apply_fn, loss_fn, params, *args, **options)
    gradient, pairs = observe(
        optimizer, params, *args, positions=positions, loss_normalizer=loss_normalizer, rng=rng
    )
    expected = jax.jit(jax.grad(lambda p: loss_fn(apply_fn(p, *args), *args)))(params)
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-9, atol=1e-12), gradient, expected)
    return pairs


def fisher_factors(
    apply_fn: Callable[..., Any],
    params: Any,
    x: Any,
    loss_type: str,
    approximation: str,
    *,
    fisher: str = "exact",
    **options: Any,
) -> dict[str, FactorPair]:
    """A and B of one batch under the exact (or Monte Carlo) Fisher."""
    return factors(
        apply_fn,
        lambda f, x: LOSSES[loss_type](f),
        params,
        x,
        approximation=approximation,
        fisher=fisher,
        loss_type=loss_type,
        **options,
    )


def matrix(layer: dict[str, Any], lead: int = 0, groups: int = 1, linear: bool = False) -> Array:
    """A flax layer's parameters as (*lead, groups, P_out, P_in [+ 1]), the bias as last column.

    Args:
        layer: "kernel" (spatial..., C_in / groups, C_out) or (P_in, P_out), and possibly "bias".
        lead: number of leading dimensions, of a Jacobian.
        groups: channel groups.
        linear: whether the kernel belongs to a Dense layer.
    """
    kernel = layer["kernel"]
    leading = kernel.shape[:lead]
    kernel = jnp.moveaxis(kernel, (-1, -2), (lead, lead + 1))  # C_out, C_in / groups, spatial
    c_out = kernel.shape[lead]
    rows = kernel.reshape(*leading, groups, c_out // groups, -1)
    if "bias" not in layer:
        return rows
    return jnp.concatenate([rows, layer["bias"].reshape(*leading, groups, c_out // groups, 1)], -1)


def ggn_blocks(
    apply_fn: Callable[..., Any], params: dict[str, Any], x: Any, loss: str, layers: Sequence[str]
) -> dict[str, np.ndarray]:
    """(1, P, P): top-level layers' blocks of the GGN of the summed loss, J^T H J; no code of the library.

    Parameters are ordered as the rows of a matrix (P_out x P_in), the bias as its last column, so that the K-FAC
    approximation is kron(B, A).
    """

    @jax.jit
    def blocks(of_layers: Any) -> dict[str, Array]:
        f = apply_fn(params, x)
        h = jax.hessian(lambda flat: LOSSES[loss](flat.reshape(f.shape)))(f.reshape(-1))
        found = {}
        jacobians = jax.jacrev(lambda own: apply_fn(params | own, x).reshape(-1))(of_layers)
        for name, jacobian in jacobians.items():
            j = matrix(jacobian, 1).reshape(f.size, 1, -1)
            found[name] = jnp.einsum("mgp,mn,ngq->gpq", j, h, j)
        return found

    return jax.device_get(blocks({name: params[name] for name in layers}))


def batched(pair: FactorPair) -> tuple[np.ndarray, np.ndarray]:
    """A and B with a leading group dimension."""
    a, b = (np.asarray(m) for m in pair)
    return a if a.ndim == 3 else a[None], b if b.ndim == 3 else b[None]


def kfac_blocks(pair: FactorPair) -> np.ndarray:
    """(groups, P, P): the Kronecker products of a layer's factors."""
    return np.stack([np.kron(b, a) for a, b in zip(*batched(pair), strict=True)])


def relative_error(approximate: np.ndarray, exact: np.ndarray) -> float:
    """Frobenius norm of the difference over that of the exact matrix."""
    return float(np.linalg.norm(approximate - exact) / max(np.linalg.norm(exact), 1e-300))


def assert_equal(pair: FactorPair, expected: Any, rtol: float = 1e-10) -> None:
    """Equal factors, up to rounding."""
    for got, want in zip(batched(pair), batched(FactorPair(*expected)), strict=True):
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=0, atol=rtol * max(float(np.abs(want).max()), 1e-300))
