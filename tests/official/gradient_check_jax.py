"""G^T A = dL/dW in JAX: what `gradient_check` shows for PyTorch, from the residuals of the capture's own taps.

The submission's own training step is traced once more, with its `value_grad_and_statistics` and with taps whose
probes carry two matrices more: G^T A of the very input and output gradient a tap makes its sums of. As the sums do,
they leave the backward pass as the gradient of a probe, so that they add up over calls and loop turns and stacked
layers fall into their places. The gradient comes from the same backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from algoperf_kfac.jax import capture, discovery, statistics, tied
from algoperf_kfac.jax.discovery import CoveredLayer, Layers
from algoperf_kfac.jax.statistics import Tap

TAPS = (statistics.tap, tied.tap_output, tied.tap_lookup)


class Products(NamedTuple):
    """A layer's sum_n sum_r g a^T with the bias as last column, (groups, P_out, P_in [+ 1]).

    Attributes:
      total: the sum.
      magnitude: sum_n sum_r |g| |a|^T, which bounds what float32 may have lost in the sum.
    """

    total: Array
    magnitude: Array


class Probe(NamedTuple):
    """A layer's probe, and next to it one for the products."""

    sums: Any
    products: Products


def errors(
    submission: Any,
    training: Any,
    params: Any,
    opt_state: Any,
    model_state: Any,
    batch: Mapping[str, Any],
    rng: Any,
) -> tuple[dict[str, float], dict[str, float]]:
    """Each covered layer's error against its gradient, and its rounding bound; see `gradient_check`.

    Nothing is donated: the arrays remain the caller's. The products are summed in float32 as the gradient is, so
    that the rounding bound counts twice.

    Args:
      submission: the module `submissions.common.kfac.jax`.
      training: its `Run`, with its layers.
      opt_state: any; the gradient does not depend on it.
    """
    if training.config.fisher != "empirical":
        raise ValueError("G^T A is the gradient for the empirical Fisher only: others draw their own outputs")
    found: list[Any] = []
    value_grad_and_statistics = submission.value_grad_and_statistics

    def listening_in(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        run = value_grad_and_statistics(*args, **kwargs)

        def listened(*args: Any, **kwargs: Any) -> Any:
            with listening() as products:
                value, gradient, gathered = run(*args, **kwargs)
            found.append((gradient, dict(products)))
            return value, gradient, gathered

        return listened

    def step(*arguments: Any) -> Any:
        # What the optimizer makes of it is traced, too, and then dropped as nothing depends on it.
        with mock.patch.object(submission, "value_grad_and_statistics", listening_in):
            training._step(*arguments, np.float32(0), takes_statistics=True)
        (result,) = found
        return result

    gradient, products = jax.jit(step)(params, opt_state, model_state, batch, rng)
    if set(products) != set(training.layers.covered):
        raise RuntimeError(f"products of {sorted(products)}, layers {sorted(training.layers.covered)}")
    return compare(training.layers, gradient, products)


@contextlib.contextmanager
def listening() -> Iterator[dict[str, Products]]:
    """Gives what the taps of the capture made in this context see, as soon as it is made; see `Products`."""
    products: dict[str, Products] = {}
    make_probe, finalise = capture._probe, capture._finalise

    def probe(layer: CoveredLayer, examples: int, dtype: Any) -> Probe:
        spec = layer.spec
        zeros = jnp.zeros((spec.groups, spec.out_dim, spec.factor_in_dim), dtype)
        return Probe(make_probe(layer, examples, dtype), Products(zeros, zeros))

    def finalise_sums(layers: Layers, resolved: Any, sums: Mapping[str, Probe], normalizer: Any) -> Any:
        products.update({name: probe.products for name, probe in sums.items()})
        return finalise(layers, resolved, {name: probe.sums for name, probe in sums.items()}, normalizer)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(capture, "_probe", probe))
        stack.enter_context(mock.patch.object(capture, "_finalise", finalise_sums))
        for tap in TAPS:
            forward, backward = _listening_tap(tap.fwd, tap.bwd, lookup=tap is tied.tap_lookup)
            stack.enter_context(mock.patch.object(tap, "fwd", forward))
            stack.enter_context(mock.patch.object(tap, "bwd", backward))
        yield products


def _listening_tap(
    forward: Callable[..., Any], backward: Callable[..., Any], lookup: bool
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The two halves of a tap, whose probe is a `Probe`."""

    def listening_forward(
        static: Tap, out: Array, x: Array, mask: Any, ids: Any, probe: Probe
    ) -> tuple[Array, Any]:
        return forward(static, out, x, mask, ids, probe.sums)

    def listening_backward(static: Tap, residuals: Any, gradient: Array) -> tuple[Any, ...]:
        *others, sums = backward(static, residuals, gradient)
        products = (_products_of_lookup if lookup else _products)(static, residuals[0], gradient)
        return (*others, Probe(sums, products))

    return listening_forward, listening_backward


def _products(static: Tap, x: Array, gradient: Array) -> Products:
    """Of a weighted operation: all its positions, as those that do not count have no gradient."""
    call, spec = static.call, static.spec
    assert call is not None
    g = call.outputs(gradient.astype(static.dtype)).reshape(-1, call.groups, spec.out_dim)
    x = call.inputs(x.astype(static.dtype))
    if call.conv is not None:
        x = call.conv.patches(x)
    a = x.reshape(-1, call.groups, spec.in_dim)
    if spec.bias is not None:
        a = jnp.concatenate([a, jnp.ones((*a.shape[:2], 1), a.dtype)], 2)

    def product(g: Array, a: Array) -> Array:
        return jnp.einsum("rgi,rgj->gij", g, a, precision=jax.lax.Precision.HIGHEST)

    return Products(product(g, a), product(jnp.abs(g), jnp.abs(a)))


def _products_of_lookup(static: Tap, tokens: Array, gradient: Array) -> Products:
    """Of a lookup, whose inputs are one-hot rows."""
    spec = static.spec
    rows = gradient.astype(static.dtype).reshape(-1, spec.in_dim)
    zeros = jnp.zeros((1, spec.out_dim, spec.in_dim), static.dtype)
    return Products(
        zeros.at[0, tokens.reshape(-1)].add(rows),
        zeros.at[0, tokens.reshape(-1)].add(jnp.abs(rows)),
    )


def compare(
    layers: Layers, gradient: Any, products: Mapping[str, Products]
) -> tuple[dict[str, float], dict[str, float]]:
    """Each layer's error against its gradient and its rounding bound, relative to the products' Frobenius norm."""
    gradients = discovery.named_leaves(gradient)
    errors, bounds = {}, {}
    for name, layer in layers.covered.items():
        spec = layer.spec
        bias = None if spec.bias is None else gradients[spec.bias]
        exact = np.asarray(layer.view.to_matrix(gradients[spec.weight], bias), np.float64)
        total, magnitude = (np.asarray(t, np.float64) for t in products[name])
        norm = max(float(np.linalg.norm(total)), 1e-30)
        errors[name] = float(np.linalg.norm(total - exact)) / norm
        bounds[name] = 2 * float(np.finfo(np.float32).eps * np.linalg.norm(magnitude)) / norm
    return errors, bounds
