"""How fast logs are read, scored and shown, beside a loop of pandas.read_csv over the same files, in one run.

    python benchmarks/scoring_speed.py LOGS

LOGS is a directory of submissions, such as the unpacked official logs of AlgoPerf 0.5 (3,718 files), or an archive
of one. The loop reads every column of every file, as the official scorer does before it scores, and scores nothing;
an archive is unpacked for it beforehand. Every figure is the median over --repeats of a fresh process each, imports
included; memory is the peak of the process. On a busy machine the processor time says more than the clock.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_SCORE = """
import sys
import scoring
runs = scoring.read(sys.argv[1], use_cache={cache})
rules = scoring.rules_for(runs)
scoring.scores(scoring.cells(scoring.studies(scoring.reach(runs, rules), rules), rules), rules)
"""
_PAGE = """
import sys
from scoring.cli import main
main(["leaderboard", sys.argv[1], "--output_dir", sys.argv[2] + "/page"])
"""
_NAIVE = """
import glob, sys
import pandas
tables = [pandas.read_csv(name) for name in glob.glob(sys.argv[3] + "/**/eval_measurements.csv", recursive=True)]
pandas.concat(tables)
"""
_PEAK = """
import resource
used = resource.getrusage(resource.RUSAGE_SELF)
print(used.ru_maxrss, used.ru_utime + used.ru_stime)
"""
NAIVE = "naive loop of read_csv, nothing scored"
CASES = {
    NAIVE: _NAIVE,
    "read and score, nothing cached": _SCORE.format(cache=False),
    "read and score, nothing changed": _SCORE.format(cache=True),
    "leaderboard with its page, nothing changed": _PAGE,
}


def run(code: str, logs: str, cache: str, unpacked: str) -> tuple[float, float, float]:
    """Seconds, processor seconds and peak megabytes of one fresh process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": cache}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code + _PEAK, logs, cache, unpacked],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    seconds = time.perf_counter() - start
    peak, processor = done.stdout.split()[-2:]
    return seconds, float(processor), int(peak) / 1024


def main() -> None:
    """Time the cases in turn and print a table with ratios to the naive loop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", help="directory of submissions, or a tar archive of one")
    parser.add_argument("--repeats", type=int, default=5, help="processes per case (default: %(default)s)")
    flags = parser.parse_args()
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in CASES}
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryDirectory() as folder:
        unpacked = flags.logs
        if not Path(flags.logs).is_dir():
            unpacked = folder
            with tarfile.open(flags.logs) as archive:
                archive.extractall(folder, filter="data")
        files = len(list(Path(unpacked).rglob("eval_measurements.csv")))
        if not files:
            raise SystemExit(f"error: no eval_measurements.csv below {flags.logs}: name a folder of submissions")
        for code in CASES.values():
            run(code, flags.logs, cache, unpacked)  # fills the disk cache and ours
        for _ in range(flags.repeats):
            for name, code in CASES.items():
                found[name].append(run(code, flags.logs, cache, unpacked))
    naive = statistics.median(result[0] for result in found[NAIVE])
    print(f"{files} files, {os.cpu_count()} cores, median of {flags.repeats}")
    print(f"{'case':43}  {'seconds':>7}  {'spread':>14}  {'processor':>9}  {'to naive':>8}  {'peak MB':>7}")
    for name, results in found.items():
        seconds = [result[0] for result in results]
        middle = statistics.median(seconds)
        spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
        processor = statistics.median(result[1] for result in results)
        peak = max(result[2] for result in results)
        print(f"{name:43}  {middle:7.2f}  {spread:>14}  {processor:9.2f}  {middle / naive:8.2f}  {peak:7.0f}")


if __name__ == "__main__":
    main()
