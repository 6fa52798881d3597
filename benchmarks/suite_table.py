"""Writes the results of a suite: tables into docs/results.md, a figure, and a CSV file.

    python -m benchmarks.suite_table docs/results/suite

reads the archive that `python -m workloads.archive pack` wrote, or the directory of a suite, and replaces what
stands in docs/results.md between `<!-- suite: begin -->` and `<!-- suite: end -->`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks import suite_figure
from benchmarks.suite_results import COSTS, REFERENCE, Judged, judge, ratio_text
from commands import atomic, documents, errors
from commands.arguments import Parser
from commands.errors import tell
from scoring.frames import lookup, records
from scoring.show import text
from workloads.runner import experiment
from workloads.runner.jobs import CHECKOUT
from workloads.studies import archives, facts

BEGIN, END = "<!-- suite: begin -->", "<!-- suite: end -->"
NAMES = {"pytorch": "PyTorch", "jax": "JAX"}
SHOW = {"steps": text.steps, "time": text.seconds}


def main() -> int:
    """Runs with the command line's arguments; returns the exit code."""
    parser = Parser("python -m benchmarks.suite_table", __doc__)
    parser.add_argument("source", help="an archive, or the directory of a suite")
    parser.add_argument("--document", default="docs/results.md", help="what to write the tables into")
    parser.add_argument("--figure", default="docs/figures/suite.png")
    parser.add_argument("--csv", default="docs/results/suite/table.csv")
    parser.add_argument("--as_measured", action="store_true", help="paces with the speed the machine had; prints")
    parser.add_argument("--studies", type=int, default=3, help="how many are due: a missing one is a miss")

    def command() -> None:
        given = parser.parse_args()
        document, figure, csv = (CHECKOUT / name for name in (given.document, given.figure, given.csv))
        with tempfile.TemporaryDirectory() as temporary:
            source = _directory(Path(given.source), Path(temporary))
            judged = judge(source / "race", given.studies, one_speed=not given.as_measured)
            chosen = archives.chosen_records(Path(given.source))
        if given.as_measured:
            for one in judged:
                for table in (summary_table(one, f"{one.group.title}: {one.framework}"), pace_table(one)):
                    tell(text.markdown(table))
            return
        link = figure.relative_to(document.parent) if figure.is_relative_to(document.parent) else figure
        notes = experiment.read_json(Path(given.source) / "suite.json") or {}
        documents.insert(document, BEGIN, END, page(judged, chosen, notes, str(link)))
        figure.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_bytes(figure, suite_figure.draw(judged))
        csv.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(csv, rows(judged).to_csv(index=False, lineterminator="\n"))
        tell(f"Written: {document}, {figure}, {csv}")

    return errors.run(command)


def _directory(source: Path, temporary: Path) -> Path:
    if (source / "race").is_dir():
        return source
    archives.unpack(source, temporary)
    return temporary


def page(judged: list[Judged], chosen: archives.Chosen, notes: Mapping[str, object], figure: str) -> str:
    """All tables as Markdown.

    Args:
        judged: what is shown, in this order.
        chosen: the records of what tuning chose.
        notes: the suite's `suite.json`.
        figure: the path of the picture, from the document.
    """
    parts = [f"![Steps and time to target relative to NadamW]({figure})", NOTE, *_given(notes)]
    for one in judged:
        title = f"{one.group.title}: {NAMES[one.framework]}"
        parts.append(text.markdown(summary_table(one, title), level=3))
        parts += [text.markdown(cost_table(one, cost), level=4) for cost in COSTS]
        parts.append(text.markdown(pace_table(one), level=4))
    parts.append(text.markdown(edges_table(chosen), level=3))
    return "\n\n".join(parts)


def _given(notes: Mapping[str, object]) -> list[str]:
    """What each side was given, in a sentence."""
    if not notes:
        return []
    seeds = notes["study_seeds"]
    raced_on = ", ".join(map(str, seeds)) if isinstance(seeds, list) else seeds
    shorter = notes.get("points_at_shorter_horizons")
    further = f" and {shorter} more at shorter horizons" if shorter else ""
    return [
        f"Each submission was given {notes['points_tuned']} points of its own space{further} on every base "
        f"workload, trained on seed {notes['tuning_seed']}, the horizon among the tuned values; its best "
        f"{notes['points_raced']} were raced on the seeds {raced_on}, "
        f"{notes['processes_at_a_time']} processes on {notes['cores']} cores. Held-out variants race the best "
        "point of their base workload, and JAX the points found in PyTorch."
    ]


NOTE = (
    "Ratios are to NadamW, below 1 is better: geometric means over the workloads on which a submission's median "
    "study reached the target, with 95 % bootstrap intervals over studies; how many workloads enter stands beside. "
    "Where NadamW's median study missed, it is taken to have needed its whole step hint, which favours NadamW: "
    "such means have a ≤ before them; resamples count alike. An interval that ends in a miss has resamples in "
    "which the submission missed one of its workloads. A mean over fewer workloads leaves out what was missed; "
    "AlgoPerf's score (on this repository's own logs, relative to the best submission of the table) counts a miss "
    "as nothing."
)


def summary_table(one: Judged, title: str) -> text.Table:
    """A line per submission: mean ratios, scores, time per step."""
    count = len(one.group.workloads)
    headers = [
        "submission",
        "steps",
        "workloads",
        "time",
        "workloads",
        "score by steps",
        "score by time",
        "ms/step",
    ]
    table = text.Table(title, headers)
    pace = one.pace.div(one.pace.loc[REFERENCE])
    for name in one.submissions:
        row = [name]
        for cost in COSTS:
            mean = lookup(one.means[cost], name)
            silent = np.isnan(mean["low"]) or name == REFERENCE
            interval = "" if silent else f" [{text.between(mean['low'], mean['high'])}]"
            row += [f"{ratio_text(mean)}{interval}", f"{mean['workloads']:.0f} of {count}"]
        for cost in COSTS:
            board = lookup(one.ranking[cost], name)
            row.append(f"{board['score']:.2f} [{text.between(board['score_low'], board['score_high'])}]")
        table.rows.append([*row, text.ratio(float(np.exp(np.log(pace.loc[name]).mean())))])
    table.note = (
        f"Workloads: {', '.join(one.group.workloads)}. {one.studies} studies of each; the last column is the "
        "geometric mean ratio of the median time per step."
    )
    provisional = [name for name in one.group.workloads if facts.record(name)["provisional"]]
    if provisional:
        table.note += f" Against targets that are provisional: {', '.join(provisional)}."
    return table


def cost_table(one: Judged, cost: str) -> text.Table:
    """Median (least to most) over studies by submission and workload."""
    caption = {"steps": "Steps to target", "time": "Time to target"}[cost]
    cells = one.cells[cost].set_index(["submission", "workload"])
    table = text.Table(caption, ["submission", *one.group.workloads])
    for name in one.submissions:
        row = [name]
        for workload in one.group.workloads:
            cell = lookup(cells, (name, workload))
            show = SHOW[cost]
            shown = text.spread(cell["cost"], cell["low"], cell["high"], show)
            if not cell["present"]:
                shown = text.NOTHING
            elif cell["hits"] < one.studies:
                shown += f", {cell['hits']} of {one.studies}"
            row.append(shown)
        table.rows.append(row)
    table.note = "Medians over studies (least to most); where not all studies reached the target, how many did."
    if cost == "time":
        table.note += _of_times(one)
    return table


def _of_times(one: Judged) -> str:
    """What the times are, as the end of a note."""
    rest = [name for name in one.group.workloads if name not in one.alone]
    parts = []
    if one.alone:
        parts.append(
            f"{', '.join(one.alone)}: the race's steps, at the pace of the best point, measured one trial at a "
            "time (the stage `pace`), at one speed of the machine, which evaluations tell"
        )
    if rest:
        parts.append(f"{', '.join(rest)}: as the race took them, beside other work")
    return f" Times are seconds of one core. Of {'; of '.join(parts)}."


def pace_table(one: Judged) -> text.Table:
    """Median milliseconds per step by submission and workload, compilation left out."""
    table = text.Table("Milliseconds per step", ["submission", *one.group.workloads])
    for name in one.submissions:
        table.rows.append(
            [name, *(text.milliseconds(one.pace_of(name, workload)) for workload in one.group.workloads)]
        )
    if one.framework == "jax":
        table.note = (
            "From the first evaluation on, behind the first compilation. K-FAC compiles a second program later, "
            "for steps without statistics: that is in these milliseconds, and in the ratio of the first table."
        )
    return table


def edges_table(chosen: archives.Chosen) -> text.Table:
    """The best point of each submission on each workload that lies at an edge of its space."""
    table = text.Table("Best points at an edge of the search space", ["workload", "submission", "at an edge"])
    table.left = (0, 1, 2)
    tuned = 0
    for workload, by_name in chosen.items():
        for name, one in by_name.items():
            tuned += 1
            edges = one["at_an_edge"].get(f"trial_{one['chosen'][0]}", [])
            if edges:
                table.rows.append([workload, name, ", ".join(edges)])
    table.note = (
        f"{len(table.rows)} of {tuned} best points. An edge is the outer tenth of a range, as it is drawn, or the "
        "least or greatest of three or more feasible points: a wider space might hold a better point."
    )
    return table


def rows(judged: list[Judged]) -> pd.DataFrame:
    """One row per framework, workload and submission, numbers only; a miss is infinite."""
    found = []
    for one in judged:
        for cell, time in zip(records(one.cells["steps"]), records(one.cells["time"]), strict=True):
            found.append(
                {
                    "framework": one.framework,
                    "group": one.group.key,
                    "workload": cell.workload,
                    "submission": cell.submission,
                    "studies": cell.present,
                    "reached": cell.hits,
                    "steps": cell.cost,
                    "steps_low": cell.low,
                    "steps_high": cell.high,
                    "seconds": time.cost,
                    "seconds_low": time.low,
                    "seconds_high": time.high,
                    "ms_per_step": one.pace_of(cell.submission, cell.workload),
                }
            )
    return pd.DataFrame(found)


if __name__ == "__main__":
    sys.exit(main())
