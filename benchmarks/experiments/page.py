"""The page of all experiments: a table for each, a row for each variant, paired differences over seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.experiments import runs
from benchmarks.experiments.experiment import Experiment, Point

HEAD = """# Experiments

Every experiment on the algorithm that was run stands here, also those that failed. Written by
`python -m benchmarks.experiments table` from [results/experiments.jsonl](results/experiments.jsonl);
`python -m benchmarks.experiments run NAME` repeats one.

Base and variant train on the same seeds, with the same initial weights and batches, up to the end of a schedule
whose length is given as a share of the step hint. The seeds are used for nothing else. A cell is the mean over
seeds of the variant's validation loss less that of the base at the end (least to most); less than zero is
better. Behind it, in italics, where the variant came as low as the base at its end: the share of the base's steps
that it took up to an evaluation (the median); these are some steps apart. Last, where base and variant ran up to
the same target and both reached it: the steps to the target over the base's, geometric mean (results older than
`target` in them do not say). Where not all seeds were run, the cell says of how many it is. Step hints that have
changed since count as they were: {hints}.
"""


@dataclass(frozen=True)
class Difference:
    """A variant against the base on a workload.

    Attributes:
        losses: variant less base, by seed; infinite where the variant diverged, NaN where the base did.
        shares: of the base's horizon until the variant is as low as the base at its end; infinite where never.
        targets: steps to the target over the base's, of the seeds for which both are known.
        pace: ms per step over the base's, median.
    """

    losses: tuple[float, ...]
    shares: tuple[float, ...]
    targets: tuple[float, ...]
    pace: float


def page(experiments: Sequence[Experiment], kept: Mapping[str, dict[str, Any]]) -> str:
    """The whole page as Markdown."""
    done = [one for one in experiments if compare(one, kept)]
    counted = {name for one in done for name in _keys(one).values() if name in kept}
    count = f"{len(kept)} runs are kept, {len(counted)} of them in the {len(done)} experiments below."
    hints = ", ".join(f"{workload} {steps}" for workload, steps in runs.HINTS.items())
    return "\n".join([HEAD.format(hints=hints), count, "", *(section(one, kept) for one in done)])


def section(one: Experiment, kept: Mapping[str, dict[str, Any]]) -> str:
    """One experiment."""
    differences = compare(one, kept)
    names = [name for name in one.all_variants() if name != "base"]
    steps = {
        workload: runs.run_of(one, one.all_variants()["base"], workload, 0).steps for workload in one.workloads
    }
    lines = [f"## {one.name}", "", one.change, ""]
    lines.append(
        f"Base: `{one.submission}`{_point({**one.start, **one.base})}. Horizon {one.horizon:g} of the step hint "
        f"({', '.join(f'{workload} {count}' for workload, count in steps.items())} steps), "
        f"{one.framework}, seeds {', '.join(map(str, one.seeds))}."
    )
    lines += [
        "",
        "| variant | " + " | ".join(one.workloads) + " | ms per step |",
        "|---|" + "---|" * (len(steps) + 1),
    ]
    for name in names:
        variant = one.variants[name]
        share = f"{variant.share:g} of the steps" if variant.share != 1 else ""
        told = ", ".join(part for part in (variant.submission, _point(variant.point).strip(" ,"), share) if part)
        what = f"{name}: {told}" if told else name
        cells = [_cell(differences.get((name, workload)), len(one.seeds)) for workload in one.workloads]
        paces = [differences[name, workload].pace for workload in one.workloads if (name, workload) in differences]
        pace = f"{statistics.geometric_mean(paces):.2f}" if paces else "-"
        lines.append(f"| {what} | " + " | ".join(cells) + f" | {pace} |")
    lines += ["", f"**Verdict.** {one.verdict or 'None yet.'}", ""]
    return "\n".join(lines)


def compare(one: Experiment, kept: Mapping[str, dict[str, Any]]) -> dict[tuple[str, str], Difference]:
    """Each variant against the base, by variant and workload, over the seeds of which both are kept."""
    found = _found(one, kept)
    differences = {}
    for name in one.variants:
        for workload in one.workloads:
            pairs = [(found[name, workload, seed], found["base", workload, seed]) for seed in one.seeds]
            whole = [(mine, base) for mine, base in pairs if mine is not None and base is not None]
            if whole:
                differences[name, workload] = Difference(
                    tuple(_loss(mine) - _loss(base) for mine, base in whole),
                    tuple(_share(mine, base) for mine, base in whole),
                    tuple(ratio for mine, base in whole if (ratio := _to_target(mine, base)) is not None),
                    statistics.median(mine["ms_per_step"] / base["ms_per_step"] for mine, base in whole),
                )
    return differences


def _keys(one: Experiment) -> dict[tuple[str, str, int], str]:
    return {place: runs.key(runs.identity(run)) for place, run in runs.runs_of(one).items()}


def _found(
    one: Experiment, kept: Mapping[str, dict[str, Any]]
) -> dict[tuple[str, str, int], dict[str, Any] | None]:
    return {place: kept.get(name) for place, name in _keys(one).items()}


def _loss(result: Mapping[str, Any]) -> float:
    return math.inf if result["loss"] is None else float(result["loss"])


def _share(mine: Mapping[str, Any], base: Mapping[str, Any]) -> float:
    goal = _loss(base)
    reached = [step for step, loss in mine["curve"] if loss is not None and loss <= goal]
    return min(reached) / base["steps"] if reached else math.inf


def _to_target(mine: Mapping[str, Any], base: Mapping[str, Any]) -> float | None:
    ours, theirs = mine["steps_to_target"], base["steps_to_target"]
    same = mine.get("target") is not None and mine.get("target") == base.get("target")
    return ours / theirs if same and ours and theirs else None


def _cell(difference: Difference | None, seeds: int) -> str:
    if difference is None:
        return "-"
    if not all(map(math.isfinite, difference.losses)):
        return "diverged"
    mean, low, high = statistics.fmean(difference.losses), min(difference.losses), max(difference.losses)
    share = statistics.median(difference.shares)
    behind = f" *{share:.2f}*" if math.isfinite(share) else ""
    if difference.targets:
        behind += f", to the target {statistics.geometric_mean(difference.targets):.2f}"
    if len(difference.losses) < seeds:
        behind += f", {len(difference.losses)} of {seeds} seeds"
    return f"{mean:+.4f} ({low:+.4f} to {high:+.4f}){behind}"


def _point(point: Point) -> str:
    return ", " + ", ".join(f"{name} {json.dumps(value)}" for name, value in point.items()) if point else ""
