"""The figure: eigenvalues of A of one kernel, where the updates go, and how training by each ends."""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.experiments import runs
from benchmarks.experiments.notebook import EXPERIMENTS
from benchmarks.kept import Book
from benchmarks.paper.worth import page
from benchmarks.paper.worth.measure import Start
from scoring.show import palette

NETWORK, LAYER = "mnist_resnet", "blocks.1.conv2"
COLOURS = {"expand": palette.LIGHT[0], "reduce": palette.LIGHT[1], "mixed": palette.LIGHT[2], "gradient": "#a9adb2"}
# Whose final losses are shown: experiment, variant.
TRAINED = {"expand": ("polar", "base"), "mixed": ("mixed", "mixed"), "reduce": ("mixed", "base")}
_RC = {"font.family": "sans-serif", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def draw(book: Book[Start], experiments: Mapping[str, dict[str, Any]]) -> bytes:
    """Three panels, as PNG.

    Args:
        book: the kept measurements.
        experiments: the kept results of experiments, by key.
    """
    with mpl.rc_context(_RC):  # type: ignore[arg-type]
        figure = Figure(figsize=(10.2, 3.1), layout="constrained")
        FigureCanvasAgg(figure)
        spectrum, updates, ends = figure.subplots(1, 3)
        results = page.kept(book, NETWORK)
        if results:
            _spectrum(spectrum, results)
            _updates(updates, results)
        _ends(ends, experiments)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=120, facecolor="white", metadata={"Software": None})
    return out.getvalue()


def _spectrum(axes: Axes, results: list[dict[str, Any]]) -> None:
    for name in ("expand", "reduce"):
        for number, one in enumerate(results):
            values = [max(value, 1e-9) for value in one["layers"][LAYER][name]["eigenvalues"]]
            shares = [(position + 0.5) / len(values) for position in range(len(values))]
            axes.plot(shares, values, color=COLOURS[name], label=None if number else name, linewidth=1.5)
    axes.axvline(1 / 9, color="#a9adb2", linewidth=1, linestyle=":")
    axes.text(1 / 9 + 0.02, 0.5, "a ninth", color="#6b7075")
    axes.set(yscale="log", ylim=(1e-8, 2), xlabel="share of P_in", title=f"Eigenvalues of A, 3 x 3 ({LAYER})")
    axes.legend(frameon=False, loc="lower left")


def _updates(axes: Axes, results: list[dict[str, Any]]) -> None:
    layers = [name for name in results[0]["layers"] if name != "stem"]
    for offset, name in enumerate(("gradient", "expand", "reduce")):
        for place, layer in enumerate(layers):
            found = [one["layers"][layer] for one in results]
            shares = [one[name] if name == "gradient" else one[name]["flat"] for one in found]
            rest = [100 * (1 - share) for share in shares]
            at = [place + 0.2 * (offset - 1)] * len(rest)
            label = {"gradient": "gradient", "expand": "update by expand", "reduce": "update by reduce"}[name]
            axes.plot(at, rest, "o", color=COLOURS[name], markersize=4, label=None if place else label)
    axes.set_xticks(
        range(len(layers)), [name.replace("blocks.", "block ").replace(".conv2", "") for name in layers]
    )
    # Below what is there is room for the legend.
    axes.set(
        yscale="log",
        ylim=(1e-5, 200),
        ylabel="% of its squared norm",
        title="What goes where reduce's A is large (a ninth)",
    )
    axes.legend(frameon=False, loc="lower left")


def _ends(axes: Axes, experiments: Mapping[str, dict[str, Any]]) -> None:
    by_name = {one.name: one for one in EXPERIMENTS}
    for place, (name, (experiment, variant)) in enumerate(TRAINED.items()):
        wanted = runs.runs_of(by_name[experiment])
        found = [
            experiments.get(runs.key(runs.identity(wanted[variant, NETWORK, seed])))
            for seed in by_name[experiment].seeds
        ]
        losses = [one["loss"] for one in found if one is not None]
        if losses:
            axes.bar(place, statistics.fmean(losses), 0.6, color=COLOURS[name])
            axes.plot([place] * len(losses), losses, "o", color=palette.INK["light"], markersize=3)
    axes.set_xticks(range(len(TRAINED)), list(TRAINED))
    axes.set(ylabel="validation loss at the end", title="ResNet trained, power 3/4, grafted")
