"""The figure of complexity: CPU time of A and B against R, and what the two-constant model says."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.paper.complexity import model, slopes
from benchmarks.paper.complexity.layers import Sweep, layers_of
from benchmarks.paper.complexity.page import TITLES
from benchmarks.paper.complexity.records import Results
from commands.errors import UserError
from scoring.show import palette

SHOWN = ("linear", "graph", "2-d convolution", "depthwise convolution")
COLOURS = {"expand": palette.LIGHT[0], "reduce": palette.LIGHT[1], "part": palette.LIGHT[2]}
NAMES = {"expand": "expand", "reduce": "reduce", "part": "expand, part of the rows"}
_RC = {"font.family": "sans-serif", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def draw(sweeps: Sequence[Sweep], frameworks: Sequence[str], results: Results) -> bytes:
    """A row of panels for each framework, as PNG; the same results give the same bytes."""
    along = [sweep for sweep in sweeps if sweep.axis == "R" and sweep.name in SHOWN]
    with mpl.rc_context(_RC):  # type: ignore[arg-type]
        figure = Figure(figsize=(3.1 * len(along), 2.9 * len(frameworks) + 0.4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(frameworks), len(along), squeeze=False)
        for framework, line in zip(frameworks, axes, strict=True):
            for sweep, place in zip(along, line, strict=True):
                _panel(sweep, framework, results, sweeps, place)
            line[0].set_ylabel("CPU seconds of A and B")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=120, facecolor="white", metadata={"Software": None})
    return out.getvalue()


def _panel(sweep: Sweep, framework: str, results: Results, sweeps: Sequence[Sweep], axes: Axes) -> None:
    product = _sum(sweep, framework, results, "product")
    axes.plot(list(product), list(product.values()), color="#a9adb2", linewidth=4, label="bare products")
    for curve, colour in COLOURS.items():
        found = slopes.measured(sweep, framework, results, "seconds", curve, "both")
        axes.plot(list(found), list(found.values()), color=colour, marker="o", markersize=3.5, label=NAMES[curve])
    try:
        rates = model.fit(framework, results, layers_of(tuple(sweeps)))
    except UserError:
        rates = None
    for curve in ("expand", "reduce"):
        if rates is not None:
            said = [rates.seconds(model.work(layer, curve)) for layer in sweep.layers.values()]
            label = "two-constant model" if curve == "expand" else None
            axes.plot(
                list(sweep.layers),
                said,
                color=palette.INK["light"],
                linewidth=0.9,
                linestyle=(0, (3, 2)),
                label=label,
            )
    axes.set_xscale("log", base=4)
    axes.set_yscale("log")
    axes.set_xlabel("positions R")
    axes.set_title(f"{TITLES[framework]}, {sweep.name}", loc="left", fontsize=9)


def _sum(sweep: Sweep, framework: str, results: Results, curve: str) -> dict[float, float]:
    a, b = (slopes.measured(sweep, framework, results, "seconds", curve, part) for part in ("A", "B"))
    return {size: a[size] + b[size] for size in a}
