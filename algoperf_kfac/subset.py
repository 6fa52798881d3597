"""Which examples of a batch statistics are formed from: every n-th, so that a configured number of rows is left.

Outer products take time in proportion to rows, and a factor of dimension P hardly changes beyond some multiple of
P rows. Whole examples are left out, so that sums over the positions of an example stay what they are, and what is
left is a strided view. Sums over the chosen examples, times `weight`, stand for those over all: with batches in
random order their expectation is the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from algoperf_kfac.positions import Positions

# However many rows an example has, positions of one alone are too much alike.
LEAST_EXAMPLES = 2


@dataclasses.dataclass(frozen=True)
class RowLimit:
    """How many rows the statistics of layers are formed of at least.

    Attributes:
        rows: `KFACConfig.statistics_rows`; None for all.
        by_side: `KFACConfig.statistics_rows_by_side`.
    """

    rows: int | None = None
    by_side: bool = False

    def of(self, sides: Sequence[int]) -> int | None:
        """Of a layer whose factors have diagonal blocks with these sides; None for all."""
        return max(self.rows, *sides) if self.rows is not None and self.by_side and sides else self.rows

    def fitted(self, sides: Sequence[int], candidates: Iterable[Positions]) -> int | None:
        """The same, of a layer whose rows may be read in these ways; all, if by segments: these have no order."""
        return None if any(one.segment_ids is not None for one in candidates) else self.of(sides)


@dataclasses.dataclass(frozen=True)
class Subset:
    """Some of the examples of a call.

    Attributes:
        examples: how many there are.
        every: of so many one is chosen, the first one first; 1 for all.
    """

    examples: int
    every: int = 1

    @classmethod
    def of(cls, rows: int | None, examples: int, each: int) -> Subset:
        """As few examples as have `rows` rows together, but `LEAST_EXAMPLES`.

        Args:
            rows: from `RowLimit`.
            examples: of the call.
            each: rows per example that outer products are formed of: its positions, or 1 where they are summed.
        """
        if rows is None:
            return cls(examples)
        return cls(examples, max(1, min(examples * each // rows, examples // LEAST_EXAMPLES)))

    @property
    def size(self) -> int:
        """How many are chosen."""
        return -(-self.examples // self.every)

    @property
    def weight(self) -> float:
        """How many examples a chosen one stands for, itself included."""
        return self.examples / self.size

    @property
    def slice(self) -> slice:
        """Which they are."""
        return slice(None, None, self.every)
