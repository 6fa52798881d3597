"""Geometric means over workloads of what a submission needs relative to a reference."""

from __future__ import annotations

import numpy as np
import pandas as pd

from commands.errors import UserError
from scoring.judge import bootstrap, score
from scoring.judge.rules import Rules


def geometric_means(
    cells: pd.DataFrame, rules: Rules, reference: str, replicates: int = bootstrap.REPLICATES
) -> pd.DataFrame:
    """The ratio of median costs to the reference's, as a geometric mean over the workloads both reached.

    A workload whose median is a miss for one of the two cannot enter a mean; ``workloads`` says how many enter.
    Intervals are over studies, the workloads that enter being fixed: a replicate in which a submission misses one
    of them is infinite, one in which the reference does is 0, and where both do there is no interval.

    Args:
      cells: of ``cells.cells``, each row with the costs of its studies.
      rules: which workloads there are.
      reference: a submission.
      replicates: of the bootstrap.

    Returns:
      By submission: ratio, low, high (95 %), workloads; NaN where none enters or one study cannot tell.

    Raises:
      UserError: the reference is not among the submissions.
    """
    table = score.grid(cells, rules)
    if reference not in table.submissions:
        raise UserError(f"no submission {reference!r}: there are {', '.join(table.submissions)}")
    place = table.submissions.index(reference)
    draws = bootstrap.resample(cells, rules, replicates)
    alone = bootstrap.single(cells)
    rows = {}
    for k, name in enumerate(table.submissions):
        enter = np.isfinite(table.values[k]) & np.isfinite(table.values[place])
        row = {"ratio": np.nan, "low": np.nan, "high": np.nan, "workloads": int(enter.sum())}
        if enter.any():
            row["ratio"] = float(np.exp(np.log(table.values[k] / table.values[place])[enter].mean()))
            with np.errstate(invalid="ignore", divide="ignore"):
                drawn = np.exp(np.log(draws[:, k] / draws[:, place])[:, enter].mean(axis=-1))
            if not np.isnan(drawn).any() and not {name, reference} & alone:
                row["low"], row["high"] = map(float, bootstrap.interval(drawn))
        rows[name] = row
    return pd.DataFrame.from_dict(rows, orient="index")
