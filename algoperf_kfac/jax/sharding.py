"""Data parallelism: a one-dimensional mesh, the batch split over it, everything else on every device.

Sums over a split batch dimension are global sums, so the statistics need no collective of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from algoperf_kfac.jax.types import Tree

Pytree = TypeVar("Pytree")


def batch_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the one axis "batch", as AlgoPerf's harness makes it, over all devices or the given ones."""
    return Mesh(np.array(jax.devices() if devices is None else devices), ("batch",))


def replicated(function: Callable[..., Pytree], *operands: Tree) -> Pytree:
    """What a function makes of its operands, on every device.

    Under a mesh with explicit axes the compiler does not choose how sums over a split dimension are laid out;
    within the function it does, as it does everywhere else.
    """
    types = getattr(jax.sharding.get_abstract_mesh(), "axis_types", ())
    if jax.sharding.AxisType.Explicit not in types:
        return function(*operands)
    found: Pytree = jax.sharding.auto_axes(function, out_sharding=PartitionSpec())(*operands)
    return found


def shard_batch(batch: Tree, mesh: Mesh) -> Tree:
    """The batch with dimension 0 of every array split over the mesh.

    Raises:
        ValueError: naming the array whose dimension 0 the mesh does not divide.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(batch)
    for path, leaf in leaves:
        if np.ndim(leaf) == 0 or np.shape(leaf)[0] % mesh.size:
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)} of shape {np.shape(leaf)} cannot be split over {mesh.size} "
                "devices: dimension 0 must be a multiple of it"
            )
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec(mesh.axis_names[0])))


def replicate(tree: Tree, mesh: Mesh) -> Tree:
    """The tree on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
