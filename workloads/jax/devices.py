"""All devices in a row: batches are sharded over them on the first axis, parameters are on each of them."""

from __future__ import annotations

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def count() -> int:
    """The number of devices that share a batch."""
    return len(jax.devices())


def sharded() -> NamedSharding:
    """Where a batch lies."""
    return NamedSharding(_mesh(), PartitionSpec("batch"))


def replicated() -> NamedSharding:
    """Where parameters lie."""
    return NamedSharding(_mesh(), PartitionSpec())


def _mesh() -> Mesh:
    return Mesh(jax.devices(), ("batch",))
