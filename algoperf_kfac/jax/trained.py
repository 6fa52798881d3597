"""Parameters as JAX trains them: NumPy's in the precision that JAX has, whole numbers not at all, whatever their
gradients are said to be."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from algoperf_kfac.jax.types import Tree


def dtype_of(leaf: Array | np.ndarray | jax.ShapeDtypeStruct) -> jnp.dtype:
    """The type that a leaf has within a program: NumPy's float64 is float32 there without `jax_enable_x64`."""
    return jnp.dtype(jax.dtypes.canonicalize_dtype(leaf.dtype))


def zeros_like(leaf: Array | np.ndarray) -> Array:
    """Zeros in the shape of a leaf, (...), where it lies; in the type that it has within a program."""
    # JAX would warn of each NumPy array whose type it cannot keep.
    return jnp.zeros_like(leaf, dtype_of(leaf)) if isinstance(leaf, np.ndarray) else jnp.zeros_like(leaf)


def are_trained(params: Tree) -> Tree:
    """Which parameters are trained: a mask for optax."""
    return jax.tree.map(lambda leaf: jnp.issubdtype(leaf.dtype, jnp.inexact), params)


def trained(tree: Tree, params: Tree) -> list[Array]:
    """The leaves of a tree that belong to parameters that are trained.

    Args:
        tree: of the structure of the parameters; gradients of whole numbers may be of any type, float0 included.
        params: the parameters, or moments of theirs.
    """
    kept: Tree = jax.tree.map(lambda flag, leaf: leaf if flag else None, are_trained(params), tree)
    leaves: list[Array] = jax.tree.leaves(kept)
    return leaves


def put_back(leaves: Sequence[Array], params: Tree) -> Tree:
    """The inverse of `trained`: a tree with zeros for the parameters that are not trained."""
    given, tree = iter(leaves), jax.tree.structure(params)
    own = jax.tree.leaves(params)
    flags = jax.tree.leaves(are_trained(params))
    return jax.tree.unflatten(
        tree, [next(given) if flag else zeros_like(leaf) for leaf, flag in zip(own, flags, strict=True)]
    )
