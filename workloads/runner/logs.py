"""The files of a trial, in AlgoPerf's layout: hparams, flags, meta data, and the two tables of measurements.

Rows live in memory and in the checkpoint; a table is rewritten whole, by an atomic rename, from the rows. So a
process killed at any moment leaves whole rows only, and a resumed run, which starts from the rows of its
checkpoint, neither loses nor doubles one.
"""

from __future__ import annotations

import csv
import io
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from algoperf_kfac.config import as_mapping
from commands import atomic
from submissions.common.api import Hyperparameters, Tree
from workloads.runner import experiment
from workloads.workload import Workload

Scalar: TypeAlias = bool | int | float | str
Row: TypeAlias = dict[str, Scalar]


class MetricsLogger:
    """Collects the rows of `measurements.csv` and `eval_measurements.csv`.

    `append_scalar_metrics` has the official signature, for submissions; nothing is written before `flush`.
    """

    def __init__(self, folder: Path, rows: Sequence[Row] = (), eval_rows: Sequence[Row] = ()) -> None:
        self._folder = folder
        self.rows = [dict(row) for row in rows]
        self.eval_rows = [dict(row) for row in eval_rows]

    def append_scalar_metrics(
        self,
        metrics: Mapping[str, Tree],
        global_step: int,
        preemption_count: int | None = None,
        *,
        is_eval: bool = False,
    ) -> None:
        """Adds a row, to the evaluations too if `is_eval`."""
        row: Row = {name: _plain(value) for name, value in metrics.items()}
        row["global_step"] = int(global_step)
        if preemption_count is not None:
            row["preemption_count"] = int(preemption_count)
        self.rows.append(row)
        if is_eval:
            self.eval_rows.append(row)

    def flush(self) -> None:
        """Writes both tables."""
        write_table(self._folder / "measurements.csv", self.rows)
        write_table(self._folder / "eval_measurements.csv", self.eval_rows)

    def finish(self) -> None:
        """As the official logger's: writes what is there."""
        self.flush()


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Writes rows as CSV; columns are sorted, a value a row lacks is left empty."""
    columns = sorted({name for row in rows for name in row})
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic.write_text(path, buffer.getvalue())


def write_hyperparameters(folder: Path, point: Hyperparameters) -> None:
    """Writes a point to hparams.json; None, of the self-tuning ruleset, leaves no file."""
    if point is not None:
        atomic.write_json(folder / "hparams.json", as_mapping(point))


def read_hyperparameters(folder: Path) -> dict[str, object] | None:
    """The point an earlier run of the trial wrote, None if there is none that can be read."""
    return experiment.read_json(folder / "hparams.json")


def meta_data(workload: Workload, versions: Mapping[str, str], seed: int) -> dict[str, object]:
    """What a reader of the logs needs to know: the workload's constants, versions, the seed."""
    skipped = {"param_shapes", "model_params_types", "metrics_logger"}
    names = [name for name in dir(workload) if not name.startswith("_") and name not in skipped]
    values = {f"workload.{name}": getattr(workload, name) for name in names}
    plain = {name: value for name, value in values.items() if isinstance(value, (bool, int, float, str))}
    return {
        **plain,
        "os_platform": platform.platform(),
        "python_version": platform.python_version(),
        "numpy_version": np.__version__,
        **versions,
        "rng_seed": seed,
    }


def _plain(value: Tree) -> Scalar:
    """A Python scalar of a NumPy or framework scalar: rows must survive CSV and checkpoint."""
    scalar: Scalar = value.item() if hasattr(value, "item") else value
    return scalar
