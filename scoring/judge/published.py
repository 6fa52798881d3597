"""Published submissions, shipped as the numbers of their trials, so that a run is placed without fetching logs.

``python -m scoring published LOGS`` makes the data files from the official logs; nothing in them is typed by hand.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd

from commands.errors import UserError
from scoring.facts import DATA
from scoring.judge.columns import COLUMNS
from scoring.judge.rules import Rules
from scoring.judge.trials import KEEP

STORED = ("workload", "framework", "study", "trial", "evaluations")
VALUES = tuple(column.name for column in COLUMNS if column.name != "cost")
DIGITS = 7


def make(reached: pd.DataFrame, rules: Rules, source: str) -> str:
    """A data file as text: of each study the trials that are best by time and by steps.

    Args:
      reached: the table of ``trials.reach`` on official logs.
      rules: the rules they were judged by.
      source: where the logs come from.
    """
    table = reached[reached["workload"].isin(list(rules.scored))]
    keys = ["submission", "workload", "study"]
    if rules.trials:
        table = table[table.groupby(keys)["trial"].rank(method="first") <= rules.trials]
    chosen: set[int] = set()
    for measure in ("time", "steps"):
        far = table.assign(_far=table["distance"].fillna(np.inf))
        best = far.sort_values([*keys, measure, "time", "_far", "trial"], kind="stable").drop_duplicates(keys)
        chosen |= set(best.index)
    table = table.loc[sorted(chosen)]
    lines = [
        f"    {json.dumps(str(name))}: [\n"
        + ",\n".join(f"      {_line(row)}" for _, row in part.iterrows())
        + "\n    ]"
        for name, part in table.groupby("submission", sort=True)
    ]
    head = {"version": rules.version, "ruleset": rules.ruleset, "source": source, "columns": [*STORED, *VALUES]}
    text = json.dumps(head, indent=2)[:-2]
    return text + ',\n  "submissions": {\n' + ",\n".join(lines) + "\n  }\n}\n"


def _line(row: pd.Series) -> str:
    return json.dumps([_plain(row[name]) for name in (*STORED, *VALUES)])


def _plain(value: object) -> object:
    """A value for JSON, which has neither infinity nor NaN: a missing number is null, and so is a miss."""
    if isinstance(value, str):
        return value
    number = float(value)  # type: ignore[arg-type]
    if not np.isfinite(number):
        return None
    return int(number) if number.is_integer() else float(f"{number:.{DIGITS}g}")


def available() -> list[tuple[str, str]]:
    """Version and ruleset of each data file."""
    names = sorted(path.stem.removeprefix("published_") for path in DATA.glob("published_*.json"))
    return [(name.rpartition("_")[0], name.rpartition("_")[2]) for name in names]


def source(rules: Rules) -> str:
    """Where the published numbers under these rules come from, and on which hardware they were measured."""
    return str(_data(rules)["source"])


def _data(rules: Rules) -> Any:
    return json.loads((DATA / f"published_{rules.version}_{rules.ruleset}.json").read_text())


def load(rules: Rules, cost: str = "time") -> pd.DataFrame:
    """The published trials as a table like that of ``trials.reach``.

    Args:
      rules: what they must have been judged by.
      cost: "time" or "steps".

    Raises:
      UserError: nothing is published under these rules, or not this cost.
    """
    if (rules.version, rules.ruleset) not in available():
        there = " and ".join(f"{version} {ruleset}" for version, ruleset in available())
        wanted = f"{rules.version} {rules.ruleset}: set --benchmark or --ruleset, or give official logs"
        raise UserError(f"--against=published: there are {there}, not {wanted}")
    if cost not in ("time", "steps"):
        raise UserError(
            f"--against=published knows time and steps, not --cost={cost}: give the official logs instead"
        )
    if rules.relaxations:
        raise UserError("--against=published knows no relaxed targets: give the official logs")
    data = _data(rules)
    tables = [
        pd.DataFrame(rows, columns=data["columns"]).assign(submission=name)
        for name, rows in data["submissions"].items()
    ]
    table = pd.concat(tables, ignore_index=True)
    table = table.assign(trial_id=-1, hyperparameters="")
    for name in VALUES:
        if name != "state":
            table[name] = table[name].astype(float)
    misses = {name: table[name].fillna(np.inf) for name in ("time", "steps", "share_to_target")}
    table = table.assign(**misses)
    table["cost"] = table[cost]
    return table[[*KEEP, *(column.name for column in COLUMNS)]]
