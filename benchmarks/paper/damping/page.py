"""The page: what was run of the grid, the curves and their widths, and what a factor wrong by R does."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence

from benchmarks.kept import Book
from benchmarks.paper.damping import grid, reading, scale, training
from benchmarks.paper.damping.grid import APPROXIMATIONS, RATES, SEEDS, WHOLE, Case, Form
from benchmarks.paper.damping.reading import Found, Outcome, Width
from benchmarks.paper.damping.training import Gained

HEAD = """# Damping

Open question 3 of arXiv 2311.00636. Written by `python -m benchmarks.paper damping` from
[the kept results](../results/damping.jsonl). PyTorch, validation loss, horizons of {horizon:g} of the step hint
({steps}).

![Steps to a common loss, and loss at the end, over damping](../figures/damping.png)
"""
HOW = """
- All K-FACs train at one point but for what a panel says: statistics at every 2nd step, a refresh at every 6th, no
  noise floor, learning rate {rate:g} times one of {rates}. Each curve was given the same three rates, on a seed
  used for nothing else, at damping {tuned:g}, and keeps the one that ended lowest; so a width is that of a person
  who does not tune the rate again when the damping changes. NadamW is at its own point, and is a yardstick only.
- *Not grafted* the length of a direction goes with the inverse of the damping, and no common rate would do. Its
  directions are multiplied by one number, the same at all steps and for all layers: such that at step {gain} of a
  grafted run they are as long as NadamW's updates (geometric mean over layers), at each damping. The rest of the
  network keeps the learning rate.
- The common loss of a workload is {margin:g} times the least mean loss at the end among its points. NadamW's end
  would be no target: after so few steps it is so high that K-FAC is there early. Steps are along a straight line
  between evaluations, which are {every} steps apart; *missed* where it was not reached within the horizon.
- The width is the range of damping within 10 % of the fewest steps of a curve, along straight lines of steps over
  log damping, of each seed's own curve: median (least to most), in powers of ten. "≥" where it reaches an end of
  what was run. The best damping is that of the median steps.
- Three seeds ({seeds}), the same initial weights and batches for all; {found}.
"""


def page(book: Book[Case], gains: Book[Gained]) -> str:
    """The whole page."""
    found = read(book, gains)
    steps = ", ".join(f"{workload} {grid.steps_of(workload)}" for workload in found)
    lines = [
        HEAD.format(horizon=grid.HORIZON, steps=steps),
        *ran(found),
        HOW.format(
            rate=grid.POINT["learning_rate"],
            rates=", ".join(f"{rate:.2g}" for rate in RATES),
            tuned=grid.TUNED_AT,
            gain=training.GAIN_STEP,
            every=training.EVERY,
            margin=reading.MARGIN,
            seeds=", ".join(map(str, SEEDS)),
            found=_seeds(found),
        ),
        *curves(found),
        *wrong_scale(),
    ]
    return "\n".join([*lines, ""])


def read(book: Book[Case], gains: Book[Gained]) -> dict[str, Found]:
    """What is kept of each workload of the grid."""
    return {part.workload: reading.found_of(part.workload, book, gains) for part in WHOLE}


def ran(found: Mapping[str, Found]) -> Iterator[str]:
    """Which part of the grid there is, and what the whole would take."""
    points = sum(len(part.points()) for part in WHOLE)
    done = sum(len(one.outcomes) for one in found.values())
    workloads = [workload for workload, one in found.items() if one.outcomes]
    total = sum(training.expected(WHOLE).values())
    hours = training.expected_seconds(WHOLE) / 3600
    yield (
        f"**What was run.** {done} of the {points} points of the grid (a curve at a damping), on "
        f"{len(workloads)} of {len(found)} workloads"
        f"{' (' + ', '.join(workloads) + ')' if workloads else ''}. The whole grid, "
        "dampings 1e-6 to 1 by powers of ten x (expand, reduce) x (relative, absolute) x (grafted, not) x "
        f"(inverse, power 3/4), and the polar, is {total:,} runs, about {hours:.0f} h of CPU time: "
        "`python -m benchmarks.paper damping --whole`."
    )


def curves(found: Mapping[str, Found]) -> Iterator[str]:
    """Tables of steps and losses by workload, and of widths."""
    yield "## Curves"
    yield ""
    for workload, one in found.items():
        if one.target is None:
            continue
        there, horizon = shown(one), grid.steps_of(workload)
        dampings = sorted({value for _, _, outcomes in there for value in outcomes})
        yield f"### {workload}"
        yield ""
        yield (
            f"Steps to a loss of {one.target:.3f}, of {horizon}: median (least to most). NadamW ends at "
            f"{'-' if one.nadamw is None else format(one.nadamw, '.3f')}."
        )
        yield ""
        by_damping = [f"{value:.0e}" for value in dampings]
        yield from _table(
            ["rate", *by_damping],
            [
                (form, name, [_rate(outcomes), *(_steps(outcomes.get(d)) for d in dampings)])
                for form, name, outcomes in there
            ],
        )
        yield "Validation loss at the end: mean (least to most)."
        yield ""
        yield from _table(
            by_damping,
            [(form, name, [_losses(outcomes.get(d)) for d in dampings]) for form, name, outcomes in there],
        )
        yield from _table(
            ["best damping", "its steps", "width, powers of ten", "of them from", "to"],
            [(form, name, _width(outcomes)) for form, name, outcomes in there],
        )


def _table(head: Sequence[str], curves: Iterable[tuple[Form, str, list[str]]]) -> Iterator[str]:
    """A line for each curve, by form and approximation."""
    yield f"| form | approximation | {' | '.join(head)} |"
    yield "|---|---|" + "---|" * len(head)
    for form, approximation, cells in curves:
        yield f"| {form.title} | {approximation} | {' | '.join(cells)} |"
    yield ""


def _seeds(found: Mapping[str, Found]) -> str:
    counts = {workload: len(one.seeds) for workload, one in found.items()}
    short = [f"{workload} {count}" for workload, count in counts.items() if 0 < count < len(SEEDS)]
    if not short:
        return "all three are in"
    return f"**not all are in yet, only {', '.join(short)}, which is too few for a verdict**"


def shown(one: Found) -> list[tuple[Form, str, dict[float, Outcome]]]:
    """The curves of a workload of which there is a point, with its outcomes by damping."""
    forms = dict.fromkeys(form for part in WHOLE for form in part.forms)
    found = [(form, name, one.curve(form, name)) for form in forms for name in APPROXIMATIONS]
    return [curve for curve in found if curve[2]]


def wrong_scale() -> Iterator[str]:
    """The float64 comparison."""
    yield "## A factor wrong by R"
    yield ""
    yield (
        f"A tiny network over R = {scale.POSITIONS} positions, {scale.STEPS} grafted steps in float64, damping "
        f"{scale.DAMPING:g}. *Off*: how far the weights end from those of the right factors, relative to how far "
        "these moved. *Shifted*: how far from those of the right factors at the damping divided by the mistake c. "
        "**0** is below 1e-10."
    )
    yield ""
    yield "| scaling | approximation | wrong factor | relative: off | absolute: off | absolute: shifted |"
    yield "|---|---|---|---|---|---|"
    for scaling in scale.SCALINGS:
        for approximation in APPROXIMATIONS:
            for mistake in scale.MISTAKES:
                relative = scale.seen(scaling, "relative", mistake, approximation)
                absolute = scale.seen(scaling, "absolute", mistake, approximation)
                cells = (_error(relative.off), _error(absolute.off), _error(absolute.shifted))
                factor, power = mistake.split(", ")
                yield f"| {scaling} | {approximation} | {factor} times {power} | {' | '.join(cells)} |"
    yield ""
    yield (
        "With relative damping a grafted K-FAC does not see the mistake at all: a wrong R hides, and shows only "
        "where the length of a direction counts, or the marginal likelihood is computed. With absolute damping it "
        "is exactly a damping divided by c: a curve over absolute damping moves along the axis by c (to the right "
        "for a factor too large) and keeps its shape and width. A person who tunes an absolute damping does not "
        "notice; one who takes a damping from elsewhere is off by c, by R² for reduce's classic bug (sums of "
        "inputs and gradients both). No workload was trained with a wrong factor: these would be the same runs, at "
        "other dampings."
    )


def _steps(one: Outcome | None) -> str:
    if one is None:
        return "-"
    if not math.isfinite(statistics.median(one.steps)):
        hits = sum(map(math.isfinite, one.steps))
        return f"missed{f' ({hits} of {len(one.steps)})' if hits else ''}"
    return f"{statistics.median(one.steps):.0f} ({_number(min(one.steps))} to {_number(max(one.steps))})"


def _number(value: float) -> str:
    return f"{value:.0f}" if math.isfinite(value) else "missed"


def _losses(one: Outcome | None) -> str:
    if one is None:
        return "-"
    if not all(map(math.isfinite, one.losses)):
        return "diverged"
    return f"{statistics.fmean(one.losses):.3f} ({min(one.losses):.3f} to {max(one.losses):.3f})"


def _rate(outcomes: dict[float, Outcome]) -> str:
    one = next(iter(outcomes.values()))
    return f"{one.rate:.2g}{' (edge)' if one.at_an_edge else ''}"


def _width(outcomes: dict[float, Outcome]) -> list[str]:
    medians = {value: statistics.median(one.steps) for value, one in outcomes.items()}
    whole, each = reading.width(medians), reading.widths(outcomes)
    if whole is None or len(each) < len(next(iter(outcomes.values())).steps):
        return ["-", "missed", "-", "-", "-"]
    decades = sorted(each, key=lambda one: one.decades)
    middle = decades[len(decades) // 2]
    spread = f"{_decades(middle)} ({_decades(decades[0])} to {_decades(decades[-1])})"
    low = f"{'≤ ' if whole.open_below else ''}{whole.low:.0e}"
    high = f"{'≥ ' if whole.open_above else ''}{whole.high:.0e}"
    return [f"{whole.best:.0e}", f"{medians[whole.best]:.0f}", spread, low, high]


def _decades(one: Width) -> str:
    return f"{'≥ ' if one.open_below or one.open_above else ''}{one.decades:.1f}"


def _error(value: float) -> str:
    return "**0**" if value < 1e-10 else f"{value:.2g}"
