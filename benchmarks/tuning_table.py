"""Ranks the points of a tuning run over all workloads.

    python -m benchmarks.tuning_table runs/tuning/nadamw

A point's cost on a workload is how far its best metric lies from the best of all points, in units of the distance
between best and median point; the table is sorted by the sum over workloads. Prints Markdown.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

from commands import errors
from commands.arguments import Parser
from commands.errors import UserError


def main() -> int:
    """Runs with the command line's arguments; returns the exit code."""
    parser = Parser("python -m benchmarks.tuning_table", __doc__)
    parser.add_argument("folder", help="of the submission that was tuned")
    return errors.run(lambda: _print(Path(parser.parse_args().folder)))


def _print(folder: Path) -> None:
    best: dict[str, dict[int, float]] = {}
    higher: dict[str, bool] = {}
    points: dict[int, dict[str, object]] = {}
    for path in sorted(folder.glob("study_*/*/trial_*/outcome.json")):
        outcome = json.loads(path.read_text())
        trial = int(path.parent.name.removeprefix("trial_"))
        workload = path.parent.parent.name
        best.setdefault(workload, {})[trial] = outcome["best_metric"]
        higher[workload] = outcome["metric"].endswith("accuracy")
        points[trial] = json.loads((path.parent / "hparams.json").read_text())
    if not points:
        raise UserError(f"{folder} holds no finished trial; give the folder of a submission in a study")
    costs: dict[int, float] = dict.fromkeys(points, 0.0)
    for workload, metrics in best.items():
        if metrics.keys() != points.keys():
            missing = sorted(points.keys() - metrics.keys())
            raise UserError(f"{workload} lacks trials {missing}: finish the tuning run first")
        top = max(metrics.values()) if higher[workload] else min(metrics.values())
        spread = abs(statistics.median(metrics.values()) - top) or 1.0
        for trial, value in metrics.items():
            costs[trial] += abs(value - top) / spread
    names = [n for n in next(iter(points.values())) if len({str(p[n]) for p in points.values()}) > 1]
    print("| trial | cost | " + " | ".join([*best, *names]) + " |")
    print("|" + "---|" * (2 + len(best) + len(names)))
    for trial in sorted(points, key=lambda t: costs[t]):
        values = [f"{best[w][trial]:.4f}" for w in best]
        settings = [f"{v:.4g}" if isinstance(v := points[trial][n], float) else str(v) for n in names]
        print(f"| {trial} | {costs[trial]:.2f} | " + " | ".join([*values, *settings]) + " |")


if __name__ == "__main__":
    sys.exit(main())
