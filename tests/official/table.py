"""Runs cases one after the other and writes the table of `docs/official.md`.

    python -m tests.official.table --out=docs/official.md
    python -m tests.official.table --workloads=ogbg,wmt --submissions=kfac_reduce    # prints only

With --records, finished cases are kept in a folder and not run again; --finished runs no others. The table goes
between the two marker lines of the file, everything else in it stays.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.official import batches, environment
from tests.official.record import POINT, STEPS, SUBMISSIONS, Record, exists
from tests.official.variants import VARIANTS

BEGIN = "<!-- begin: python -m tests.official.table -->"
END = "<!-- end -->"
TIMEOUT = 6000  # seconds for a case; the longest of the table took 2320, two at a time
PACKAGES = ("algoperf", "torch", "torchvision", "jax", "flax", "optax", "tensorflow", "numpy")


@dataclasses.dataclass
class Failure:
    """A case that gave no record."""

    workload: str
    framework: str
    submission: str
    reason: str


def case_label(
    workload: str, framework: str, submission: str, data_parallel: bool = False, devices: int = 1
) -> str:
    """The name of a case's record."""
    label = f"{workload}-{framework}-{submission}" + ("-data_parallel" if data_parallel else "")
    return label + (f"-{devices}_devices" if devices > 1 else "")


def run_case(
    workload: str,
    framework: str,
    submission: str,
    records: Path | None = None,
    data_parallel: bool = False,
    max_factor_dim: int | None = None,
    devices: int = 1,
) -> Record | Failure:
    """One case in a process of its own, or its record from an earlier run."""
    label = case_label(workload, framework, submission, data_parallel, devices)
    kept = None if records is None else records / f"{label}.json"
    if kept is not None and kept.exists():
        return Record(**json.loads(kept.read_text()))
    command = [sys.executable, "-m", "tests.official.case"]
    command += [f"--workload={workload}", f"--framework={framework}", f"--submission={submission}"]
    command += ["--data_parallel"] if data_parallel else []
    command += [f"--max_factor_dim={max_factor_dim}"] if max_factor_dim is not None else []
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    environ["JAX_TRACEBACK_FILTERING"] = "off"  # so that the last line is the error's
    if devices > 1:
        environ["JAX_NUM_CPU_DEVICES"] = str(devices)
    # A checkout is enough; the working directory is its root.
    root = Path(__file__).resolve().parents[2]
    try:
        done = subprocess.run(
            command, cwd=root, env=environ, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        return Failure(workload, framework, submission, f"not finished after {TIMEOUT} s")
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        if kept is not None:
            kept.with_suffix(".log").write_text(done.stderr[-20_000:])
        tail = [line for line in done.stderr.strip().splitlines() if line.strip()]
        return Failure(workload, framework, submission, tail[-1] if tail else f"exit code {done.returncode}")
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(lines[-1])
    return Record(**json.loads(lines[-1]))


def row(result: Record | Failure) -> str:
    """A line of the table."""
    head = f"| {result.workload} | {result.framework} | {result.submission} "
    if isinstance(result, Failure):
        return f"{head}| failed: {result.reason.replace('|', '/')[:160]} " + "| " * 8 + "|"
    seconds = result.seconds

    def cell(key: str) -> str:
        return f"{seconds[key]:.2f}" if key in seconds else ""

    errors = result.gradient_errors
    kfac = result.submission.startswith("kfac")
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


HEADER = (
    "| workload | framework | submission | steps | plain s | statistics s | of it eigh s | evaluation s "
    "| checkpoint s | loss | covered % | GᵀA = dL/dW | resumes | peak GiB |\n" + "|---" * 14 + "|"
)


def describe(results: Sequence[Record | Failure]) -> str:
    """The table with what one must know to read it."""
    versions = ", ".join(f"{name} {_version(name)}" for name in PACKAGES if _version(name))
    cuts = "\n".join(f"- {name}: {batches.CUTS.get(name, 'nothing')}" for name in batches.BASES)
    sizes = ", ".join(f"{name} {size}" for name, size in batches.SIZES.items())
    return "\n".join(
        [
            f"Python {platform.python_version()}, {versions}; one thread of a CPU.",
            f"{STEPS} steps on one repeated batch at the point {json.dumps(POINT)} and else the submissions' own.",
            "Where it says so, K-FAC's factors were cut into diagonal blocks of at most that size",
            "(max_factor_dim): it shortens the decompositions. Unoptimized programs",
            "(JAX_DISABLE_MOST_OPTIMIZATIONS=1) compile sooner, and their times say nothing.",
            "",
            HEADER,
            *map(row, results),
            "",
            f"Cut, beside the batch ({sizes} examples):",
            "",
            cuts,
        ]
    )


def insert(text: str, table: str) -> str:
    """The text with what stood between the markers replaced.

    Raises:
      ValueError: a marker is missing.
    """
    if BEGIN not in text or END not in text:
        raise ValueError(f"the file has no lines {BEGIN!r} and {END!r}")
    before, rest = text.split(BEGIN, 1)
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.split(END, 1)[1]}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the cases; returns the exit code: 1 if one failed."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.official.table", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", help="a Markdown file with the marker lines; default: print only")
    parser.add_argument(
        "--workloads", default=",".join(batches.BASES), help="comma-separated; 'variants' for those"
    )
    parser.add_argument("--frameworks", default=",".join(environment.FRAMEWORKS), help="comma-separated")
    parser.add_argument("--submissions", default=",".join(SUBMISSIONS), help="comma-separated")
    parser.add_argument("--records", help="folder that keeps finished cases")
    parser.add_argument("--max_factor_dim", type=int, help="of K-FAC's cases; default: the submissions' own")
    parser.add_argument("--finished", action="store_true", help="the table of what is in --records; runs nothing")
    args = parser.parse_args(argv)
    if not environment.INSTALLED:
        print(f"error: {environment.REASON}.", file=sys.stderr)
        return 2
    names = [name for word in args.workloads.split(",") for name in (VARIANTS if word == "variants" else [word])]
    try:
        for name in names:
            batches.base_of(name)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results = []
    with tempfile.TemporaryDirectory() as folder:
        records = Path(args.records or folder)
        records.mkdir(parents=True, exist_ok=True)
        for name in names:
            for framework in args.frameworks.split(","):
                for submission in args.submissions.split(","):
                    finished = (records / f"{case_label(name, framework, submission)}.json").exists()
                    if exists(submission, framework) and (finished or not args.finished):
                        results.append(
                            run_case(name, framework, submission, records, max_factor_dim=args.max_factor_dim)
                        )
                        print(row(results[-1]), flush=True)
    table = describe(results)
    if args.out:
        path = Path(args.out)
        path.write_text(insert(path.read_text(encoding="utf-8"), table), encoding="utf-8")
    else:
        print(table)
    return int(any(isinstance(result, Failure) for result in results))


if __name__ == "__main__":
    sys.exit(main())
