"""G^T A = dL/dW in JAX: what `gradient_check` shows for PyTorch, from the residuals of the capture's own taps.

The submission's own training step is traced once more, with its `value_grad_and_statistics` and with a second tap
behind each of the capture's own: it makes G^T A of the very input and output gradient that the first makes its
sums of. As the sums do, the products leave the backward pass as the gradient of zeros, so that they add up over
calls and loop turns and scanned layers fall into their places. The gradient comes from the same backward pass.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from algoperf_kfac.jax import capture, kinds
from algoperf_kfac.jax.factors import Reading
from algoperf_kfac.jax.interpreter import Key
from algoperf_kfac.jax.kinds import Kind, Uses
from algoperf_kfac.jax.layer_book import Layers
from algoperf_kfac.jax.operations import Call, Lookup, Use
from algoperf_kfac.jax.statistics import Statistics, Tap
from algoperf_kfac.jax.tracing import named_leaves
from algoperf_kfac.layers import LayerSpec
from algoperf_kfac.positions import Layout
from benchmarks.official.replacing import replaced
from submissions.common.api import Batch, Rng, Tree
from submissions.common.kfac.jax import Run


class Products(NamedTuple):
    """A layer's sum_n sum_r g a^T with the bias as last column, (groups, P_out, P_in [+ 1]).

    Attributes:
        total: the sum.
        magnitude: sum_n sum_r |g| |a|^T, which bounds what float32 may have lost in the sum.
    """

    total: Array
    magnitude: Array


class Heard(NamedTuple):
    """What a layer collects, and next to it the products."""

    sums: Tree
    products: Products

    @property
    def counts(self) -> Array:
        return self.sums.counts


def errors(
    submission: ModuleType,
    run: Run,
    params: Tree,
    opt_state: Tree,
    model_state: Tree,
    batch: Batch,
    rng: Rng,
) -> tuple[dict[str, float], dict[str, float]]:
    """Each covered layer's error against its gradient, and its rounding bound; see `gradient_check`.

    Nothing is donated: the arrays remain the caller's. The products are summed in float32 as the gradient is, so
    that the rounding bound counts twice.

    Args:
        submission: the module `submissions.common.kfac.jax`.
        run: its `Run`, with its layers.
        opt_state: any; the gradient does not depend on it.
    """
    if run.config.fisher != "empirical":
        raise ValueError("G^T A is the gradient for the empirical Fisher only: others draw their own outputs")
    found: list[Tree] = []
    value_grad_and_statistics = submission.value_grad_and_statistics

    def listening_in(*args: Tree, **kwargs: Tree) -> Callable[..., Tree]:
        differentiate = value_grad_and_statistics(*args, **kwargs)

        def listened(*args: Tree, **kwargs: Tree) -> Tree:
            with listening() as products:
                value, gradient, gathered = differentiate(*args, **kwargs)
            found.append((gradient, dict(products)))
            return value, gradient, gathered

        return listened

    def step(params: Tree, opt_state: Tree, model_state: Tree, batch: Batch, rng: jax.Array) -> Tree:
        # What the optimizer makes of it is traced, too, and then dropped as nothing depends on it.
        with replaced(submission, "value_grad_and_statistics", listening_in):
            run._step(params, opt_state, model_state, batch, rng, jnp.float32(0), takes_statistics=True)
        (result,) = found
        return result

    gradient, products = jax.jit(step)(params, opt_state, model_state, batch, rng)
    assert run.layers is not None
    if set(products) != set(run.layers.covered):
        raise RuntimeError(f"products of {sorted(products)}, layers {sorted(run.layers.covered)}")
    return compare(run.layers, gradient, products)


@contextlib.contextmanager
def listening() -> Iterator[dict[str, Products]]:
    """Gives what the taps of the capture made in this context see, as soon as it is made; see `Products`."""
    products: dict[str, Products] = {}

    def heard(spec: LayerSpec) -> Listener:
        return Listener(kinds.kind_of(spec), products)

    with replaced(capture, "kind_of", heard):
        yield products


class Listener(Kind[Heard]):
    """A kind of layer that also collects products; everything else is the kind's own.

    Args:
        kind: the kind.
        products: gets what each layer collected.
    """

    def __init__(self, kind: Kind[Tree], products: dict[str, Products]) -> None:
        self._kind = kind
        self._products = products

    def counted(self, uses: Uses) -> dict[Key, Use]:
        return self._kind.counted(uses)

    def zeros(self, spec: LayerSpec, slices: int, examples: int, dtype: DTypeLike) -> Heard:
        zeros = jnp.zeros((spec.groups, spec.out_dim, spec.factor_in_dim), dtype)
        return Heard(self._kind.zeros(spec, slices, examples, dtype), Products(zeros, zeros))

    def tap(self, tap: Tap, out: Array, x: Array, reading: Reading, sums: Heard) -> Array:
        return hear(tap, self._kind.tap(tap, out, x, reading, sums.sums), x, sums.products)

    def finalise(self, spec: LayerSpec, sums: Heard, layout: Layout, scale: Array | float) -> Statistics:
        self._products[spec.name] = sums.products
        return self._kind.finalise(spec, sums.sums, layout, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def hear(static: Tap, out: Array, x: Array, products: Products) -> Array:
    """The output of one use, unchanged; its backward pass adds to the layer's products."""
    return out


def _forward(static: Tap, out: Array, x: Array, products: Products) -> tuple[Array, Array]:
    return out, x


def _backward(static: Tap, x: Array, gradient: Array) -> tuple[Array, None, Products]:
    make = _products_of_lookup if isinstance(static.use, Lookup) else _products
    return gradient, None, make(static, x, gradient)


hear.defvjp(_forward, _backward)


def _products(static: Tap, x: Array, gradient: Array) -> Products:
    """Of a weighted operation: all its positions, as those that do not count have no gradient."""
    call, spec = static.use, static.spec
    assert isinstance(call, Call)
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
    layers: Layers, gradient: Tree, products: Mapping[str, Products]
) -> tuple[dict[str, float], dict[str, float]]:
    """Each layer's error against its gradient and its rounding bound, relative to the products' Frobenius norm."""
    gradients = {name: jnp.asarray(leaf) for name, leaf in named_leaves(gradient).items()}
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
