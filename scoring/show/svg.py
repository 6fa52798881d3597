"""Panels as SVG: a title and a role each, colours by the page's variables, every text inside the picture."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from scoring.judge.columns import Floats
from scoring.show import palette
from scoring.show.panel import Label, Line, Panel, spaced, ticks, width_of, wrapped

# Pixels. A page shows a panel at its own size or larger, down to a screen of 400 pixels: text stays above 11.
WIDTH, HEIGHT = 368, 270
SMALL_WIDTH, SMALL_HEIGHT = 180, 160
TEXT, SMALL_TEXT = 12.5, 12.0
# Keeps a text legible where lines run behind it.
HALO = "paint-order:stroke;stroke:var(--paper);stroke-width:3px"
SAMPLE = 24  # the piece of a line before its name


def draw(panel: Panel, name: str, background: str = "") -> str:
    """A panel as an ``<svg>`` element.

    Args:
      panel: what to draw.
      name: unique on the page, for the references inside.
      background: the id of a symbol, see ``symbol``, to draw behind the lines.
    """
    frame = _Frame(panel)
    inside = [
        f'<title id="{name}-t">{escape(panel.title)}</title>',
        f'<desc id="{name}-d">{escape(panel.description)}</desc>',
        *_axes(panel, frame),
        f'<clipPath id="{name}-c"><rect x="{frame.left:.1f}" y="{frame.top - 2:.1f}" width="{frame.across:.1f}" '
        f'height="{frame.down + 4:.1f}"/></clipPath>',
        f'<g clip-path="url(#{name}-c)">',
        f'<use href="#{background}"/>' if background else "".join(_line(line, frame) for line in panel.background),
        *(_line(line, frame) for line in panel.lines),
        *(_dot(dot, frame) for dot in panel.dots),
        "</g>",
        *_notes(panel, frame),
        *_labels(panel, frame),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {frame.width} {frame.height:.0f}" role="img" '
        f'aria-labelledby="{name}-t {name}-d">{"".join(inside)}</svg>'
    )


def symbol(panel: Panel, name: str) -> str:
    """The background of panels that share their axes, drawn once and used by each."""
    frame = _Frame(panel)
    lines = "".join(_line(line, frame) for line in panel.background)
    return (
        f'<svg width="0" height="0" aria-hidden="true" class="hidden"><defs><g id="{name}">{lines}</g></defs></svg>'
    )


class _Frame:
    """Where the data of a panel lie in its picture."""

    def __init__(self, panel: Panel) -> None:
        small = panel.small
        self.text = SMALL_TEXT if small else TEXT
        self.width = SMALL_WIDTH if small else WIDTH
        self.title = wrapped(panel.title, self.width - 8, self.text + 0.5, bold=True)
        self.y_ticks = ticks(*panel.y_range, 4 if small else 5) if panel.y_ticks is None else list(panel.y_ticks)
        self.x_ticks = ticks(*panel.x_range, 3 if small else 5)
        widest = max((width_of(text, self.text) for _, text in self.y_ticks), default=0.0)
        self.left = 8 + widest
        self.right_room = 8.0
        self.names = [wrapped(one.text, 0.38 * self.width, self.text) for one in panel.labels]
        if self.names:
            self.right_room = 12 + SAMPLE + max(width_of(line, self.text) for lines in self.names for line in lines)
        last = width_of(self.x_ticks[-1][1], self.text) / 2 if self.x_ticks else 0.0
        self.right_room = max(self.right_room, last + 2)
        line = self.text + 3
        # Two small panels beside each other must have their axes at the same height.
        lines = max(len(self.title), 2) if small else len(self.title)
        self.top = 12 + line * lines + (line if panel.y_label else 0)
        self.y_label = 3 + line * (lines + 1)
        # Names of several lines stand below each other in full, however many and long: the frame grows.
        self.gap = max(map(len, self.names), default=0) * (self.text + 1) + 2
        self.down = max(panel.tall or (SMALL_HEIGHT if small else HEIGHT) - 70, len(self.names) * self.gap - 10)
        self.height = self.top + self.down + line + 6 + (line if panel.x_label else 0)
        self.across = self.width - self.left - self.right_room
        self.x_range, self.y_range = panel.x_range, panel.y_range

    def x(self, value: float | Floats) -> float | Floats:
        low, high = self.x_range
        return self.left + self.across * (value - low) / ((high - low) or 1.0)

    def y(self, value: float | Floats) -> float | Floats:
        low, high = self.y_range
        return self.top + self.down * (1 - (value - low) / ((high - low) or 1.0))


def _text(x: float, y: float, text: str, size: float, anchor: str = "start", style: str = "") -> str:
    extra = f' style="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" text-anchor="{anchor}"{extra}>{escape(text)}</text>'


def _axes(panel: Panel, frame: _Frame) -> list[str]:
    size = frame.text
    found = [
        _text(4, 6 + size + k * (size + 3), line, size + 0.5, style="font-weight:600")
        for k, line in enumerate(frame.title)
    ]
    if panel.y_label:
        found.append(_text(4, frame.y_label, panel.y_label, size))
    bottom, right = frame.top + frame.down, frame.left + frame.across
    for value, text in frame.y_ticks:
        y = float(frame.y(value))
        found.append(f'<path class="grid" d="M{frame.left:.1f} {y:.1f}H{right:.1f}"/>')
        found.append(_text(frame.left - 4, y + 0.35 * size, text, size, "end"))
    for value, text in frame.x_ticks:
        x = float(frame.x(value))
        found.append(f'<path class="grid" d="M{x:.1f} {frame.top:.1f}V{bottom:.1f}"/>')
        # A number at the left edge may not run into the axis on its left.
        found.append(_text(max(x, width_of(text, size) / 2 + 1), bottom + size + 3, text, size, "middle"))
    if panel.x_label:
        found.append(_text(frame.left, bottom + 2 * size + 6, panel.x_label, size))
    found.append(f'<path class="axis" d="M{frame.left:.1f} {frame.top:.1f}V{bottom:.1f}H{right:.1f}"/>')
    for value, _ in panel.rules:
        y = float(frame.y(value))
        if frame.top <= y <= bottom:
            found.append(f'<path class="rule" d="M{frame.left:.1f} {y:.1f}H{right:.1f}"/>')
    return found


def _notes(panel: Panel, frame: _Frame) -> list[str]:
    """Texts within the frame, over the lines: what the rules are, and notes."""
    size = frame.text
    found = [_text(float(frame.x(one.x)), float(frame.y(one.y)), one.text, size, style=HALO) for one in panel.notes]
    for value, text in panel.rules:
        y = float(frame.y(value))
        if frame.top <= y <= frame.top + frame.down and text:
            place = y - 4 if y > frame.top + size + 4 else y + size + 2
            found.append(_text(frame.left + 4, place, text, size, style=HALO))
    return found


def _line(line: Line, frame: _Frame) -> str:
    keep = np.isfinite(line.x) & np.isfinite(line.y)
    if not keep.any():
        return ""
    # Far outside the frame nothing is seen, and some viewers stumble over such numbers.
    x = np.clip(np.asarray(frame.x(line.x[keep])), -1e4, 1e4)
    y = np.clip(np.asarray(frame.y(line.y[keep])), -1e4, 1e4)
    if line.steps:
        points = [f"M{x[0]:.1f} {y[0]:.1f}", *(f"H{a:.1f}V{b:.1f}" for a, b in zip(x[1:], y[1:], strict=True))]
        path = "".join(points)
    else:
        path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True))
    dash = f' stroke-dasharray="{line.dash}"' if line.dash else ""
    faint = f' opacity="{line.opacity:g}"' if line.opacity < 1 else ""
    title = f"<title>{escape(line.name)}</title>" if line.name else ""
    end = f">{title}</path>" if title else "/>"
    look = f'style="stroke:var(--{line.colour})" stroke-width="{line.width:g}"{dash}{faint}'
    return f'<path class="line" {look} d="{path}"{end}'


def _dot(dot: Label, frame: _Frame) -> str:
    x, y = float(frame.x(dot.x)), float(frame.y(dot.y))
    title = f"<title>{escape(dot.text)}</title>" if dot.text else ""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" style="fill:var(--{dot.colour})">{title}</circle>'


def _labels(panel: Panel, frame: _Frame) -> list[str]:
    """Names at the right of the frame, each on the height of its line's end or as near as there is room.

    Lines that end at one height, as at a target, are named from the first to end to the last.
    """
    if not panel.labels:
        return []
    size = frame.text
    line = size + 1
    order = sorted(range(len(panel.labels)), key=lambda k: panel.labels[k].x)
    labels, names = [panel.labels[k] for k in order], [frame.names[k] for k in order]
    wanted = [float(np.clip(frame.y(one.y), frame.top, frame.top + frame.down)) for one in labels]
    # A pixel or two of difference is no order.
    wanted = [round(place / 8) * 8 for place in wanted]
    low = frame.top + 0.5 * frame.gap - 4
    places = spaced(wanted, frame.gap, low, frame.top + frame.down + 6 - 0.5 * frame.gap)
    x = frame.left + frame.across + 6
    found = []
    for one, lines, place in zip(labels, names, places, strict=True):
        start = place - 0.5 * line * (len(lines) - 1) + 0.35 * size
        dash = f' stroke-dasharray="{one.dash}"' if one.dash else ""
        look = f'style="stroke:var(--{one.colour})" stroke-width="2.2"{dash}'
        found.append(f'<path class="line" {look} d="M{x:.1f} {place:.1f}h{SAMPLE - 5}"/>')
        found += [_text(x + SAMPLE, start + k * line, text, size) for k, text in enumerate(lines)]
    return found


def alone(panels: Sequence[Sequence[Panel]]) -> str:
    """Rows of panels as one file of its own, in the colours of the light theme."""
    drawn = []
    top = 0.0
    width = max((len(row) for row in panels), default=1) * (WIDTH + 12)
    for i, row in enumerate(panels):
        frames = [_Frame(panel) for panel in row]
        for k, (panel, frame) in enumerate(zip(row, frames, strict=True)):
            place = f'<svg x="{k * (WIDTH + 12)}" y="{top:.0f}" width="{frame.width}" height="{frame.height:.0f}" '
            drawn.append(draw(panel, f"p{i}-{k}").replace("<svg ", place, 1))
        top += max((frame.height for frame in frames), default=0.0) + 14
    style = f":root {{ {palette.variables('light')} --paper: #ffffff; --grey: #a9adb2; --grid: #d4d8dc; }} {STYLE}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top:.0f}" '
        f'width="{width}" height="{top:.0f}">'
        f'<style>{style}</style><rect width="100%" height="100%" fill="#ffffff"/>{"".join(drawn)}</svg>\n'
    )


STYLE = (
    "svg text { font-family: system-ui, sans-serif; fill: var(--ink); } "
    ".line { fill: none; stroke-linejoin: round; } .grid { stroke: var(--grid); stroke-width: .7; } "
    ".axis { fill: none; stroke: var(--ink); stroke-width: 1; } "
    ".rule { stroke: var(--ink); stroke-width: 1.2; stroke-dasharray: 1.5 3; }"
)
