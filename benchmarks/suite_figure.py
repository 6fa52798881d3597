"""The figure of a suite: how many of NadamW's steps, and how much of its time, each submission needs."""

from __future__ import annotations

import io

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.suite_results import COSTS, REFERENCE, Judged, ratio_text
from scoring.show import palette

TITLES = {"steps": "Steps to target", "time": "Time to target"}
NAMES = {"pytorch": "PyTorch", "jax": "JAX"}
_RC = {"font.family": "sans-serif", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}


def draw(judged: list[Judged]) -> bytes:
    """A row of two panels for each group of workloads, as PNG: what K-FAC was not tuned on first.

    Of the first framework alone. The same data give the same bytes.
    """
    shown = [one for one in judged if one.framework == judged[0].framework]
    heights = [0.9 + 0.32 * len(one.submissions) for one in shown]
    with mpl.rc_context(_RC):  # type: ignore[arg-type]
        figure = Figure(figsize=(10, sum(heights)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(shown), len(COSTS), squeeze=False, height_ratios=heights)
        for one, line in zip(shown, axes, strict=True):
            for cost, place in zip(COSTS, line, strict=True):
                _panel(one, cost, place)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=120, facecolor="white", metadata={"Software": None})
    return out.getvalue()


def _panel(one: Judged, cost: str, axes: Axes) -> None:
    means = one.means[cost].loc[one.submissions[::-1]]
    count = len(one.group.workloads)
    colours = [_colour(str(name)) for name in means.index]
    places = np.arange(len(means))
    axes.barh(places, means["ratio"].fillna(0.0), color=colours, height=0.7)
    ends = means[["ratio", "high"]].replace([np.inf], np.nan).max(axis=1)
    limit = max(1.25, 1.18 * float(ends.max()))
    for place, (_, row) in zip(places, means.iterrows(), strict=True):
        _interval(row, float(place), limit, axes)
        whole = row["workloads"] == count
        beside = "" if whole else f"  ({row['workloads']:.0f} of {count} workloads)"
        label = "missed" if np.isnan(row["ratio"]) else f"{ratio_text(row)}{beside}"
        end = min(np.nanmax([row["ratio"], row["high"] if np.isfinite(row["high"]) else row["ratio"], 0.0]), limit)
        # On white: an interval that reaches a miss runs on behind it.
        white = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.annotate(label, (end, place), xytext=(5, 0), textcoords="offset points", va="center", bbox=white)
    axes.axvline(1.0, color=palette.INK["light"], linewidth=1.0, linestyle=(0, (1, 2)))
    axes.set_yticks(places, [str(name) for name in means.index])
    axes.set_xlim(0, limit)
    missed = " (≤: NadamW missed some)" if means["bounded"].any() else ""
    axes.set_xlabel(f"NadamW = 1, shorter is better{missed}")
    if cost == COSTS[0]:
        axes.set_title(
            f"{one.group.title} ({count}, {NAMES[one.framework]})\n{TITLES[cost]}", loc="left", fontsize=10
        )
    else:
        axes.set_title(TITLES[cost], loc="left", fontsize=10)


def _interval(row: pd.Series, place: float, limit: float, axes: Axes) -> None:
    if np.isnan(row["low"]) or row["low"] == row["high"]:
        return
    axes.plot([row["low"], min(row["high"], limit)], [place, place], color=palette.INK["light"], linewidth=1.2)


def _colour(name: str) -> str:
    if name == REFERENCE:
        return palette.INK["light"]
    return palette.colour("c0") if name.startswith("kfac") else "#a9adb2"
