"""Figures with one colour, line style and marker per algorithm, as PNG and as SVG that follows the page's theme."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from scoring.judge.targets import Target

Floats = npt.NDArray[np.float64]

# Okabe and Ito's palette without its yellow, which is unreadable as a line on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
# The two light colours, darkened for white paper; the page uses the originals on a dark ground.
ON_LIGHT = {"#56b4e9": "#2f8fc6", "#e69f00": "#b97f00"}
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h")
INK = "#101112"
GRID = "#a0a1a2"
POINTS = 120

_RC: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "scoring",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.4,
    "grid.alpha": 0.6,
    "legend.frameon": False,
    "path.simplify_threshold": 0.5,
}


@dataclass(frozen=True)
class Style:
    """How one algorithm looks in every figure."""

    colour: str
    line: Any
    marker: str


def styles(names: Sequence[str], reference: str = "") -> dict[str, Style]:
    """A style per algorithm, by order of names, so that it is the same in each figure; the reference in ink."""
    others = [name for name in sorted(names) if name != reference]
    found = {
        name: Style(COLOURS[k % len(COLOURS)], LINES[(k // len(COLOURS)) % len(LINES)], MARKERS[k % len(MARKERS)])
        for k, name in enumerate(others)
    }
    if reference in names:
        found[reference] = Style(INK, "--", MARKERS[len(others) % len(MARKERS)])
    return found


@dataclass(frozen=True)
class Curve:
    """Metric against steps and time for one study."""

    algorithm: str
    step: Floats
    time: Floats
    value: Floats


def curves_of(evals: pd.DataFrame, chosen: pd.DataFrame, target: Target) -> list[Curve]:
    """The learning curves of the chosen trials (one row each: submission, trial_id)."""
    if target.column not in evals:
        return []
    evals = evals[
        evals["believed"].to_numpy() & np.isin(evals["trial_id"].to_numpy(), chosen["trial_id"].to_numpy())
    ]
    names = dict(zip(chosen["trial_id"], chosen["submission"], strict=True))
    found = []
    for trial_id, part in evals.groupby("trial_id", sort=True):
        part = part[part[target.column].notna()]
        if len(part):
            columns = [part[name].to_numpy(dtype=float) for name in ("step", "time", target.column)]
            found.append(Curve(names[trial_id], *columns))
    return sorted(found, key=lambda curve: curve.algorithm)


def median_curve(curves: Sequence[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
    """The median over studies where all of them have values; linear between evaluations."""
    start, stop = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    if len(curves) == 1 or stop <= start:
        return curves[0] if len(curves) == 1 else (np.empty(0), np.empty(0))
    grid = np.linspace(start, stop, POINTS)
    return grid, np.median([np.interp(grid, x, y) for x, y in curves], axis=0)


def learning_curves(
    panels: Sequence[tuple[str, Target, Sequence[Curve]]], look: Mapping[str, Style], width: float = 11.0
) -> Figure:
    """One row per workload: the metric against steps on the left, against time on the right."""
    with mpl.rc_context(_RC):
        figure = Figure(figsize=(width, 3.4 * len(panels) + 0.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(panels), 2, squeeze=False, sharey="row")
        for (workload, target, curves), (left, right) in zip(panels, axes, strict=True):
            _panel(left, curves, "step", target, look)
            _panel(right, curves, "time", target, look)
            if len(panels) > 1:
                left.set_title(workload, loc="left", fontweight="bold")
            arrow = "higher is better" if target.higher_is_better else "lower is better"
            left.set_ylabel(f"{target.column}\n({arrow})")
            left.set_xlabel("steps")
            right.set_xlabel("time (s)")
        shown = [name for name in look if any(c.algorithm == name for _, _, curves in panels for c in curves)]
        _legend(figure, look, shown)
    return figure


def _panel(axes: Axes, curves: Sequence[Curve], x_name: str, target: Target, look: Mapping[str, Style]) -> None:
    for name in sorted({curve.algorithm for curve in curves}):
        style = look[name]
        mine = [(getattr(curve, x_name), curve.value) for curve in curves if curve.algorithm == name]
        for x, y in mine:
            thin = _thinned(x, y)
            axes.plot(*thin, color=style.colour, linestyle=style.line, linewidth=0.7, alpha=0.5)
        x, y = _thinned(*median_curve(mine))
        marker: Any = {"marker": style.marker, "markevery": max(len(x) // 8, 1), "markersize": 4.5}
        axes.plot(x, y, color=style.colour, linestyle=style.line, linewidth=2.0, **marker)
    axes.axhline(target.value, color=INK, linewidth=1.0, linestyle=(0, (1, 2)))
    axes.annotate(
        f"target\n{target.value:g}",
        (1.0, target.value),  # beside the panel, where no curve can hide it
        xycoords=("axes fraction", "data"),
        xytext=(3, 0),
        textcoords="offset points",
        ha="left",
        va="center",
        fontsize=8,
    )
    values = [curve.value for curve in curves]
    if values:
        axes.set_ylim(*_window(values, target))
    axes.set_xlim(left=0)


def _thinned(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """At most about POINTS points, first and last included."""
    if len(x) <= POINTS:
        return x, y
    keep = np.unique(np.linspace(0, len(x) - 1, POINTS).round().astype(int))
    return x[keep], y[keep]


def _window(values: Sequence[Floats], target: Target) -> tuple[float, float]:
    """Limits that show the race for the target; the steep first evaluations may leave the frame."""
    late = np.concatenate([value[len(value) // 4 :] for value in values])
    low, high = np.quantile(late, [0.0, 0.97]) if not target.higher_is_better else np.quantile(late, [0.03, 1.0])
    low, high = min(low, target.value), max(high, target.value)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return float(low - margin), float(high + margin)


def _legend(figure: Figure, look: Mapping[str, Style], names: Sequence[str]) -> None:
    handles = [
        Line2D([], [], color=look[n].colour, linestyle=look[n].line, marker=look[n].marker, linewidth=2, label=n)
        for n in names
    ]
    if handles:
        rows = -(-len(handles) // 5)
        columns = -(-len(handles) // rows)
        figure.legend(handles=handles, loc="outside upper center", ncols=columns, handlelength=3.2)


def profile_figure(profiles: Mapping[str, tuple[Floats, Floats]], look: Mapping[str, Style]) -> Figure:
    """Performance profiles: the share of workloads reached within tau times the best."""
    with mpl.rc_context(_RC):
        figure = Figure(figsize=(9.0, 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for name, (tau, share) in profiles.items():
            style = look[name]
            axes.step(tau, share, where="post", color=style.colour, linestyle=style.line, linewidth=1.8)
            axes.plot(tau[:-1], share[:-1], linestyle="", marker=style.marker, color=style.colour, markersize=5)
        axes.set_xlabel("tau: cost as a multiple of the best")
        axes.set_ylabel("share of workloads reached")
        axes.set_xlim(0.97, 4.0)
        axes.set_ylim(-0.02, 1.02)
        _legend(figure, look, list(profiles))
    return figure


def bars(table: pd.DataFrame, look: Mapping[str, Style], reference: str) -> Figure:
    """Speedup over the reference: one panel per workload (columns), one bar per algorithm (rows)."""
    names = [name for name in table.index if name != reference]
    values = table.loc[names].to_numpy(dtype=float)
    known = np.isfinite(values) & (values > 0)
    low, high = min(0.5, values[known].min(initial=1.0)) / 1.15, max(2.0, values[known].max(initial=1.0)) * 1.6
    across = min(len(table.columns), 2)
    down = -(-len(table.columns) // across)
    with mpl.rc_context(_RC):
        figure = Figure(figsize=(11.0, down * (0.24 * len(names) + 0.75)), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
        for axes in panels.flat[len(table.columns) :]:
            axes.set_visible(False)
        for j, (workload, axes) in enumerate(zip(table.columns, panels.flat, strict=False)):
            for i, name in enumerate(names):
                end = values[i, j] if known[i, j] else 1.0
                axes.barh(i, end - 1, left=1.0, height=0.75, color=look[name].colour)
                label = f"{end:.2f}" if known[i, j] else "miss"
                axes.annotate(
                    label, (max(end, 1.0), i), xytext=(3, 0), textcoords="offset points", fontsize=8, va="center"
                )
            axes.axvline(1.0, color=INK, linewidth=1.0)
            axes.set_title(str(workload), loc="left", fontweight="bold", fontsize=10)
            axes.set_xscale("log")
            axes.grid(visible=False, axis="y")
        axes = panels[0, 0]
        axes.set_yticks(np.arange(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlim(low, high)
        ticks = [tick for tick in (0.1, 0.25, 0.5, 1, 2, 4, 8, 16) if low <= tick <= high]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        figure.supxlabel(f"speedup over {reference} (right of 1 is faster)", fontsize=10)
    return figure


def heat_map(table: pd.DataFrame, texts: pd.DataFrame) -> Figure:
    """Submissions by workloads: the ratio to the best as a shade, and in words in each cell."""
    with mpl.rc_context({**_RC, "axes.grid": False}):
        figure = Figure(
            figsize=(1.0 * len(table.columns) + 2.4, 0.36 * len(table.index) + 1.3), layout="constrained"
        )
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        values = np.clip(table.to_numpy(dtype=float), 1.0, 4.0)
        axes.imshow(values, cmap="cividis_r", vmin=1.0, vmax=4.0, aspect="auto", alpha=0.85)
        for i, j in np.ndindex(values.shape):
            dark = values[i, j] > 2.4
            axes.annotate(
                str(texts.iloc[i, j]),
                (j, i),
                ha="center",
                va="center",
                fontsize=8,
                color="#fefefe" if dark else "#050505",
            )
        labels = [str(name).replace("librispeech_", "").replace("imagenet_", "") for name in table.columns]
        axes.set_xticks(np.arange(len(table.columns)), labels, rotation=30, ha="right")
        axes.set_yticks(np.arange(len(table.index)), list(table.index))
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a picture on white, the same bytes for the same data."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120, facecolor="white", metadata={"Software": None})
    return out.getvalue()


def svg(figure: Figure, prefix: str, theme: bool = True) -> str:
    """The figure as SVG without a date; with ``theme``, it takes the page's colours, its names the ``prefix``."""
    out = io.StringIO()
    with mpl.rc_context(_RC):
        figure.savefig(out, format="svg", transparent=theme, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    if not theme:
        return text
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(
        r'width="[\d.]+pt" height="[\d.]+pt"', 'width="100%" preserveAspectRatio="xMidYMid meet"', text, count=1
    )
    text = re.sub(r'((?:\sid="|url\(#|href="#))', rf"\g<1>{prefix}-", text)
    text = text.replace(INK, "currentColor").replace(GRID, "var(--grid)")
    for k, colour in enumerate(COLOURS):
        text = text.replace(colour, f"var(--c{k})")
    return text.replace("font: ", "font-family: sans-serif; font: ")
