"""Geometric means over workloads of what a submission needs relative to a reference."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from commands.errors import UserError
from scoring.judge import bootstrap, score
from scoring.judge.rules import Rules


def geometric_means(
    cells: pd.DataFrame,
    rules: Rules,
    reference: str,
    allowed: Mapping[str, float],
    replicates: int = bootstrap.REPLICATES,
) -> pd.DataFrame:
    """The ratio of median costs to the reference's, as a geometric mean over the workloads a submission reached.

    Where the reference misses, its cost is unknown but not below what it was allowed to spend, so that is what the
    submission is compared with: the ratio is then too high, never too low, and ``bounded`` counts such workloads.
    A workload that the submission misses cannot enter its mean; ``workloads`` says how many enter. Intervals are
    over studies, the workloads that enter being fixed: a replicate in which a submission misses one of them is
    infinite.

    Args:
      cells: of ``cells.cells``, each row with the costs of its studies.
      rules: which workloads there are.
      reference: a submission.
      allowed: by workload, what the reference may spend in a study, in the unit of the costs.
      replicates: of the bootstrap.

    Returns:
      By submission: ratio, low, high (95 %), workloads, bounded; NaN where none enters or one study cannot tell.

    Raises:
      UserError: the reference is not among the submissions.
    """
    table = score.grid(cells, rules)
    if reference not in table.submissions:
        raise UserError(f"no submission {reference!r}: there are {', '.join(table.submissions)}")
    place = table.submissions.index(reference)
    draws = bootstrap.resample(cells, rules, replicates)
    alone = bootstrap.single(cells)
    most = np.array([allowed[name] for name in table.workloads])
    missed = ~np.isfinite(table.values[place])
    unit = np.where(missed, most, table.values[place])
    drawn_unit = np.where(np.isfinite(draws[:, place]), draws[:, place], most)
    draws[:, place] = drawn_unit  # the reference is its own measure, in every replicate
    rows = {}
    for k, name in enumerate(table.submissions):
        enter = np.isfinite(table.values[k])
        row = {"ratio": np.nan, "low": np.nan, "high": np.nan, "workloads": int(enter.sum())}
        row["bounded"] = int((enter & missed).sum())
        if enter.any():
            row["ratio"] = float(np.exp(np.log(table.values[k] / unit)[enter].mean()))
            if not {name, reference} & alone:
                drawn = np.exp(np.log(draws[:, k] / drawn_unit)[:, enter].mean(axis=-1))
                row["low"], row["high"] = map(float, bootstrap.interval(drawn))
        rows[name] = row
    return pd.DataFrame.from_dict(rows, orient="index")
