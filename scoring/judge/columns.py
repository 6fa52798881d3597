"""The columns of trials, cells and reports: each is one entry here, and everything else reads this list.

A trial's value is computed by ``of``; a cell's is the median over its studies. Tables, CSV files, pages and the
list in docs/scoring.md show them in this order under these headings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from scoring.judge.rules import Target

Floats = npt.NDArray[np.float64]


def median_of(values: npt.NDArray[np.float64], axis: int = -1) -> npt.NDArray[np.float64]:
    """The median with infinity for a miss: the mean of infinity and a number, or of two, is infinity."""
    ordered = np.sort(values, axis=axis)
    n = ordered.shape[axis]
    middle = np.take(ordered, [(n - 1) // 2, n // 2], axis=axis)
    result: npt.NDArray[np.float64] = middle.mean(axis=axis)
    return result


@dataclass(frozen=True, slots=True)
class Run:
    """One trial as its columns see it: its believed evaluations, its target, and the evaluations that matter.

    Attributes:
      table: every numeric column of the evaluations of all trials; ``rows`` are those of this one.
      hit: which evaluation is the first at or past the target within the budget, -1 for none.
      best: which evaluation has the best metric, -1 if it is nowhere a number.
      state: see ``trials.STATES``.
      price: the column that is the cost.
      period: median seconds between two evaluations, NaN for one evaluation.
    """

    target: Target
    budget: float
    batch_size: float
    table: Mapping[str, Floats]
    rows: slice
    hit: int
    best: int
    state: str
    price: str
    period: float

    def at(self, column: str, position: int, missing: float = np.nan) -> float:
        """A column at one evaluation (-1 is none); ``missing`` without the evaluation, the column or a number."""
        count = self.rows.stop - self.rows.start
        if column not in self.table or position < 0 or not count:
            return missing
        value = float(self.table[column][self.rows.start + position])
        return missing if np.isnan(value) else value

    def last(self, column: str) -> float:
        """A column at the last evaluation."""
        return self.at(column, self.rows.stop - self.rows.start - 1)

    def ms_per_step(self) -> float:
        """Milliseconds per step from the first evaluation on: what comes before it holds compilation."""
        steps = self.last("step") - self.at("step", 0)
        return 1e3 * (self.last("time") - self.at("time", 0)) / steps if steps > 0 else np.nan

    def split(self, name: str) -> float:
        """The target's metric on another split of the data where the target was reached."""
        if name == "test" and np.isnan(self.target.test_value):
            return np.nan  # finewebedu_lm has no test set, but a column of placeholders
        return self.at(f"{name}/{self.target.metric}", self.hit)


def share(part: float, whole: float) -> float:
    """A quotient; missing if the whole is nothing, as a damaged log may say."""
    return part / whole if whole else np.nan


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
      name: in every table and CSV file.
      heading: on pages and in documentation; ``{metric}`` stands for the workload's.
      kind: how a value is written: text, steps, seconds, number, ms, percent.
      meaning: one line of documentation.
      of: a trial's value.
      place: the table of a page it stands in: "costs", "main", "details", or "" for CSV files only.
    """

    name: str
    heading: str
    kind: str
    meaning: str
    of: Callable[[Run], float | str]
    place: str = ""


COLUMNS = (
    Column("state", "outcome", "text", "hit, unfinished, over budget, missed or no data", lambda run: run.state),
    Column(
        "steps",
        "steps to target",
        "steps",
        "global step at the first hit within the budget; infinite without one",
        lambda run: run.at("step", run.hit, np.inf),
        "costs",
    ),
    Column(
        "time",
        "time to target",
        "seconds",
        "accumulated submission time (seconds) at that hit; infinite without one",
        lambda run: run.at("time", run.hit, np.inf),
        "costs",
    ),
    Column(
        "cost",
        "cost",
        "number",
        "what --cost chooses, at that hit; infinite without one, missing if the hit has no price",
        lambda run: run.at(run.price, run.hit, np.nan if run.hit >= 0 else np.inf),
    ),
    Column(
        "eval_period",
        "evaluation period",
        "seconds",
        "median time between evaluations: a time to target is known no better",
        lambda run: run.period,
        "main",
    ),
    Column(
        "best",
        "best {metric}",
        "number",
        "best validation metric of the run",
        lambda run: run.at(run.target.column, run.best),
        "main",
    ),
    Column(
        "best_time",
        "time of best",
        "seconds",
        "accumulated submission time at the best metric",
        lambda run: run.at("time", run.best),
    ),
    Column("best_step", "step of best", "steps", "global step at it", lambda run: run.at("step", run.best)),
    Column(
        "distance",
        "to target",
        "number",
        "from the best metric to the target; positive while it is not reached",
        lambda run: run.target.distance(run.at(run.target.column, run.best)),
    ),
    Column(
        "last_time",
        "last time",
        "seconds",
        "accumulated submission time at the last evaluation",
        lambda run: run.last("time"),
    ),
    Column("last_step", "last step", "steps", "global step at it", lambda run: run.last("step")),
    Column(
        "ms_per_step",
        "ms/step",
        "ms",
        "milliseconds per step from the first evaluation on, so without compilation",
        Run.ms_per_step,
        "main",
    ),
    Column(
        "batch_size",
        "batch",
        "steps",
        "batch size, if hparams, flags or meta_data state it",
        lambda run: run.batch_size,
        "main",
    ),
    Column(
        "coarseness",
        "period of time",
        "percent",
        "evaluation period as a share of the time to target",
        lambda run: share(run.period, run.at("time", run.hit)),
        "details",
    ),
    Column(
        "share",
        "budget used",
        "percent",
        "share of the budget used by the end of the run",
        lambda run: share(run.last("time"), run.budget),
        "details",
    ),
    Column(
        "share_to_target",
        "budget to target",
        "percent",
        "share of the budget used up to the target; infinite without a hit",
        lambda run: share(run.at("time", run.hit, np.inf), run.budget),
        "details",
    ),
    Column(
        "eval_share",
        "time in evaluations",
        "percent",
        "share of the run's total duration spent in (untimed) evaluations",
        lambda run: share(run.last("eval_time"), run.last("total_time")),
        "details",
    ),
    Column(
        "train_at_target",
        "train {metric}",
        "number",
        "metric on the training split where the target was reached",
        lambda run: run.split("train"),
        "details",
    ),
    Column(
        "validation_at_target",
        "validation {metric}",
        "number",
        "metric on the validation split there",
        lambda run: run.split("validation"),
        "details",
    ),
    Column(
        "test_at_target",
        "test {metric}",
        "number",
        "metric on the test split there; the rules of AlgoPerf do not ask for it",
        lambda run: run.split("test"),
        "details",
    ),
)
NAMES = tuple(column.name for column in COLUMNS)
BY_NAME = {column.name: column for column in COLUMNS}
# A cell has its own cost and state; of the others, those that are numbers are medians over studies.
OF_CELLS = tuple(
    column.name for column in COLUMNS if column.kind != "text" and column.name not in ("time", "steps", "cost")
)


def placed(place: str) -> tuple[Column, ...]:
    """The columns that stand in one table of a page."""
    return tuple(column for column in COLUMNS if column.place == place)
