"""Panels as a picture on white, for READMEs and slides."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from scoring.show import palette
from scoring.show.panel import Line, Panel, thousands

_RC = {"font.family": "sans-serif", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
GREY = "#a9adb2"


def draw(rows: Sequence[Sequence[Panel]]) -> bytes:
    """Rows of panels as a PNG file, the same bytes for the same data."""
    across = max(len(row) for row in rows)
    with mpl.rc_context(_RC):  # type: ignore[arg-type]
        figure = Figure(figsize=(5.5 * across, 3.5 * len(rows)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(rows), across, squeeze=False)
        for row, places in zip(rows, axes, strict=True):
            for place in places[len(row) :]:
                place.set_visible(False)
            for panel, place in zip(row, places, strict=False):
                _panel(panel, place)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=120, facecolor="white", metadata={"Software": None})
    return out.getvalue()


def _panel(panel: Panel, axes: Axes) -> None:
    axes.set_title(panel.title, loc="left", fontweight="bold", fontsize=10)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.grid(color="#d4d8dc", linewidth=0.6)
    axes.set_axisbelow(True)
    for line in [*panel.background, *panel.lines]:
        _line(line, axes)
    for value, text in panel.rules:
        axes.axhline(value, color=palette.INK["light"], linewidth=1.0, linestyle=(0, (1, 2)))
        axes.annotate(
            text, (0, value), xycoords=("axes fraction", "data"), xytext=(3, 3), textcoords="offset points"
        )
    for dot in panel.dots:
        axes.plot([dot.x], [dot.y], marker="o", markersize=5, color=palette.colour(dot.colour))
    axes.set_xlim(*panel.x_range)
    axes.set_ylim(*panel.y_range)
    axes.xaxis.set_major_formatter(lambda value, _: thousands(value))
    handles = [
        Line2D(
            [], [], color=palette.colour(one.colour), linestyle=_dash(one.dash, 2.0), linewidth=2.0, label=one.text
        )
        for one in sorted(panel.labels, key=lambda one: one.x)
    ]
    if handles:
        axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, handlelength=2.6)


def _dash(dash: str, width: float) -> Any:
    return (0, tuple(float(part) / width for part in dash.split())) if dash else "-"


def _line(line: Line, axes: Axes) -> None:
    colour = GREY if line.colour == "grey" else palette.colour(line.colour)
    style = _dash(line.dash, line.width)
    drawstyle = "steps-post" if line.steps else "default"
    axes.plot(
        line.x, line.y, color=colour, linestyle=style, linewidth=line.width, alpha=line.opacity, drawstyle=drawstyle
    )
