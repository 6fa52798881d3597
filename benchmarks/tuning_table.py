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


def main(folder: str) -> None:
    best: dict[str, dict[int, float]] = {}
    higher: dict[str, bool] = {}
    points: dict[int, dict[str, object]] = {}
    for path in sorted(Path(folder).glob("study_*/*/trial_*/outcome.json")):
        outcome = json.loads(path.read_text())
        trial = int(path.parent.name.removeprefix("trial_"))
        workload = path.parent.parent.name
        best.setdefault(workload, {})[trial] = outcome["best_metric"]
        higher[workload] = outcome["metric"].endswith("accuracy")
        points[trial] = json.loads((path.parent / "hparams.json").read_text())
    costs: dict[int, float] = dict.fromkeys(points, 0.0)
    for workload, metrics in best.items():
        if metrics.keys() != points.keys():
            sys.exit(
                f"{workload} lacks trials {sorted(points.keys() - metrics.keys())}: finish the tuning run first"
            )
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
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
