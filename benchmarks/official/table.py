"""Runs cases one after the other and writes the tables of `docs/official.md`.

    python -m benchmarks.official.table --out=docs/official.md
    python -m benchmarks.official.table --workloads=ogbg,wmt --submissions=kfac_reduce    # prints only

With --records, finished cases are kept in a folder and not run again; --finished runs no others. The rows go
between the two marker lines of the AlgoPerf that is installed, below a line with the versions that they were made
with; rows of other cases stay, as does everything else. --raw keeps the records behind the rows in the same way.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.official import rows
from benchmarks.official.batches import OTHER_CUTS
from benchmarks.official.conditions import problems
from benchmarks.official.environment import versions
from benchmarks.official.record import SUBMISSIONS, Failure, Record
from commands import atomic, errors, frameworks
from commands.arguments import Parser
from commands.errors import UserError
from commands.frameworks import FRAMEWORKS
from submissions.registry import path_of
from workloads import algoperf
from workloads.algoperf import VARIANTS

TIMEOUT = 6000  # seconds for a case; the longest of the table took 2320, two at a time


def case_label(
    workload: str, framework: str, submission: str, *, data_parallel: bool = False, devices: int = 1
) -> str:
    """The name of a case's record."""
    label = f"{workload}-{framework}-{submission}" + ("-data_parallel" if data_parallel else "")
    return label + (f"-{devices}_devices" if devices > 1 else "")


def cases_here() -> tuple[str, ...]:
    """The base workloads that the installed AlgoPerf has, and those of them that are cut in a second way."""
    here = algoperf.here()
    return *here, *(name for name, official in OTHER_CUTS.items() if official in here)


def run_case(
    workload: str,
    framework: str,
    submission: str,
    records: Path | None = None,
    *,
    data_parallel: bool = False,
    max_factor_dim: int | None = None,
    devices: int = 1,
) -> Record | Failure:
    """One case in a process of its own, or its record from an earlier run.

    Raises:
        UserError: that was made with another version of AlgoPerf.
    """
    label = case_label(workload, framework, submission, data_parallel=data_parallel, devices=devices)
    kept = None if records is None else records / f"{label}.json"
    if kept is not None and kept.exists():
        record = Record(**json.loads(kept.read_text()))
        if record.algoperf != algoperf.version():
            raise UserError(
                f"{kept} was made with AlgoPerf {record.algoperf}, and {algoperf.version()} is installed: "
                "choose a folder for each"
            )
        return record
    command = [sys.executable, "-m", "benchmarks.official.case"]
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
        atomic.write_text(kept, lines[-1])
    return Record(**json.loads(lines[-1]))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the cases; returns the exit code: 1 if one failed or shows not all it should."""
    parser = Parser("python -m benchmarks.official.table", __doc__)
    parser.add_argument("--out", help="a Markdown file with the marker lines; default: print only")
    parser.add_argument("--raw", help="a file of JSON lines for the records themselves")
    parser.add_argument("--workloads", default=",".join(cases_here()), help="comma-separated; 'variants' for those")
    parser.add_argument("--frameworks", default=",".join(FRAMEWORKS), help="comma-separated")
    parser.add_argument("--submissions", default=",".join(SUBMISSIONS), help="comma-separated")
    parser.add_argument("--records", help="folder that keeps finished cases")
    parser.add_argument("--max_factor_dim", type=int, help="of K-FAC's cases; default: the submissions' own")
    parser.add_argument("--finished", action="store_true", help="only what is in --records; runs nothing")
    return errors.run(lambda: _run(parser.parse_args(argv)))


def _run(args: argparse.Namespace) -> int:
    if not algoperf.installed():
        raise UserError(algoperf.NOT_INSTALLED)
    if algoperf.is_older():
        print(algoperf.OLDER, file=sys.stderr)
    for framework in args.frameworks.split(","):
        frameworks.check(framework)
    for submission in args.submissions.split(","):
        if not any(path_of(submission, framework).is_file() for framework in FRAMEWORKS):
            raise UserError(f"there is no submission '{submission}'; known: {', '.join(SUBMISSIONS)}")
    names = [name for word in args.workloads.split(",") for name in (VARIANTS if word == "variants" else [word])]
    with tempfile.TemporaryDirectory() as folder:
        records = Path(args.records or folder)
        records.mkdir(parents=True, exist_ok=True)
        cases = [
            (name, framework, submission)
            for name in names
            for framework in args.frameworks.split(",")
            for submission in args.submissions.split(",")
            if path_of(submission, framework).is_file()
            and (not args.finished or (records / f"{case_label(name, framework, submission)}.json").exists())
        ]
        version = algoperf.version()
        for name in names:
            algoperf.base_of(name)
        try:
            lines = rows.rows_of(Path(args.out).read_text(encoding="utf-8"), version) if args.out else {}
        except (ValueError, OSError) as error:
            raise UserError(f"--out={args.out}: {error}") from None
        results: list[Record | Failure] = []
        broken: list[str] = []
        for case in cases:
            results.append(run_case(*case, records=records, max_factor_dim=args.max_factor_dim))
            lines[case] = rows.Row(versions(), rows.row(results[-1]))
            print(lines[case].line, flush=True)
            if isinstance(results[-1], Record):
                if results[-1].environment:
                    lines[case] = lines[case]._replace(environment=results[-1].environment)
                broken += [f"{case_label(*case)}: {problem}" for problem in problems(results[-1])]
    if args.raw:
        rows.write_raw_records(Path(args.raw), [result for result in results if isinstance(result, Record)])
    if args.out:
        path = Path(args.out)
        atomic.write_text(path, rows.insert(path.read_text(encoding="utf-8"), version, lines))
    else:
        print(rows.describe(lines))
    print("".join(f"not met: {line}\n" for line in broken), end="", file=sys.stderr)
    return int(bool(broken) or any(isinstance(result, Failure) for result in results))


if __name__ == "__main__":
    sys.exit(main())
