"""Which rows of a batch statistics are formed from: of every n-th example, so that a configured number is left.

Outer products take time in proportion to rows, and a factor of dimension P hardly changes beyond some multiple of
P rows. Whole examples are left out, so that sums over the positions of an example stay what they are, and what is
left is a strided view. Where few examples have more rows than that together, as images have, and positions are rows
of their own, every k-th position of an example is taken. Sums over the chosen rows, times `weight`, stand for those
over all: with batches in random order their expectation is the same, but for what differs between positions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from algoperf_kfac.positions import Positions

Slice: TypeAlias = slice  # which is a property's name below

# However many rows an example has, positions of few alone are too much alike.
LEAST_EXAMPLES = 4


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
    """Some of the rows of a call.

    Attributes:
        examples: how many there are.
        every: of so many examples one is chosen, the first one first; 1 for all.
        each: rows of an example.
        thinning: of so many rows of an example one is chosen, the first one first; 1 for all.
    """

    examples: int
    every: int = 1
    each: int = 1
    thinning: int = 1

    @classmethod
    def of(cls, rows: int | None, examples: int, each: int, *, thins: bool = True) -> Subset:
        """As few examples as have `rows` rows together, but `LEAST_EXAMPLES`; of these as few rows.

        Args:
            rows: from `RowLimit`.
            examples: of the call.
            each: rows per example that outer products are formed of: its positions, or 1 where they are summed.
            thins: whether some rows of an example may be taken; else all.
        """
        if rows is None:
            return cls(examples, each=each)
        chosen = cls(examples, max(1, min(examples * each // rows, examples // LEAST_EXAMPLES)), each)
        if not thins:
            return chosen
        # Not a divisor of the number of positions, or every row of an image would give the same columns.
        most = max(1, min(chosen.size * each // rows, each))
        thinning = next(step for step in range(most, 0, -1) if math.gcd(step, each) == 1)
        return dataclasses.replace(chosen, thinning=thinning)

    @property
    def size(self) -> int:
        """How many examples are chosen."""
        return -(-self.examples // self.every)

    @property
    def rows(self) -> int:
        """How many rows of each."""
        return -(-self.each // self.thinning)

    @property
    def weight(self) -> float:
        """How many rows a chosen one stands for, itself included."""
        return self.examples / self.size * (self.each / self.rows if self.each else 1.0)

    @property
    def slice(self) -> slice:
        """Which examples they are."""
        return slice(None, None, self.every)

    @property
    def of_rows(self) -> Slice:
        """Which of their rows."""
        return slice(None, None, self.thinning)
