"""What a person is told of directions: a table of the most doubtful layers, and a warning where most are noise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from algoperf_kfac.errors import listed

# Updates after which directions are judged; looking at them waits for the device.
WHEN_JUDGED = (20, 100)
SMALL_RATIO = 0.01
HEAD = ("layer", "graft ratio", "cosine", "A at damping", "B at damping", "refreshes", "idle", "noise")


class Judged(NamedTuple):
    """What the table says of a layer; None for what there is nothing to say of.

    Attributes:
        graft_ratio: length of NadamW's step over that of K-FAC's.
        cosine: between K-FAC direction and momentum.
        a_at_damping, b_at_damping: share of a factor's damped eigenvalues that are within twice the smallest.
        refreshes: how many succeeded.
        idle: statistics steps in a row that went by without the layer.
        noise: how many eigenvalues of A and B are on the level of rounding (`KFACConfig.noise_level`).
    """

    graft_ratio: float | None
    cosine: float | None
    a_at_damping: float | None
    b_at_damping: float | None
    refreshes: int
    idle: int
    noise: int | None = None

    def cells(self) -> tuple[str, ...]:
        """As text, in the order of `HEAD`."""
        ratio = "-" if self.graft_ratio is None else f"{self.graft_ratio:.2g}"
        cosine = "-" if self.cosine is None else f"{self.cosine:.2f}"
        noise = "-" if self.noise is None else str(self.noise)
        shares = ("-" if s is None else f"{100 * s:.0f} %" for s in (self.a_at_damping, self.b_at_damping))
        return (ratio, cosine, *shares, str(self.refreshes), str(self.idle), noise)


def worst_first(names: Iterable[str], ratios: Mapping[str, float]) -> list[str]:
    """Layers by their graft ratios, the smallest first; without one it counts as 1."""
    return sorted(names, key=lambda name: ratios.get(name, 1.0))


def table(layers: Mapping[str, Judged], rest: int) -> str:
    """A table for a person to read.

    Args:
        layers: by name, in the order to show.
        rest: number of layers that are not shown.
    """
    rows = [HEAD, *((name, *judged.cells()) for name, judged in layers.items())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *([f"... and {rest} more layers"] if rest > 0 else [])])


def noise(ratios: Mapping[str, float]) -> str | None:
    """What to say if directions are hundreds of times as long as first-order ones in most layers: noise, scaled up.

    Args:
        ratios: by layer, the length of its first-order step over that of its K-FAC direction.
    """
    small = {name: value for name, value in ratios.items() if 0 < value < SMALL_RATIO}
    if 2 * len(small) <= len(ratios):
        return None
    worst = listed(f"{name} ({value:.0e})" for name, value in sorted(small.items(), key=lambda x: x[1]))
    return (
        f"in {len(small)} of {len(ratios)} layers K-FAC's direction is over {1 / SMALL_RATIO:.0f} times as "
        f"long as the first-order step, a sign of factors that are all but singular: {worst}. Take "
        'approximation="expand" or "mixed" for convolutions (reduce averages the patches of a kernel, which '
        "hardly differ), or more damping; optimizer.summary() shows the layers"
    )
