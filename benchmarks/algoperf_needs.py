"""What K-FAC would have to do to win AlgoPerf 1.0's workloads: published runs beside the cost of a plan.

    python -m benchmarks.algoperf_needs --assume=a100

reads the published self-tuning runs (scoring/data), plans a submission on each workload (AlgoPerf must be
installed), and replaces what stands in docs/running_on_algoperf.md between its two markers. On a machine with
the GPUs, `python -m submissions plan --calibrate` first, and no --assume, puts measured speeds in their place.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pandas as pd

import scoring
from commands import documents, errors
from commands.arguments import Parser
from commands.errors import UserError, tell
from commands.frameworks import FRAMEWORKS
from scoring.judge import published
from submissions.cli import assumed, plan, plan_tables
from submissions.cli.named_plan import Named
from submissions.cli.plan_text import markdown
from workloads.algoperf import BUDGETS, SELF_TUNING, here
from workloads.runner.jobs import CHECKOUT

BEGIN, END = "<!-- needs: begin -->", "<!-- needs: end -->"
HEAD = ["workload", "fewest steps", "by", "least s", "by ", "published s per step", "K-FAC adds", "refresh every"]
HEAD += ["steps that win", "of the fewest"]
NUMBERS = frozenset(HEAD) - {"workload", "by", "by "}


class Best(NamedTuple):
    """The best published median over studies, at a workload's target.

    Attributes:
        cost: steps or seconds; infinite where nobody reached it.
        submission: whose.
    """

    cost: float
    submission: str


class Needs(NamedTuple):
    """What winning a workload asks of K-FAC in a framework.

    Attributes:
        seconds: of a step: the published ones' and what K-FAC adds, refreshes at their budget.
        steps: within which the target has to be reached to be the first by time; where nobody reached it, those
            that fit into the self-tuning budget.
        share: of the fewest published steps; of the step hint where nobody reached the target.
    """

    seconds: float
    steps: int
    share: float


def best(cells: pd.DataFrame, workload: str) -> Best:
    """The best of the published.

    Args:
        cells: medians over studies by submission and workload, from `scoring.cells`.
        workload: the workload.
    """
    column = cells[cells["workload"] == workload].sort_values(["cost", "submission"], kind="stable")
    first = column.iloc[0]
    return Best(float(first["cost"]), str(first["submission"]))


def step_seconds(cells: pd.DataFrame, workload: str, framework: str) -> float:
    """The median over the submissions of a framework of what their steps take, in seconds."""
    rows = cells[(cells["workload"] == workload) & (cells["framework"] == framework)]
    return statistics.median(rows["ms_per_step"].dropna()) / 1000


def needs(base: float, added: float, steps: Best, time: Best, budget: float, step_hint: int) -> Needs:
    """What it takes to be the first by time.

    Args:
        base: seconds of a step without K-FAC.
        added: seconds K-FAC adds to it.
        steps: fewest published steps.
        time: least published seconds.
        budget: seconds that the ruleset allows.
        step_hint: the workload's.
    """
    seconds = base + added
    reached = math.isfinite(time.cost)
    allowed = int((time.cost if reached else budget) / seconds)
    return Needs(seconds, allowed, allowed / (steps.cost if reached else step_hint))


def main() -> int:
    """Runs with the command line's arguments; returns the exit code."""
    parser = Parser("python -m benchmarks.algoperf_needs", __doc__)
    parser.add_argument("--framework", default="pytorch,jax")
    parser.add_argument("--submission", default="kfac_reduce")
    parser.add_argument("--assume", choices=sorted(assumed.DEVICES), help="a device, in place of a calibration")
    parser.add_argument("--document", default="docs/running_on_algoperf.md", help="what to write the tables into")

    def command() -> None:
        given = parser.parse_args()
        flags = [f"--submission={given.submission}"] + ([f"--assume={given.assume}"] if given.assume else [])
        values = plan.new_flags()
        values(["plan", *flags])
        plans: dict[str, list[Named]] = {}
        for framework in given.framework.split(","):
            if framework not in FRAMEWORKS:
                raise UserError(f"unknown framework '{framework}'; known: {', '.join(FRAMEWORKS)}")
            for name in (name for name in BUDGETS if name in here()):
                print(f"{framework}: {name} ...", file=sys.stderr, flush=True)
                plans.setdefault(framework, []).append(plan.plan_for(values, name, framework))
        shown = " ".join(["python -m benchmarks.algoperf_needs", *_changed(given.framework, flags)])
        document = CHECKOUT / given.document
        documents.insert(document, BEGIN, END, page(plans, shown))
        tell(f"Written: {document}")

    return errors.run(command)


def _changed(framework: str, flags: Sequence[str]) -> list[str]:
    named = [] if framework == "pytorch,jax" else [f"--framework={framework}"]
    return [*named, *(flag for flag in flags if flag != "--submission=kfac_reduce")]


def page(plans: Mapping[str, Sequence[Named]], command: str) -> str:
    """The tables of all frameworks.

    Raises:
        UserError: the speed of the device is not known.
    """
    rules = scoring.load_version("1.0", "self")
    by_cost = {
        cost: scoring.cells(scoring.studies(published.load(rules, cost), rules), rules)
        for cost in ("time", "steps")
    }
    parts = [f"Made by `{command}`; published runs: {published.source(rules)}."]
    for framework, group in plans.items():
        if group[0].speed is None:
            raise UserError("seconds are not known here: python -m submissions plan --calibrate, or give --assume")
        device, share = group[0].speed.device, group[0].plan.config.refresh_budget or 0.0
        at_budget = plan_tables.drawn(plan_tables.intervals(group), "markdown")
        rows = [HEAD, *(_row(named, framework, by_cost["time"], by_cost["steps"]) for named in group)]
        parts += [
            f"### {FRAMEWORKS[framework]}, on {device}",
            markdown(rows, NUMBERS),
            f"Refreshes that take at most {100 * share:.3g} % of the time:",
            at_budget,
        ]
    return "\n\n".join(parts)


def _row(named: Named, framework: str, times: pd.DataFrame, counts: pd.DataFrame) -> list[str]:
    found, added, budget = named.paced(), named.seconds_then, named.budget
    assert found is not None
    assert added is not None
    assert budget is not None
    steps, time = best(counts, named.name), best(times, named.name)
    base = step_seconds(times, named.name, framework)
    wanted = needs(base, added, steps, time, SELF_TUNING * budget.seconds, budget.step_hint)
    nobody = not math.isfinite(time.cost)
    return [
        named.name,
        *(("nobody", "") if nobody else (f"{steps.cost:,.0f}", steps.submission)),
        *(("nobody", "") if nobody else (f"{time.cost:,.0f}", time.submission)),
        *(f"{base:.3f}", f"{added:.3f}", f"{found.interval:,}"),
        *(f"{wanted.steps:,}", f"{wanted.share:.2f}" + " of the hint" * nobody),
    ]


if __name__ == "__main__":
    raise SystemExit(main())
