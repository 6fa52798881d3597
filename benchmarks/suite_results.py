"""Judges the race of a suite: the workloads in groups, those K-FAC was not tuned on first.

`benchmarks.suite_table` writes what comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

import scoring
from benchmarks import suite_paces
from scoring.judge import means
from scoring.judge.rules import Rules
from scoring.show import text
from workloads import registry
from workloads.studies import facts

REFERENCE = "nadamw"
COSTS = ("steps", "time")


@dataclass(frozen=True)
class Group:
    """Workloads whose results mean the same.

    Attributes:
        key: a word for files.
        title: what they are.
        workloads: in the order of the suite.
    """

    key: str
    title: str
    workloads: tuple[str, ...]


@dataclass(frozen=True)
class Judged:
    """A group in one framework.

    Attributes:
        cells: cost -> one row per submission and workload: median, least, most, values over studies, hits, state.
        means: cost -> by submission the geometric mean ratio to the reference; see `means.geometric_means`.
        ranking: cost -> by submission AlgoPerf's score on these logs.
        pace: by submission and workload, ms per step.
        studies: how many are due.
        alone: the workloads whose times are steps at the pace measured alone; of the others those of the race.
    """

    group: Group
    framework: str
    rules: Rules
    cells: dict[str, pd.DataFrame]
    means: dict[str, pd.DataFrame]
    ranking: dict[str, pd.DataFrame]
    pace: pd.DataFrame
    studies: int
    alone: tuple[str, ...] = ()

    @property
    def submissions(self) -> list[str]:
        """First those whose mean is over the most workloads, then by the geometric mean of steps, then by score."""
        known = self.means["steps"].assign(score=self.ranking["steps"]["score"])
        order = known.sort_values(["workloads", "ratio", "score"], ascending=[False, True, False], kind="stable")
        return [str(name) for name in order.index]

    def pace_of(self, submission: str, workload: str) -> float:
        """Median ms per step of a submission on a workload; NaN where it was not run."""
        table = self.pace
        there = submission in table.index and workload in table.columns
        return (
            float(table.to_numpy()[table.index.get_loc(submission), table.columns.get_loc(workload)])
            if there
            else np.nan
        )


def groups(names: Sequence[str]) -> list[Group]:
    """Our workloads among `names`, those nobody tuned K-FAC on first, base workloads before variants."""
    ours = facts.in_order([name for name in names if name in registry.WORKLOADS])

    def chosen(*, tuned_on: bool, variants: bool) -> tuple[str, ...]:
        return tuple(
            name
            for name in ours
            if facts.task(facts.base_of(name)).tuned_on is tuned_on
            and registry.WORKLOADS[name].is_variant is variants
        )

    parts = [
        Group("new", "Workloads nobody tuned K-FAC on", chosen(tuned_on=False, variants=False)),
        Group(
            "variants",
            "Held-out variants of workloads nobody tuned K-FAC on",
            chosen(tuned_on=False, variants=True),
        ),
        Group(
            "tuned_on",
            "Workloads K-FAC was tuned on while it was written",
            chosen(tuned_on=True, variants=False),
        ),
        Group(
            "variants_of_tuned_on",
            "Held-out variants of workloads K-FAC was tuned on",
            chosen(tuned_on=True, variants=True),
        ),
    ]
    return [part for part in parts if part.workloads]


def judge(race: Path, studies: int, *, one_speed: bool = True) -> list[Judged]:
    """Every group in every framework that was run.

    Args:
        race: the folder of a suite's race.
        studies: how many are due; a missing one is a miss.
        one_speed: whether paces are those at one speed of the machine; else as they were measured.

    Raises:
        UserError: there is no trial, or none of the reference.
    """
    logs, measured = suite_paces.at_pace(scoring.read(race), suite_paces.read(race.parent, one_speed=one_speed))
    found = []
    for framework in sorted(set(logs.trials["framework"]), key=("pytorch", "jax").index):
        part = logs.select(framework=framework)
        for group in groups(sorted(set(part.trials["workload"]))):
            found.append(_judge(part.select(workload=list(group.workloads)), group, framework, studies, measured))
    return found


def _judge(
    logs: scoring.Logs, group: Group, framework: str, studies: int, measured: Sequence[tuple[str, str]]
) -> Judged:
    boards = {
        cost: scoring.leaderboard(logs, workloads="present", cost=cost, reference=REFERENCE, studies=studies)
        for cost in COSTS
    }
    rules = boards["steps"].rules
    cells = {cost: board.cells for cost, board in boards.items()}
    pace = boards["time"].trials.groupby(["submission", "workload"])["ms_per_step"].median().unstack()
    hints = {name: float(facts.task(name).step_hint) for name in group.workloads}
    allowed = {"steps": hints, "time": {name: _seconds(logs, name, hints[name]) for name in hints}}
    return Judged(
        group,
        framework,
        rules,
        cells,
        {cost: means.geometric_means(table, rules, REFERENCE, allowed[cost]) for cost, table in cells.items()},
        {cost: board.ranking for cost, board in boards.items()},
        pace,
        studies,
        tuple(name for name in group.workloads if (name, framework) in measured),
    )


def _seconds(logs: scoring.Logs, workload: str, steps: float) -> float:
    """Of so many steps of the reference: its median trial, had it gone on at the pace it had."""
    trials = logs.trials.query("submission == @REFERENCE and workload == @workload")["trial_id"]
    found = []
    for _, evals in logs.evals[logs.evals["trial_id"].isin(trials)].groupby("trial_id"):
        first, last = evals["step"].argmin(), evals["step"].argmax()
        at, times = evals["step"].to_numpy(dtype=float), evals["time"].to_numpy(dtype=float)
        pace = (times[last] - times[first]) / max(1.0, at[last] - at[first])
        found.append(times[last] + pace * (steps - at[last]))
    return float(np.median(found)) if found else np.nan


def ratio_text(mean: pd.Series) -> str:
    """A row of `means` for people: a bound where the reference missed a workload, a dash where there is none."""
    if np.isnan(mean["ratio"]):
        return text.NOTHING
    return f"{'≤ ' if mean['bounded'] else ''}{text.ratio(mean['ratio'])}"
