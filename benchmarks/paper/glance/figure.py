"""The figure: six panels, a claim or a question of the paper each."""

from __future__ import annotations

import io
import math
import statistics

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from benchmarks.paper.exactness_cases import ZERO
from benchmarks.paper.glance.sources import Glance, Share
from scoring.show import palette

COLOURS = {"expand": palette.LIGHT[0], "reduce": palette.LIGHT[1], "mixed": palette.LIGHT[2], "part": "#6b7075"}
GREY, FAINT = "#a9adb2", "#eef0f2"
CLAIM = (0.5, 0.75)  # of the steps: the paper's, for a graph network and a vision transformer
CLAIMED = ("molecules_gnn", "mnist_vit")  # their twins in the suite
_RC = {"font.family": "sans-serif", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def draw(found: Glance) -> bytes:
    """All panels, as PNG; the same results give the same bytes."""
    with mpl.rc_context(_RC):  # type: ignore[arg-type]
        figure = Figure(figsize=(12.8, 8.2), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, 3, height_ratios=(1.25, 1))
        _steps(axes[0][0], found)
        _exact(axes[0][1], found)
        _cost(axes[0][2], found)
        _update(axes[1][0], found)
        _ends(axes[1][1], found)
        _damping(axes[1][2], found)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=120, facecolor="white", metadata={"Software": None})
    return out.getvalue()


def _title(axes: Axes, claim: str, what: str) -> None:
    axes.set_title(f"{claim}\n", loc="left", fontsize=10, fontweight="bold")
    # Left out of the layout, which else makes room for it beside the panel.
    axes.text(0, 1.02, what, transform=axes.transAxes, fontsize=8.5, color="#40454a", in_layout=False)


def _steps(axes: Axes, found: Glance) -> None:
    reached = [name for name, share in found.steps["expand"].items() if share is not None]
    workloads = sorted(reached, key=lambda name: name not in CLAIMED)
    missed = [name for name, share in found.steps["expand"].items() if share is None]
    axes.axvspan(*CLAIM, color=FAINT, zorder=0)
    axes.axvline(1.0, color=GREY, linewidth=1, linestyle=":")
    places = {name: float(len(workloads) - row) for row, name in enumerate(workloads)}
    for approximation, offset in (("expand", 0.16), ("reduce", -0.16)):
        for number, name in enumerate(workloads):
            share = found.steps[approximation][name]
            if share is not None:
                _share(axes, share, places[name] + offset, approximation, label=None if number else approximation)
    labels = [f"{name} *" if name in CLAIMED else name for name in workloads]
    axes.set_yticks([places[name] for name in workloads], labels)
    axes.set_ylim(-0.9, len(workloads) + 1.9)
    axes.text(sum(CLAIM) / 2, len(workloads) + 0.55, "the paper:\n50 to 75 %", ha="center", fontsize=8)
    axes.text(1.02, len(workloads) + 0.55, "NadamW", fontsize=8)
    axes.set_xlim(0, 1.35)
    notes = ["* of the paper's kind; arrow: not all studies reach it"]
    notes += [f"NadamW misses: {', '.join(missed)}"] if missed else []
    axes.set_xlabel("\n".join(["steps over tuned NadamW's", *notes]))
    axes.legend(frameon=False, loc="lower left", ncols=2, fontsize=8)
    _title(axes, "Fewer steps to the target?", "this repository's K-FACs; lines: all studies")


def _share(axes: Axes, share: Share, place: float, approximation: str, *, label: str | None) -> None:
    colour = COLOURS[approximation]
    high = share.high if math.isfinite(share.high) else 1.15
    axes.plot([share.low, high], [place, place], color=colour, linewidth=1.5)
    axes.plot([share.middle], [place], "o", color=colour, label=label)
    if share.reached < share.studies:
        axes.plot([high], [place], ">", color=colour, markersize=5)


def _exact(axes: Axes, found: Glance) -> None:
    rows = list(found.exact)
    for row, name in enumerate(rows):
        for column, error in enumerate(found.exact[name]):
            exact = error < ZERO
            axes.add_patch(
                mpl.patches.Rectangle(
                    (column, len(rows) - row - 1), 0.96, 0.9, color=COLOURS["mixed"] if exact else FAINT
                )
            )
            axes.text(
                column + 0.48,
                len(rows) - row - 0.55,
                "exact" if exact else f"{error:.2g}",
                ha="center",
                va="center",
                color="white" if exact else palette.INK["light"],
            )
    axes.set_xlim(0, 2)
    axes.set_ylim(0, len(rows))
    axes.set_xticks([0.48, 1.48], ["expand", "reduce"])
    axes.set_yticks([len(rows) - row - 0.55 for row in range(len(rows))], rows)
    axes.tick_params(length=0)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    _title(axes, "Exact curvature?", "deep linear networks: relative error (largest layer)")


def _cost(axes: Axes, found: Glance) -> None:
    for name, seconds in found.cost.items():
        measured, said = found.slopes[name]
        axes.plot(
            list(seconds),
            [1e3 * value for value in seconds.values()],
            "o-",
            color=COLOURS[name],
            markersize=4,
            label=f"{name}: slope {measured:.2f}, theory {said:.2f}",
        )
    axes.set_xscale("log", base=4)
    axes.set_yscale("log")
    axes.set_xlabel("positions R")
    axes.set_ylabel("CPU ms of A")
    axes.legend(frameon=False, loc="upper left", fontsize=8)
    _title(axes, "Is reduce cheaper in R?", "linear layer, N = 16, P = 256; last 3 slopes")


def _update(axes: Axes, found: Glance) -> None:
    names = {"expand": "expand", "part": "expand, 1,024 rows", "reduce": "reduce"}
    for curve, by_batch in found.update.items():
        axes.plot(
            list(by_batch),
            list(by_batch.values()),
            marker="o",
            color=COLOURS[curve],
            label=names[curve],
            linestyle="--" if curve == "part" else "-",
        )
    axes.axhline(1.0, color=GREY, linewidth=1, linestyle=":")
    batches = list(next(iter(found.update.values())))
    axes.text(batches[0], 0.96, "NadamW", fontsize=8, va="top")
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [f"{batch:,}" for batch in batches])
    axes.minorticks_off()
    axes.set_ylim(0, 1.35 * max(max(ratios.values()) for ratios in found.update.values()))
    axes.set_xlabel("batch")
    axes.set_ylabel("CPU time over NadamW's")
    axes.legend(frameon=False, loc="upper right", fontsize=8)
    _title(axes, "What does an update cost?", "WRN-10-2, 16 x 16 images, all factors anew")


def _ends(axes: Axes, found: Glance) -> None:
    names = {"expand": "expand", "mixed": "reduce, kernels\nby expand's A", "reduce": "reduce"}
    order = [name for name in ("expand", "reduce", "mixed") if name in found.ends]
    for place, name in enumerate(order):
        losses = found.ends[name]
        mean = statistics.fmean(losses)
        axes.bar(place, mean, 0.6, color=COLOURS[name])
        axes.plot([place] * len(losses), losses, "o", color=palette.INK["light"], markersize=3)
        axes.annotate(f"{mean:.2f}", (place, max(losses)), xytext=(0, 4), textcoords="offset points", ha="center")
    axes.set_xticks(range(len(order)), [names[name] for name in order])
    axes.set_ylim(0, 1.18 * max(max(losses) for losses in found.ends.values()))
    axes.set_ylabel("validation loss, lower is better")
    _title(axes, "Is reduce a good optimizer?", "a ResNet of digits, power 3/4, grafted; dots: seeds")


def _damping(axes: Axes, found: Glance) -> None:
    places, labels = [], []
    for row, ((workload, form, approximation), width) in enumerate(found.damping.items()):
        place = -float(row)
        colour = COLOURS[approximation]
        axes.plot([width.low, width.high], [place, place], color=colour, linewidth=4, solid_capstyle="butt")
        axes.plot([width.best], [place], "o", color="white", markeredgecolor=colour, markersize=6)
        for end, is_open, mark in ((width.low, width.open_below, "<"), (width.high, width.open_above, ">")):
            if is_open:
                axes.plot([end], [place], mark, color=colour, markersize=7)
        places.append(place)
        scaling, mode = form.split(", ")[:2]
        labels.append(f"{workload}, {scaling},\n{mode}: {approximation}")
    axes.set_xscale("log")
    axes.set_yticks(places, labels, fontsize=7)
    axes.set_ylim(min(places) - 0.6, 0.6)
    axes.set_xlabel("damping (ring: best; arrow: end of runs)")
    _title(axes, "How exact must damping be?", f"within 10 % of the fewest steps, {found.seeds} seeds")
