"""Learning curves: the validation metric against steps and time, for a few algorithms or for many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from scoring.judge.columns import Floats
from scoring.judge.rules import Target
from scoring.show.palette import Style
from scoring.show.panel import Label, Line, Panel

POINTS = 100
FEW = 6  # more than this, and each gets a panel of its own
AXES = {"step": "steps", "time": "time (s)"}


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
            step, time, value = (part[name].to_numpy(dtype=float) for name in ("step", "time", target.column))
            found.append(Curve(names[trial_id], step, time, value))
    return sorted(found, key=lambda curve: curve.algorithm)


def median_curve(curves: Sequence[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
    """The median over studies, linear between evaluations, from where all have begun until the last has ended.

    A study that has ended keeps its value: if the line stopped where the first study hits, a submission that
    reached the target would look as if it had failed.
    """
    if len(curves) == 1:
        return curves[0]
    start, stop = max(x[0] for x, _ in curves), max(x[-1] for x, _ in curves)
    grid = np.unique(
        np.concatenate([np.linspace(start, stop, POINTS), [x[-1] for x, _ in curves if x[-1] >= start]])
    )
    return grid, np.median([np.interp(grid, x, y) for x, y in curves], axis=0)


def thinned(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """At most about POINTS points, first and last included."""
    if len(x) <= POINTS:
        return x, y
    keep = np.unique(np.linspace(0, len(x) - 1, POINTS).round().astype(int))
    return x[keep], y[keep]


def window(curves: Sequence[Curve], target: Target) -> tuple[float, float]:
    """Limits of the metric that show the race for the target, whatever a minority of runs does.

    The worse end is where the median run stands after a quarter of its evaluations, so that neither the steep start
    nor a run that diverged sets the axis; the better end holds every run's best value.
    """
    if not curves:
        return (target.value - 1.0, target.value + 1.0)
    sign = 1.0 if target.higher_is_better else -1.0
    quarter = sign * float(np.median([curve.value[len(curve.value) // 4] for curve in curves]))
    ends = sign * np.array([float(np.max(sign * curve.value)) * sign for curve in curves])
    goal = sign * target.value
    worst = min(quarter, goal, float(np.median(ends)))
    best = max(goal, float(ends.max()))
    margin = 0.06 * (best - worst) or 0.1 * abs(best) or 1.0
    low, high = sorted((sign * (worst - margin), sign * (best + margin)))
    return low, high


def extent(curves: Sequence[Curve], axis: str) -> tuple[float, float]:
    """Limits of steps or time: one run far longer than the others does not set them."""
    ends = np.array([getattr(curve, axis)[-1] for curve in curves])
    if not len(ends):
        return (0.0, 1.0)
    return (0.0, 1.02 * min(float(ends.max()), 2.0 * float(np.quantile(ends, 0.75))))


def _outside(line: Line, target: Target, frame: tuple[float, float]) -> list[Label]:
    """A word in the place of a line that never comes into the frame."""
    low, high = frame
    if ((line.y >= low) & (line.y <= high)).any():
        return []
    best = float(line.y.max() if target.higher_is_better else line.y.min())
    return [Label(0.0, (low + high) / 2, f" outside: {best:.4g}")]


def panels(
    workload: str, target: Target, curves: Sequence[Curve], look: Mapping[str, Style], axis: str
) -> list[Panel]:
    """One panel with names at the lines, or one for each algorithm with all others in grey behind it."""
    names = [name for name in look if any(curve.algorithm == name for curve in curves)]
    lines = {name: _lines(name, curves, look, axis) for name in names}
    arrow = "higher is better" if target.higher_is_better else "lower is better"
    x_range, y_range = extent(curves, axis), window(curves, target)
    goal = (target.value, f"target {target.value:g}")
    if len(names) <= FEW:
        panel = Panel(
            f"{workload}: {target.column} ({arrow})",
            x_range,
            y_range,
            x_label=AXES[axis],
            lines=[line for name in names for line in lines[name]],
            labels=[_label(name, lines[name][-1], x_range, look) for name in names],
            rules=[goal],
            dots=[dot for name in names for dot in _hits(name, curves, target, look, axis)],
            description=f"The target is {target.value:g}. {_said(curves, target, axis)}",
        )
        return [panel]
    behind = [Line(line.x, line.y, "grey", width=1.0, opacity=0.6) for name in names for line in lines[name][-1:]]
    return [
        Panel(
            name,
            x_range,
            y_range,
            lines=[Line(line.x, line.y, "c0", width=line.width, opacity=line.opacity) for line in lines[name]],
            rules=[(target.value, "")],
            background=behind,
            notes=_outside(lines[name][-1], target, y_range),
            dots=[Label(dot.x, dot.y, dot.text, "c0") for dot in _hits(name, curves, target, look, axis)],
            description=f"{workload}, {target.column} against {AXES[axis]}. "
            + _said([curve for curve in curves if curve.algorithm == name], target, axis),
            small=True,
        )
        for name in names
    ]


def _lines(name: str, curves: Sequence[Curve], look: Mapping[str, Style], axis: str) -> list[Line]:
    """The studies, thin, and behind them in the list (so on top) their median."""
    mine = [(getattr(curve, axis), curve.value) for curve in curves if curve.algorithm == name]
    style = look[name]
    found = []
    if len(mine) > 1:
        found = [Line(*thinned(x, y), style.colour, style.dash, 0.8, 0.45) for x, y in mine]
    return [*found, Line(*thinned(*median_curve(mine)), style.colour, style.dash, 2.2, name=name)]


def _label(name: str, line: Line, x_range: tuple[float, float], look: Mapping[str, Style]) -> Label:
    """The name of a line, as high as it leaves the frame or ends."""
    inside = line.y[line.x <= x_range[1]]
    height = float(inside[-1] if len(inside) else line.y[0])
    return Label(float(line.x[-1]), height, name, look[name].colour, look[name].dash)


def _hits(name: str, curves: Sequence[Curve], target: Target, look: Mapping[str, Style], axis: str) -> list[Label]:
    """A dot where a study reaches the target."""
    found = []
    for curve in curves:
        reached = curve.value >= target.value if target.higher_is_better else curve.value <= target.value
        if curve.algorithm == name and reached.any():
            first = int(np.argmax(reached))
            place = float(getattr(curve, axis)[first])
            text = f"{name} reaches the target at {place:,.0f} {AXES[axis]}"
            found.append(Label(place, float(curve.value[first]), text, look[name].colour))
    return found


def _said(curves: Sequence[Curve], target: Target, axis: str) -> str:
    """In words how many studies reach the target and how early."""
    parts = []
    for name in sorted({curve.algorithm for curve in curves}):
        mine = [curve for curve in curves if curve.algorithm == name]
        places = []
        for curve in mine:
            reached = curve.value >= target.value if target.higher_is_better else curve.value <= target.value
            if reached.any():
                places.append(float(getattr(curve, axis)[int(np.argmax(reached))]))
        first = f", first at {min(places):,.0f} {AXES[axis]}" if places else ""
        parts.append(f"{name} reaches it in {len(places)} of {len(mine)} studies{first}.")
    return " ".join(parts)
