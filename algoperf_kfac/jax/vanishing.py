"""Where output gradients sum to zero over positions: found on the statistics; see `algoperf_kfac.vanishing`."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from algoperf_kfac.jax.reductions import by_block, squares, traces


def block_squares(rows: Array, blocks: Sequence[int]) -> Array:
    """(N, R, groups, P) -> (N, groups, blocks): squared norms of each block of features, over positions."""
    return jnp.stack(by_block(lambda part: squares(part).sum(1), rows, blocks), -1)


def without_vanishing(b: Sequence[Array], squared: Array, rounding: Array) -> tuple[tuple[Array, ...], Array]:
    """B with a multiple of the identity in place of the blocks that are rounding.

    Args:
        b: blocks (groups, size, size), of gradients summed over positions.
        squared: (groups, blocks), the squared gradients themselves, summed.
        rounding: (groups, blocks), what of it rounding alone may leave of the trace of B.

    Returns:
        The blocks, and for each group the share of output features of those that were replaced, (groups,).
    """
    found, replaced = [], []
    for i, block in enumerate(b):
        size, total = block.shape[-1], squared[:, i]
        vanishes = (traces(block) <= rounding[:, i]) & (total > 0)
        identity = jnp.eye(size, dtype=block.dtype) * (total / size)[:, None, None]
        found.append(jnp.where(vanishes[:, None, None], identity, block))
        replaced.append(size * vanishes.astype(block.dtype))
    return tuple(found), jnp.stack(replaced).sum(0) / sum(block.shape[-1] for block in b)
