"""Data parallelism: a one-dimensional mesh, the batch split over it, everything else on every device.

Sums over a split batch dimension are global sums, so the statistics need no collective of their own. Work on layers
is split, too: decompositions (`decompositions.py`), and directions by `by_layers`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from algoperf_kfac.assignment import runs
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


def by_layers(function: Callable[..., Pytree], mesh: Mesh | None, *operands: Tree) -> Pytree:
    """What a function makes of layers, each device of a mesh computing some of them; all get all.

    Every device takes equally many. Of fewer layers than devices most of what is gathered would be repetitions:
    each device then computes all, as without a mesh.

    Args:
        function: of trees of arrays with the layer as leading dimension, to such a tree; layer by layer.
        mesh: a one-dimensional mesh, on each of whose devices the operands are; None for one device.
        *operands: of the function.
    """
    count = jax.tree.leaves(operands)[0].shape[0]
    if mesh is None or mesh.size == 1 or count < mesh.size:
        return function(*operands)
    parts, axis = runs(count, mesh.size), mesh.axis_names

    def part(*operands: Tree) -> Pytree:
        start = jnp.array([numbers.start for numbers in parts])[lax.axis_index(axis)]
        mine = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, len(parts[0])), operands)
        return jax.tree.map(lambda leaf: lax.all_gather(leaf, axis, tiled=True), function(*mine))

    everywhere = PartitionSpec()
    mapped = jax.shard_map(part, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)
    gathered: Pytree = mapped(*operands)
    order = [number for numbers in parts for number in numbers]
    if len(order) == count:
        return gathered
    rows = np.array([order.index(number) for number in range(count)])
    return jax.tree.map(lambda leaf: leaf[rows], gathered)


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
