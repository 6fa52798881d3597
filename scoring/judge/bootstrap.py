"""Bootstrap over studies: how far medians, scores, speedups and ranks would move with other studies."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from commands.atomic import encoded
from scoring.frames import records
from scoring.judge import score
from scoring.judge.columns import Floats, median_of
from scoring.judge.rules import Rules

REPLICATES = 2000
SEED = 0


def resample(cells: pd.DataFrame, rules: Rules, replicates: int = REPLICATES, seed: int = SEED) -> Floats:
    """Medians [replicate, submission, workload] over studies drawn with replacement, each cell by itself.

    Studies of different workloads are different runs, so the cells are drawn independently. Each cell has a
    generator of its own, named by submission and workload: another submission in the group changes no draws.
    """
    table = score.grid(cells, rules)
    result = np.full((replicates, *table.values.shape), np.inf)
    place = {name: k for k, name in enumerate(table.submissions)}
    column = {name: k for k, name in enumerate(table.workloads)}
    for row in records(cells):
        if row.workload in column:
            name = f"{row.submission}\0{row.workload}"
            drawn = medians(row.values, replicates, seed, name)
            result[:, place[row.submission], column[row.workload]] = drawn
    return result


def medians(values: Sequence[float], replicates: int, seed: int, name: str) -> Floats:
    """Bootstrap medians of one cell."""
    generator = np.random.default_rng([seed, *encoded(name)])
    array = np.asarray(values, dtype=float)
    return median_of(array[generator.integers(0, len(array), (replicates, len(array)))])


def interval(draws: Floats, level: float = 0.95) -> tuple[Floats, Floats]:
    """Percentile interval over axis 0. Infinite draws are ordered, never averaged."""
    ordered = np.sort(draws, axis=0)
    n = len(ordered)
    low = int(np.floor((1 - level) / 2 * (n - 1)))
    return ordered[low], ordered[n - 1 - low]


def group(
    cells: pd.DataFrame,
    rules: Rules,
    unit: Callable[[Floats], Floats] | None = None,
    replicates: int = REPLICATES,
    seed: int = SEED,
) -> pd.DataFrame:
    """Score and rank of each submission with 95 % intervals, and the share of replicates in which it comes first.

    ``unit`` turns drawn medians [replicate, submission, workload] into the fixed measure of a reference, if any.
    """
    draws = resample(cells, rules, replicates, seed)
    names = score.grid(cells, rules).submissions
    ratio = score.ratios(draws, rules, None if unit is None else unit(draws))
    values = score.exact(ratio) if unit is None else score.relative(ratio)
    # Equal scores share the better rank.
    ranks = 1.0 + (values[:, None, :] > values[:, :, None]).sum(axis=-1)
    low, high = interval(values)
    best, worst = interval(ranks)
    return pd.DataFrame(
        {
            "score_low": low,
            "score_high": high,
            "rank_low": best.astype(int),
            "rank_high": worst.astype(int),
            "first": (ranks == 1).mean(axis=0),
        },
        index=list(names),
    )


def speedup_interval(
    cells: pd.DataFrame,
    rules: Rules,
    reference: str,
    penalty: Floats,
    replicates: int = REPLICATES,
    seed: int = SEED,
) -> pd.DataFrame:
    """95 % intervals of the geometric-mean speedup over ``reference``, which is resampled as well."""
    draws = resample(cells, rules, replicates, seed)[..., : len(rules.base)]
    names = score.grid(cells, rules).submissions
    other = draws[:, [names.index(reference)], :]
    low, high = interval(score.speedups(draws, other, penalty[: len(rules.base)]))
    return pd.DataFrame({"speedup_low": low, "speedup_high": high}, index=list(names))


def single(cells: pd.DataFrame) -> set[str]:
    """The submissions with a workload they ran in one study only: from one study no interval can be drawn."""
    present = cells[cells["present"] > 0]
    return set(present.loc[present["present"] == 1, "submission"])
