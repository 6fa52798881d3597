"""G^T A = dL/dW: whether what the taps of a layer see is the whole of its weight's gradient.

Next to each tap stands a second one, which makes G^T A of the very input and output gradient that the first makes
its sums of. As the sums do, products leave the backward pass as the gradient of zeros, so that they add up over
calls and loop turns, and scanned layers fall into their places. The gradient comes from the same backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from algoperf_kfac.jax.factors import Reading
from algoperf_kfac.jax.interpreter import Key
from algoperf_kfac.jax.kinds import Kind, Sums, Uses
from algoperf_kfac.jax.layer_book import Layers
from algoperf_kfac.jax.operations import Use
from algoperf_kfac.jax.statistics import Product, Statistics, Tap
from algoperf_kfac.jax.tracing import named_leaves
from algoperf_kfac.jax.types import Tree
from algoperf_kfac.layers import MAX_ERROR, ROUNDING, LayerSpec


class Compared(NamedTuple):
    """A layer's G^T A beside its gradient; Frobenius norms.

    Attributes:
        difference: of both.
        gradient: of the gradient.
        product: of G^T A.
        magnitude: of |G|^T |A|.
        eps: the coarsest rounding unit of what G^T A was made of.
    """

    difference: float
    gradient: float
    product: float
    magnitude: float
    eps: float

    @property
    def share(self) -> float:
        """The difference relative to the gradient."""
        return self.difference / max(self.gradient, float(np.finfo(np.float32).tiny))

    @property
    def is_wrong(self) -> bool:
        """Whether it is more than rounding can be."""
        return self.difference > MAX_ERROR * self.gradient + ROUNDING * self.eps * self.magnitude


class Checks:
    """Collects the products of one capture.

    Args:
        kind_of: from a layer to its kind.

    Attributes:
        products: by layer, once its statistics are made.
        eps: by layer, see `Compared`.
    """

    def __init__(self, kind_of: Callable[[LayerSpec], Kind[Any]]) -> None:
        self._kind_of = kind_of
        self.products: dict[str, Product] = {}
        self.eps: dict[str, float] = {}

    def kind_of(self, spec: LayerSpec) -> Kind[Any]:
        """The layer's kind, which also collects products."""
        return _CheckedKind(self._kind_of(spec), self)

    def products_of(self, sums: Mapping[str, Sums]) -> dict[str, Product]:
        """Those among what the layers collected in a backward pass."""
        return {name: one.product for name, one in sums.items() if isinstance(one, Checked)}

    def compare(self, layers: Layers, gradient: Tree, penalised: Collection[str]) -> dict[str, Compared]:
        """See `compare`."""
        return compare(layers, gradient, self.products, self.eps, penalised)


class Checked(NamedTuple):
    """What a layer collects, and next to it the product."""

    sums: Any
    product: Product

    @property
    def counts(self) -> Array:
        """See `kinds.Sums`."""
        counts: Array = self.sums.counts
        return counts


class _CheckedKind(Kind[Checked]):
    """A kind of layer that also collects products; everything else is the kind's own.

    Args:
        kind: the kind.
        checks: is told.
    """

    def __init__(self, kind: Kind[Any], checks: Checks) -> None:
        self.by_row = kind.by_row
        self._kind = kind
        self._checks = checks

    def counted(self, uses: Uses) -> dict[Key, Use]:
        return self._kind.counted(uses)

    def zeros(self, spec: LayerSpec, slices: int, reading: Reading, dtype: DTypeLike) -> Checked:
        zeros = jnp.zeros((spec.groups, spec.out_dim, spec.factor_in_dim), dtype)
        return Checked(self._kind.zeros(spec, slices, reading, dtype), Product(zeros, zeros))

    def tap(self, tap: Tap, out: Array, x: Array, reading: Reading, sums: Checked) -> Array:
        dtypes = [t.dtype for t in (x, out) if jnp.issubdtype(t.dtype, jnp.floating)]
        eps = max(float(jnp.finfo(dtype).eps) for dtype in dtypes)
        self._checks.eps[tap.spec.name] = max(eps, self._checks.eps.get(tap.spec.name, 0.0))
        return _hear((tap, self._kind), self._kind.tap(tap, out, x, reading, sums.sums), x, sums.product)

    def product(self, tap: Tap, x: Array, gradient: Array) -> Product:
        return self._kind.product(tap, x, gradient)

    def finalise(self, spec: LayerSpec, sums: Checked, reading: Reading, scale: Array | float) -> Statistics:
        self._checks.products[spec.name] = sums.product
        return self._kind.finalise(spec, sums.sums, reading, scale)


Static: TypeAlias = tuple[Tap, Kind[Any]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _hear(static: Static, out: Array, x: Array, product: Product) -> Array:
    """The output of one use, unchanged; its backward pass adds to the layer's product."""
    return out


def _forward(static: Static, out: Array, x: Array, product: Product) -> tuple[Array, Array]:
    return out, x


def _backward(static: Static, x: Array, gradient: Array) -> tuple[Array, None, Product]:
    tap, kind = static
    return gradient, None, kind.product(tap, x, gradient)


_hear.defvjp(_forward, _backward)


def compare(
    layers: Layers,
    gradient: Tree,
    products: Mapping[str, Product],
    eps: Mapping[str, float] | None = None,
    penalised: Collection[str] = (),
    *,
    with_bias: bool = False,
) -> dict[str, Compared]:
    """Each layer's product beside its gradient, on the host.

    Args:
        layers: from `discover`.
        gradient: of the parameters.
        products: by layer.
        eps: by layer; that of the products' type by default.
        penalised: parameters whose gradient is more than the layer's own: theirs are not compared.
        with_bias: whether the bias, too, or the weight alone, whose share it may hide.
    """
    gradients = {name: jnp.asarray(leaf) for name, leaf in named_leaves(gradient).items()}
    found = {}
    for name, product in products.items():
        spec, layer = layers.covered[name].spec, layers.covered[name]
        if spec.weight in penalised:
            continue
        bias = None if spec.bias is None else gradients[spec.bias]
        columns = spec.factor_in_dim if with_bias else spec.in_dim
        wanted, total, magnitude = (
            np.asarray(m, np.float64)[..., :columns] for m in (layer.matrix(gradients[spec.weight], bias), *product)
        )
        found[name] = Compared(
            difference=float(np.linalg.norm(total - wanted)),
            gradient=float(np.linalg.norm(wanted)),
            product=float(np.linalg.norm(total)),
            magnitude=float(np.linalg.norm(magnitude)),
            eps=max(float(np.finfo(product.total.dtype).eps), (eps or {}).get(name, 0.0)),
        )
    return found


def in_short(compared: Mapping[str, Compared]) -> tuple[dict[str, float], list[str]]:
    """By layer, the relative error; and the layers where it is more than rounding."""
    return {name: one.share for name, one in compared.items()}, [n for n, one in compared.items() if one.is_wrong]


def is_known(values: Tree) -> bool:
    """Whether all leaves have values: outside of any transformation."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))
