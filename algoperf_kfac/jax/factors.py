"""From captured inputs and output gradients to the Kronecker factors A and B (arXiv 2311.00636, sections 3.2, 3.3).

Everything here works on the weight-sharing format [N, R, groups, P]: N examples, R positions that share the
weight, channel groups (1 except for grouped convolutions and scanned layers), P features. Two approximations turn
it into factors:

    expand:  A = 1/(N R)  sum_n sum_r a a^T                B = sum_n sum_r g g^T
    reduce:  A = 1/N  sum_n (mean_r a)(mean_r a)^T         B = sum_n (sum_r g)(sum_r g)^T

with the per-example gradient g. Functions return the sums, and the caller divides. A bias is the homogeneous
coordinate 1 of a. Masked positions count in neither sum nor R.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from algoperf_kfac.jax.reductions import any_nonzero, by_block
from algoperf_kfac.jax.types import Sizes
from algoperf_kfac.positions import BY_GRADIENT, Layout, Positions, Rows
from algoperf_kfac.subset import Subset

Static: TypeAlias = tuple[bool, int | None, int | None, str]
Child: TypeAlias = object  # an array, None, or what JAX puts in its place


def _flatten(positions: Positions) -> tuple[tuple[Child, Child], Static]:
    static = (positions.by_gradient, positions.num_segments, positions.batch_dim, positions.readout)
    return (positions.array_mask, positions.segment_ids), static


def _unflatten(static: Static, children: tuple[Child, Child]) -> Positions:
    # Not through __init__: jax also unflattens with stand-ins that are no arrays.
    positions = object.__new__(Positions)
    by_gradient, num_segments, batch_dim, readout = static
    values = (BY_GRADIENT if by_gradient else children[0], children[1], num_segments, batch_dim, readout)
    for field, value in zip(dataclasses.fields(Positions), values, strict=True):
        object.__setattr__(positions, field.name, value)
    return positions


jax.tree_util.register_pytree_node(Positions, _flatten, _unflatten)


@dataclasses.dataclass(frozen=True)
class Reading:
    """How the rows of one call are read: a `Layout`, and the arrays that go with it. A pytree of these.

    Attributes:
        layout: what is known from shapes.
        mask: (N, R) zeros and ones in the dtype of the factors; None where all positions count.
        segment_ids: (N,), the example of each row; None where rows are examples.
        sizes: numbers of examples that calls of the layer see; those with equal numbers see the same ones.
        number: which of these is this call's.
        joined: how many leading dimensions are rows together, as segment ids of several dimensions have it.
        limit: the rows that statistics are formed of at least, from `limit_for`; None for all.
    """

    layout: Layout
    mask: Array | None = None
    segment_ids: Array | None = None
    sizes: Sizes = ()
    number: int = 0
    joined: int = 1
    limit: int | None = None

    @property
    def place(self) -> int:
        """Which of the layer's examples the first of this call is."""
        return sum(self.sizes[: self.number])

    @property
    def total(self) -> int:
        """How many examples all calls of the layer see."""
        return sum(self.sizes)

    def among(self, sizes: Sizes, limit: int | None) -> Reading:
        """The same as one of several calls, which see these numbers of examples."""
        return dataclasses.replace(self, sizes=sizes, number=sizes.index(self.layout.num_examples), limit=limit)

    def subset(self, *, reduces: bool, thins: bool = True) -> Subset:
        """The rows that a factor is formed of.

        Args:
            reduces: whether the factor has one row per example, and not one per position.
            thins: whether some positions of an example may be taken.
        """
        each = 1 if reduces else self.layout.positions
        return Subset.of(self.limit, self.layout.num_examples, each, thins=thins)

    def part(self, chosen: Subset) -> Reading:
        """How the chosen rows of this call are read, the examples' numbers those among all that reduce chooses."""
        if self.limit is None:
            return self
        positions = self.layout.positions if chosen.thinning == 1 else chosen.rows
        layout = dataclasses.replace(self.layout, num_examples=chosen.size, positions=positions)
        mask = None if self.mask is None else self.mask[chosen.slice, chosen.of_rows]
        sizes = tuple(Subset.of(self.limit, size, 1).size for size in self.sizes)
        return dataclasses.replace(self, layout=layout, mask=mask, sizes=sizes)

    def chosen(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The numbers of the examples that reduce chooses, over all calls, and their weights; None for all."""
        subsets = [Subset.of(self.limit, size, 1) for size in self.sizes]
        if all(subset.every == 1 for subset in subsets):
            return None
        sets = np.split(np.arange(self.total), np.cumsum(self.sizes)[:-1])
        numbers = np.concatenate([own[s.slice] for own, s in zip(sets, subsets, strict=True)])
        return numbers, np.repeat([s.weight for s in subsets], [s.size for s in subsets])

    def placed(self, t: Array) -> Array:
        """(examples of this call, ...) -> (examples of all calls, ...), zero for those of others."""
        before, after = self.place, self.total - self.place - self.layout.num_examples
        return t if not before and not after else jnp.pad(t, [(before, after), *[(0, 0)] * (t.ndim - 1)])

    @classmethod
    def of(cls, positions: Positions | None, rows: Rows, name: str, dtype: DTypeLike) -> Reading:
        """Fit a description to one call of the layer `name`.

        Raises:
            ValueError: naming the layer, if a mask or the segment ids do not fit.
        """
        layout = Layout.of(positions, rows, name)
        if positions is None:
            return cls(layout)
        mask = positions.array_mask
        if mask is not None:
            mask, sizes = jnp.asarray(mask), rows.sizes(positions)
            if 1 < mask.ndim > positions.examples_dim:
                mask = jnp.moveaxis(mask, positions.examples_dim, 0)
            mask = mask.reshape(*mask.shape, *[1] * (len(sizes) - mask.ndim))
            # Weights of examples are no multiplicities of rows: whatever is not zero counts as one.
            mask = jnp.broadcast_to(mask, sizes).reshape(sizes[0], layout.positions).astype(bool).astype(dtype)
        ids = positions.segment_ids
        return cls(layout, mask, None if ids is None else jnp.asarray(ids))

    @classmethod
    def of_segments(cls, positions: Positions, rows: Rows, name: str, dtype: DTypeLike) -> Reading | None:
        """The same where segment ids have several of the call's leading dimensions, as (T, N); else None."""
        ids, mask = positions.segment_ids, positions.array_mask
        if ids is None or ids.ndim < 2 or rows.batch_first or rows.leading[: ids.ndim] != tuple(ids.shape):
            return None
        joined = ids.ndim
        if mask is not None:
            missing = tuple(ids.shape)[mask.ndim :]
            mask = jnp.asarray(mask).reshape(*mask.shape, *[1] * len(missing))
            mask = jnp.broadcast_to(mask, (*mask.shape[: joined - len(missing)], *missing, *mask.shape[joined:]))
            mask = mask.reshape(-1, *mask.shape[joined:])
        flat = dataclasses.replace(
            positions,
            mask=BY_GRADIENT if positions.by_gradient else mask,
            segment_ids=jnp.asarray(ids).reshape(-1),
            batch_dim=0,
        )
        rows = Rows((math.prod(ids.shape), *rows.leading[joined:]))
        return dataclasses.replace(cls.of(flat, rows, name, dtype), joined=joined)

    def rows(self, t: Array) -> Array:
        """(leading..., groups, P) -> (N, R, groups, P)."""
        t = t.reshape(-1, *t.shape[self.joined :]) if self.joined > 1 else t
        leading = t.ndim - 2
        t = self.batch_first(t, leading)
        return t.reshape(t.shape[0] if leading else 1, -1, *t.shape[-2:])

    def batch_first(self, t: Array, leading: int) -> Array:
        """The dimension over examples moved to the front of the first `leading` ones."""
        dim = self.layout.batch_dim
        return jnp.moveaxis(t, dim, 0) if dim and leading > 1 else t

    def of_gradients(self, rows: Array) -> Reading:
        """The same, the output gradients (N, R, groups, P) deciding which positions count where they do."""
        if not self.layout.by_gradient:
            return self
        return dataclasses.replace(self, mask=any_nonzero(rows, 2).astype(rows.dtype))

    def where(self, counts: Array) -> Reading:
        """The same, of the positions (N, R) only those that `counts` says."""
        mask = counts if self.mask is None else self.mask * counts
        return dataclasses.replace(self, mask=mask)

    def for_gradients(self) -> Reading:
        """The same for output gradients: where they are the mask themselves, it would take nothing from them."""
        return dataclasses.replace(self, mask=None) if self.layout.by_gradient else self

    def sum_positions(self, t: Array) -> Array:
        """(N, R, groups, P) -> (examples, groups, P): sums over the positions of each example."""
        # No product of matrices: that would hold a copy of the rows, in another order.
        return self.sum_rows(self.masked(t).sum(1))

    def sum_rows(self, t: Array) -> Array:
        """(N, ...) -> (examples, ...): sums over the rows of each segment, where there are segments."""
        if self.segment_ids is None:
            return t
        return jax.ops.segment_sum(t, self.segment_ids, num_segments=self.layout.num_examples)

    def counts(self, rows: Array) -> Array:
        """(examples,): the number R_n of positions that count, of rows (N, R, groups, P)."""
        if self.mask is None:
            return self.sum_rows(jnp.full((rows.shape[0],), float(self.layout.positions), rows.dtype))
        return self.sum_rows(self.mask.sum(1))

    def expanded(self, rows: Array) -> Array:
        """(N, R, groups, P) -> (N R, groups, P), positions that do not count zeroed."""
        return self.masked(rows).reshape(-1, *rows.shape[2:])

    def masked(self, rows: Array) -> Array:
        """(N, R, groups, P), positions that do not count zeroed."""
        return rows if self.mask is None else rows * self.mask[:, :, None, None]

    def ones(self, rows: Array) -> Array:
        """(N R,): the homogeneous coordinate of rows (N, R, groups, P)."""
        return (jnp.ones(rows.shape[:2], rows.dtype) if self.mask is None else self.mask).reshape(-1)


jax.tree_util.register_dataclass(
    Reading, data_fields=["mask", "segment_ids"], meta_fields=["layout", "sizes", "number", "joined", "limit"]
)


def outer_sums(rows: Array, ones: Array | None, blocks: Sequence[int]) -> tuple[Array, ...]:
    """Sums of outer products, block by block of the feature dimension.

    Args:
        rows: (M, groups, P).
        ones: (M,) homogeneous coordinate of the bias, appended as the last feature; None without bias.
        blocks: sizes of the diagonal blocks; their sum is P, plus one with a bias.

    Returns:
        One (groups, b, b) matrix per block.
    """
    if ones is not None:
        column = jnp.broadcast_to(ones[:, None, None], (*rows.shape[:2], 1))
        rows = jnp.concatenate([rows, column], 2)
    if rows.shape[1] == 1:  # with a dimension over groups, products take copies of the rows in another order
        return tuple(by_block(lambda part: (part.T @ part)[None], rows[:, 0], blocks))
    return tuple(by_block(lambda part: jnp.einsum("mgi,mgj->gij", part, part), rows, blocks))


def grouped_outer_sums(rows: Array, blocks: Sequence[int]) -> tuple[Array, ...]:
    """The same of rows (groups, M, P)."""
    return tuple(by_block(lambda part: jnp.einsum("gmi,gmj->gij", part, part), rows, blocks))
