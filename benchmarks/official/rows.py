"""The tables of `docs/official.md`: their rows and heads, and what becomes of the rows there are already.

One block of tables for each version of AlgoPerf, between two marker lines; in it one table for each environment
that cases were run in. A new row of a case takes the place of its older one, whatever the environment of that was;
all others stay where they are.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.official.batches import OTHER_CUTS, RECIPES, recipe_name
from benchmarks.official.conditions import COMPILED_STATISTICS
from benchmarks.official.record import POINT, STEPS, SUBMISSIONS, Failure, Record
from commands import atomic
from commands.frameworks import FRAMEWORKS
from submissions.registry import is_kfac
from workloads.algoperf import VARIANTS, WORKLOADS

BEGIN = "<!-- begin: python -m benchmarks.official.table, AlgoPerf {} -->"
END = "<!-- end -->"
ENVIRONMENT = "Python "  # how the line begins that stands above a table
VERSIONS = ("1.0", "0.6")
HEADER = (
    "| workload | framework | submission | steps | plain s | statistics s | of it eigh s | evaluation s "
    "| checkpoint s | loss | covered % | GᵀA = dL/dW | resumes | peak GiB |\n" + "|---" * 14 + "|"
)
_STATISTICS = {True: ", statistics too", False: ", statistics not"}
Case = tuple[str, str, str]  # workload, framework, submission
ORDER: tuple[Case, ...] = tuple(
    (workload, framework, submission)
    for workload in (*WORKLOADS, *OTHER_CUTS, *VARIANTS)
    for framework in FRAMEWORKS
    for submission in SUBMISSIONS
)


class Row(NamedTuple):
    """A row in the document.

    Attributes:
        environment: versions of all that it was made with.
        line: of the table.
    """

    environment: str
    line: str


def case_of(result: Record | Failure) -> Case:
    """Which row it belongs in."""
    return result.workload, result.framework, result.submission


def row(result: Record | Failure) -> str:
    """A line of the table."""
    head = f"| {result.workload} | {result.framework} | {result.submission} "
    if isinstance(result, Failure):
        return f"{head}| failed: {result.reason.replace('|', '/')[:160]} " + "| " * 10 + "|"
    seconds = result.seconds

    def cell(key: str) -> str:
        return f"{seconds[key]:.2f}" if key in seconds else ""

    errors = result.gradient_errors
    kfac = is_kfac(result.submission, result.framework)
    coverage = f"{100 * result.covered / result.parameters:.1f}" if kfac else ""
    cells = [
        str(result.steps)
        + (", compiled" if result.compiled else "")
        + (_STATISTICS[result.note == COMPILED_STATISTICS] if result.compiled and result.note else "")
        + (", unoptimized" if result.unoptimized else "")
        + (f", blocks of {result.max_factor_dim}" if kfac and result.max_factor_dim is not None else ""),
        cell("plain"),
        cell("statistics"),
        cell("decompositions"),
        cell("evaluation"),
        cell("checkpoint"),
        f"{result.losses[0]:.4g} → {result.losses[result.steps - 1]:.4g}",
        coverage,
        f"{len(errors)}: {max(errors.values()):.0e}" if errors else "",
        "yes" if result.resumed else "NO",
        f"{result.peak_rss_mb / 1024:.1f}",
    ]
    return head + "".join(f"| {text} " for text in cells) + "|"


def rows_of(text: str, algoperf: str) -> dict[Case, Row]:
    """The rows between the markers of a version of AlgoPerf.

    Raises:
        ValueError: a marker is missing, or a row stands below no environment.
    """
    rows: dict[Case, Row] = {}
    environment = ""
    for line in _split(text, algoperf)[1].splitlines():
        cells = tuple(cell.strip() for cell in line.split("|")[1:4])
        if line.startswith(ENVIRONMENT):
            environment = line
        elif len(cells) == 3 and cells[1] in FRAMEWORKS:
            if not environment:
                raise ValueError(f"no line above says what was installed when the row was made: {line[:80]}")
            rows[cells] = Row(environment, line)
    return rows


def insert(text: str, algoperf: str, rows: Mapping[Case, Row]) -> str:
    """The text with tables of these rows in place of what stood between the markers of a version of AlgoPerf.

    Raises:
        ValueError: a marker is missing.
    """
    before, _, after = _split(text, algoperf)
    return f"{before}{BEGIN.format(algoperf)}\n\n{describe(rows)}\n\n{END}{after}"


def describe(rows: Mapping[Case, Row]) -> str:
    """The tables with what one must know to read them."""
    used = {recipe_name(workload) for workload, _, _ in rows}
    recipes = {name: recipe for name, recipe in RECIPES.items() if name in used}
    cuts = "\n".join(f"- {name}: {recipe.cut}" for name, recipe in recipes.items())
    sizes = ", ".join(f"{name} {recipe.examples}" for name, recipe in recipes.items())
    tables = []
    for environment in dict.fromkeys(rows[case].environment for case in ORDER if case in rows):
        lines = [rows[case].line for case in ORDER if case in rows and rows[case].environment == environment]
        tables += [environment, "", HEADER, *lines, ""]
    return "\n".join(
        [
            f"{STEPS} steps on one repeated batch at the point {json.dumps(POINT)} and else the submissions' own.",
            "Where it says so, K-FAC's factors were cut into diagonal blocks of at most that size",
            "(max_factor_dim): it shortens the decompositions. Unoptimized programs",
            "(JAX_DISABLE_MOST_OPTIMIZATIONS=1) compile sooner, and their times say nothing.",
            "",
            *tables,
            f"Cut, beside the batch ({sizes} examples):",
            "",
            cuts,
        ]
    )


def raw_records(path: Path) -> dict[tuple[str, Case], Record]:
    """The records kept in a file of JSON lines, by AlgoPerf's version and case; none if there is no such file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    records = [Record(**json.loads(line)) for line in lines]
    return {(record.algoperf, case_of(record)): record for record in records}


def write_raw_records(path: Path, records: Sequence[Record]) -> None:
    """Puts records into a file of JSON lines, in place of earlier ones of the same cases and AlgoPerf's version.

    Of the optimizer's figures for single layers only those stay that `conditions` asks for: there are many.
    """
    merged = raw_records(path)
    for record in records:
        counters = {
            name: value
            for name, value in record.counters.items()
            if "/" not in name or (value and name.endswith(("/refreshes", "/skipped")))
        }
        merged[record.algoperf, case_of(record)] = dataclasses.replace(record, counters=counters)
    keys = [(version, case) for version in VERSIONS for case in ORDER]
    lines = [json.dumps(dataclasses.asdict(merged[key]), ensure_ascii=False) for key in keys if key in merged]
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, "".join(f"{line}\n" for line in lines))


def _split(text: str, algoperf: str) -> tuple[str, str, str]:
    begin = BEGIN.format(algoperf)
    before, found, rest = text.partition(begin)
    inside, ended, after = rest.partition(END)
    if not (found and ended):
        raise ValueError(f"the file has no lines {begin!r} and, below it, {END!r}")
    return before, inside, after
