"""The table of `docs/official.md`: its rows, its head, and what becomes of the rows it has already."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.official.batches import RECIPES
from benchmarks.official.record import POINT, STEPS, SUBMISSIONS, Failure, Record
from commands import atomic
from commands.frameworks import FRAMEWORKS
from submissions.registry import is_kfac
from workloads.algoperf import VARIANTS, WORKLOADS

BEGIN = "<!-- begin: python -m benchmarks.official.table -->"
END = "<!-- end -->"
PACKAGES = ("algoperf", "torch", "torchvision", "jax", "flax", "optax", "tensorflow", "numpy")
HEADER = (
    "| workload | framework | submission | steps | plain s | statistics s | of it eigh s | evaluation s "
    "| checkpoint s | loss | covered % | GᵀA = dL/dW | resumes | peak GiB |\n" + "|---" * 14 + "|"
)
Case = tuple[str, str, str]  # workload, framework, submission
ORDER: tuple[Case, ...] = tuple(
    (workload, framework, submission)
    for workload in (*WORKLOADS, *VARIANTS)
    for framework in FRAMEWORKS
    for submission in SUBMISSIONS
)


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


def versions() -> str:
    """What the cases are run with here."""
    found = {name: _version(name) for name in PACKAGES}
    packages = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    return f"Python {platform.python_version()}, {packages}; one thread of a CPU."


def rows_of(text: str) -> dict[Case, str]:
    """The rows between the markers.

    Raises:
        ValueError: a marker is missing.
    """
    rows = {}
    for line in _split(text)[1].splitlines():
        cells = tuple(cell.strip() for cell in line.split("|")[1:4])
        if len(cells) == 3 and cells[1] in FRAMEWORKS:
            rows[cells] = line
    return rows


def kept(text: str, here: str, new: Iterable[Case]) -> dict[Case, str]:
    """The rows that stay: those of other cases.

    Args:
        text: of the file.
        here: the versions that the new cases are run with.
        new: the new cases.

    Raises:
        ValueError: a marker is missing, or the rows that would stay were made with other versions, so that one head
            could not be true of all.
    """
    old = {case: line for case, line in rows_of(text).items() if case not in set(new)}
    if old and here not in _split(text)[1]:
        raise ValueError(f"the rows that would stay were not made with {here} Run their cases, too.")
    return old


def insert(text: str, rows: Mapping[Case, str], here: str) -> str:
    """The text with a table of these rows in place of what stood between the markers.

    Raises:
        ValueError: a marker is missing.
    """
    before, _, after = _split(text)
    return f"{before}{BEGIN}\n\n{describe(rows, here)}\n\n{END}{after}"


def describe(rows: Mapping[Case, str], here: str) -> str:
    """The table with what one must know to read it."""
    cuts = "\n".join(f"- {name}: {recipe.cut}" for name, recipe in RECIPES.items())
    sizes = ", ".join(f"{name} {recipe.examples}" for name, recipe in RECIPES.items())
    return "\n".join(
        [
            here,
            f"{STEPS} steps on one repeated batch at the point {json.dumps(POINT)} and else the submissions' own.",
            "Where it says so, K-FAC's factors were cut into diagonal blocks of at most that size",
            "(max_factor_dim): it shortens the decompositions. Unoptimized programs",
            "(JAX_DISABLE_MOST_OPTIMIZATIONS=1) compile sooner, and their times say nothing.",
            "",
            HEADER,
            *(rows[case] for case in ORDER if case in rows),
            "",
            f"Cut, beside the batch ({sizes} examples):",
            "",
            cuts,
        ]
    )


def raw_records(path: Path) -> dict[Case, Record]:
    """The records kept in a file of JSON lines; none if there is no such file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    records = [Record(**json.loads(line)) for line in lines]
    return {case_of(record): record for record in records}


def write_raw_records(path: Path, records: Sequence[Record]) -> None:
    """Puts records into a file of JSON lines, in place of earlier ones of the same cases.

    Of the optimizer's figures for single layers only those stay that `conditions` asks for: there are many.
    """
    merged = raw_records(path)
    for record in records:
        counters = {
            name: value
            for name, value in record.counters.items()
            if "/" not in name or (value and name.endswith(("/refreshes", "/skipped")))
        }
        merged[case_of(record)] = dataclasses.replace(record, counters=counters)
    lines = [json.dumps(dataclasses.asdict(merged[case]), ensure_ascii=False) for case in ORDER if case in merged]
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, "".join(f"{line}\n" for line in lines))


def _split(text: str) -> tuple[str, str, str]:
    if BEGIN not in text or END not in text:
        raise ValueError(f"the file has no lines {BEGIN!r} and {END!r}")
    before, rest = text.split(BEGIN, 1)
    inside, after = rest.split(END, 1)
    return before, inside, after


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
