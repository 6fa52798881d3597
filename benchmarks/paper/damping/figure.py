"""The figure: steps to a common loss, and loss at the end, over damping; a pair of rows for each workload."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Mapping

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.kept import Book
from benchmarks.paper.damping import grid, page, reading
from benchmarks.paper.damping.grid import Case
from benchmarks.paper.damping.reading import NEAR, Outcome
from benchmarks.paper.damping.training import Gained
from scoring.show import palette

COLOURS = {"expand": palette.LIGHT[0], "reduce": palette.LIGHT[1]}
MARKS = {"expand": "o", "reduce": "s"}
_RC = {"font.family": "sans-serif", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def draw(book: Book[Case], gains: Book[Gained]) -> bytes:
    """A column for each form that was run, as PNG; the same results give the same bytes."""
    found = page.read(book, gains)
    curves = {
        (workload, form, approximation): outcomes
        for workload, one in found.items()
        for form, approximation, outcomes in page.shown(one)
    }
    workloads = list(dict.fromkeys(workload for workload, _, _ in curves))
    forms = list(dict.fromkeys(form for _, form, _ in curves))
    with mpl.rc_context(_RC):  # type: ignore[arg-type]
        rows, columns = max(1, 2 * len(workloads)), max(1, len(forms))
        figure = Figure(figsize=(max(5.6, 1.2 + 3.3 * columns), 0.9 + 2.3 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False, sharex="col", sharey="row")
        for row, workload in enumerate(workloads):
            wanted = found[workload].target
            for column, form in enumerate(forms):
                above, below = axes[2 * row][column], axes[2 * row + 1][column]
                for name in grid.APPROXIMATIONS:
                    outcomes = curves.get((workload, form, name), {})
                    _steps(above, outcomes, name, grid.steps_of(workload))
                    _losses(below, outcomes, name)
                above.set_title(f"{workload}\n{form.title}", loc="left", fontsize=9)
                below.set_xlabel(f"damping ({form.mode})")
                if wanted is not None:
                    above.axhline(grid.steps_of(workload), color="#a9adb2", linewidth=1, linestyle=":")
                    below.axhline(wanted, color="#a9adb2", linewidth=1, linestyle=":")
                for axis in (above, below):
                    axis.set_xscale("log")
                below.set_yscale("log")
            axes[2 * row][0].set_ylabel("steps to the common loss")
            axes[2 * row][0].set_ylim(0, 1.12 * grid.steps_of(workload))
            axes[2 * row + 1][0].set_ylabel("validation loss at the end")
        handles, labels = axes[0][0].get_legend_handles_labels()
        if labels:
            title = (
                "dots: seeds; lines: their median (steps) or mean (loss); x: missed\n"
                "band: within 10 % of the best; dotted: horizon, common loss"
            )
            figure.legend(
                handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, title=title
            )
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=120, facecolor="white", metadata={"Software": None})
    return out.getvalue()


def _steps(axes: Axes, outcomes: Mapping[float, Outcome], name: str, horizon: int) -> None:
    medians = {value: statistics.median(one.steps) for value, one in sorted(outcomes.items())}
    finite = {value: steps for value, steps in medians.items() if math.isfinite(steps)}
    axes.plot(list(finite), list(finite.values()), color=COLOURS[name], label=name)
    for value, one in outcomes.items():
        here = [steps for steps in one.steps if math.isfinite(steps)]
        axes.plot([value] * len(here), here, MARKS[name], color=COLOURS[name], markersize=3)
    missed = [value for value, steps in medians.items() if not math.isfinite(steps)]
    axes.plot(missed, [horizon] * len(missed), "x", color=COLOURS[name], markersize=6 if name == "expand" else 9)
    found = reading.width(medians)
    if found is not None and found.high > found.low:
        level = NEAR * medians[found.best]
        axes.plot([found.low, found.high], [level] * 2, color=COLOURS[name], linewidth=5, alpha=0.3)


def _losses(axes: Axes, outcomes: Mapping[float, Outcome], name: str) -> None:
    means = {value: statistics.fmean(one.losses) for value, one in sorted(outcomes.items())}
    finite = {value: loss for value, loss in means.items() if math.isfinite(loss)}
    axes.plot(list(finite), list(finite.values()), color=COLOURS[name])
    for value, one in outcomes.items():
        here = [loss for loss in one.losses if math.isfinite(loss)]
        axes.plot([value] * len(here), here, MARKS[name], color=COLOURS[name], markersize=3)
