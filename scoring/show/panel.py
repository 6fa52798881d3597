"""One set of axes as data: lines, labels, marks and ticks, drawn by ``svg`` for pages, by ``png`` for READMEs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from scoring.judge.columns import Floats

# Advance widths of the printable characters of ASCII in thousandths of an em, as in DejaVu Sans, which is wider
# than the fonts most systems show: a text that fits by these fits.
_WIDTHS = (
    "318 401 460 838 636 950 780 275 390 390 500 838 318 361 318 337 636 636 636 636 636 636 636 636 "
    "636 636 337 337 838 838 838 531 1000 684 686 698 770 632 575 775 752 295 295 656 557 863 748 787 "
    "603 787 695 635 611 732 684 989 685 611 685 390 337 390 838 500 500 613 635 550 635 615 352 635 "
    "634 278 278 579 278 974 634 612 635 635 411 521 392 634 592 818 592 592 525 636 337 636 838"
)
_EM = {chr(32 + k): int(width) / 1000 for k, width in enumerate(_WIDTHS.split())}
BOLD = 1.24  # how much wider bold is, at most: that of a narrow letter


@dataclass
class Line:
    """A line through data; ``steps`` draws it as a staircase. ``colour`` is a name of ``palette``."""

    x: Floats
    y: Floats
    colour: str
    dash: str = ""
    width: float = 2.0
    opacity: float = 1.0
    steps: bool = False
    name: str = ""


@dataclass
class Label:
    """A text at a point of the data. ``colour`` is a name of ``palette``, ``dash`` that of the line it names."""

    x: float
    y: float
    text: str
    colour: str = "ink"
    dash: str = ""


@dataclass
class Panel:
    """One set of axes.

    Attributes:
      title: above it, in one or two lines.
      lines: from back to front.
      labels: names right of the frame, each behind a piece of its line, as high as the line ends.
      rules: horizontal lines with a text, such as the target.
      dots: points of the data.
      background: lines in grey behind, shared by several panels of a figure.
      description: what the panel says, for those who do not see it.
      notes: texts that begin at a point of the data.
      tall: pixels for the data from bottom to top; 0 for the usual.
    """

    title: str
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    x_label: str = ""
    y_label: str = ""
    lines: list[Line] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    rules: list[tuple[float, str]] = field(default_factory=list)
    dots: list[Label] = field(default_factory=list)
    background: Sequence[Line] = ()
    description: str = ""
    y_ticks: Sequence[tuple[float, str]] | None = None
    notes: list[Label] = field(default_factory=list)
    small: bool = False
    tall: float = 0.0


def width_of(text: str, size: float, bold: bool = False) -> float:
    """Pixels a text takes; characters outside ASCII count as the widest letter."""
    return sum(_EM.get(character, 1.0) for character in text) * size * (BOLD if bold else 1.0)


def wrapped(text: str, room: float, size: float, bold: bool = False) -> list[str]:
    """The text in lines that fit, broken behind underscores, blanks and hyphens, or anywhere if need be."""
    lines = [""]
    for part in _pieces(text):
        for piece in [part] if width_of(part, size, bold) <= room else list(part):
            if lines[-1] and width_of((lines[-1] + piece).rstrip(), size, bold) > room:
                lines.append("")
            lines[-1] += piece
    return [line.rstrip() for line in lines]


def _pieces(text: str) -> list[str]:
    pieces = [""]
    for character in text:
        pieces[-1] += character
        if character in "_ -":
            pieces.append("")
    return [piece for piece in pieces if piece]


def ticks(low: float, high: float, most: int = 5) -> list[tuple[float, str]]:
    """Round numbers between two limits with their texts."""
    span = high - low
    if not np.isfinite(span) or span <= 0:
        return [(low, f"{low:g}")]
    power = 10.0 ** np.floor(np.log10(span / most))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if span / (power * factor) <= most)
    first = np.ceil(low / step)
    values = [float(step * k) for k in range(int(first), int(np.floor(high / step)) + 1)]
    return [(value, thousands(value)) for value in values]


def thousands(value: float) -> str:
    """A number on an axis: 40k for 40,000."""
    if abs(value) >= 1000:
        return f"{value / 1000:,.10g}k"
    return f"{value:.6g}"


def spaced(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions moved as little as needed to be ``gap`` apart and inside the limits, in their order."""
    order = np.argsort(positions, kind="stable")
    placed = np.array([positions[k] for k in order], dtype=float)
    for k in range(len(placed)):
        placed[k] = max(placed[k], low if k == 0 else placed[k - 1] + gap)
    limit = high
    for k in range(len(placed) - 1, -1, -1):
        placed[k] = min(placed[k], limit)
        limit = placed[k] - gap
    result = [0.0] * len(placed)
    for k, value in zip(order, placed, strict=True):
        result[int(k)] = float(value)
    return result
