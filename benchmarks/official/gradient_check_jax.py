"""G^T A = dL/dW in JAX: what `gradient_check` shows for PyTorch, from taps beside the capture's own.

The submission's own training step is traced once more, with its `value_grad_and_statistics` and with the second
taps of `algoperf_kfac.jax.checks`. The gradient comes from the same backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from algoperf_kfac.jax import capture, checks, kinds, tapped_model
from algoperf_kfac.jax.layer_book import Layers
from algoperf_kfac.jax.statistics import Product
from benchmarks.official.replacing import replaced
from submissions.common.api import Batch, Rng, Tree
from submissions.common.kfac.jax import Run


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
def listening() -> Iterator[dict[str, Product]]:
    """Gives what the taps of the capture made in this context see, as soon as it is made; see `Product`."""
    seen = checks.Checks(kinds.kind_of)
    with replaced(capture, "kind_of", seen.kind_of), replaced(tapped_model, "kind_of", seen.kind_of):
        yield seen.products


def compare(
    layers: Layers, gradient: Tree, products: Mapping[str, Product]
) -> tuple[dict[str, float], dict[str, float]]:
    """Each layer's error against its gradient and its rounding bound, relative to the products' Frobenius norm."""
    compared = checks.compare(layers, gradient, products, with_bias=True)
    norms = {name: max(one.product, 1e-30) for name, one in compared.items()}
    eps = float(np.finfo(np.float32).eps)
    return (
        {name: one.difference / norms[name] for name, one in compared.items()},
        {name: 2 * eps * one.magnitude / norms[name] for name, one in compared.items()},
    )
