"""What may mislead in a set of logs, beyond single files: missing studies, odd clocks, odd targets."""

from __future__ import annotations

import numpy as np
import pandas as pd

from scoring.frames import records
from scoring.judge.frameworks import labelled, mixed
from scoring.judge.rules import Rules
from scoring.oddities import Oddities, merge
from scoring.read.logs import Logs
from scoring.read.sanity import missing_metrics

STEP_TIME = 1.5  # a trial's ms per step against the median of its submission on the workload
STEP_SIZE = 5.0  # a submission's ms per step against the median submission
PERIOD = 2.0  # the median time between evaluations against the period the benchmark states


def lint(logs: Logs, rules: Rules, reached: pd.DataFrame) -> pd.DataFrame:
    """All findings on the logs: those met while reading and those seen only side by side.

    Args:
      logs: what was read.
      rules: what it is judged by.
      reached: the table of ``trials.reach``.
    """
    odd = Oddities()
    _frameworks(logs.trials, odd)
    table = labelled(logs.trials)
    _completeness(table, rules, odd)
    _unscored(table, rules, odd)
    _meta_data(table, rules, odd)
    _metrics(logs, rules, odd)
    _trials(logs, rules, reached, odd)
    _clocks(rules, reached, odd)
    _seeds(table, odd)
    odd.rows += step_outliers(reached)
    return merge(logs.oddities, odd.table())


def _frameworks(table: pd.DataFrame, odd: Oddities) -> None:
    double = mixed(table)
    for name in double:
        action = "each framework is a row of its own; --framework chooses one"
        odd.add("note", name, "mixed frameworks", "one workload in two frameworks", action)
    pairs = table.drop_duplicates(["submission", "framework"])["submission"]
    for name in sorted(set(pairs[pairs.duplicated()]) - set(double)):
        odd.add("note", str(name), "mixed frameworks", "workloads differ in framework", "scored as they are")


def _completeness(table: pd.DataFrame, rules: Rules, odd: Oddities) -> None:
    keys = ["submission", "workload", "study"]
    counts = table.groupby(keys)["trial"].nunique().reset_index()
    studies = counts.groupby(["submission", "workload"]).size()
    most = studies.groupby("workload").max()
    for name in sorted(set(table["submission"])):
        for workload in rules.scored:
            present = int(studies.get((name, workload), 0))
            due = rules.studies or int(most.get(workload, 0))
            if present == 0:
                odd.add("warning", name, "missing workload", workload, "a miss")
            elif present < due:
                action = "each is a miss" if rules.studies else "the median is over those present"
                odd.add("warning", name, "missing study", f"{workload}: {present} of {due}", action, due - present)
    counts = counts[counts["workload"].isin(list(rules.scored)) & (rules.trials > 0)]
    for row in records(counts[counts["trial"] != rules.trials]):
        place, detail = f"{row.submission}/{row.study}", f"{row.workload}: {row.trial} of {rules.trials}"
        if row.trial < rules.trials:
            odd.add("warning", place, "missing trial", detail, "the others count", rules.trials - row.trial)
        else:
            odd.add("warning", place, "extra trials", detail, "those of the lowest numbers count")


def _unscored(table: pd.DataFrame, rules: Rules, odd: Oddities) -> None:
    others = table[~table["workload"].isin(list(rules.scored))]
    for (one, other), part in others.groupby(["submission", "workload"]):
        name, workload = str(one), str(other)
        if workload in rules.targets:
            action = "not scored: --workloads=present scores all that occur"
            odd.add("warning", name, "workload without credit", workload, action, len(part))
        elif workload in rules.unscored:
            odd.add("note", name, "workload without credit", workload, "not scored", len(part))
        else:
            odd.add("warning", name, "unknown workload", workload, "not scored", len(part))


def _meta_data(trials: pd.DataFrame, rules: Rules, odd: Oddities) -> None:
    table = trials[trials["workload"].isin(list(rules.targets))]
    same = {name: target for name, target in rules.targets.items() if name not in rules.relaxations}
    known = {
        "target": {name: target.value for name, target in same.items()},
        "budget": {name: target.budget for name, target in rules.targets.items()},
        "step_hint": {name: target.step_hint for name, target in rules.targets.items()},
    }
    for column, values in known.items():
        stated, ours = table[column], table["workload"].map(values).astype(float)
        differs = np.isfinite(stated) & np.isfinite(ours) & ~np.isclose(stated, ours, rtol=1e-9)
        for where, one, other in zip(table["where"][differs], stated[differs], ours[differs], strict=True):
            detail = f"meta_data says {one:g}, the rules say {other:g}"
            odd.add("warning", where, f"{column.replace('_', ' ')} disagrees", detail, "the rules are used")
    ours = table["workload"].map({name: target.metric for name, target in rules.targets.items()})
    for row in records(table[(table["metric"] != "") & (table["metric"] != ours)]):
        detail = f"meta_data says {row.metric}, the rules say {rules.targets[row.workload].metric}"
        odd.add("warning", row.where, "metric disagrees", detail, "the rules are used")


def _metrics(logs: Logs, rules: Rules, odd: Oddities) -> None:
    """The rules' metric where reading could not know it: without meta_data, or where those name another."""
    ours = logs.trials["workload"].map({name: target.metric for name, target in rules.targets.items()}).fillna("")
    unchecked = logs.trials[ours != logs.trials["metric"]]
    missing_metrics(logs.evals, unchecked, ours[unchecked.index], odd)


def _trials(logs: Logs, rules: Rules, reached: pd.DataFrame, odd: Oddities) -> None:
    where = logs.trials.set_index("trial_id")["where"]
    preempted = logs.evals.groupby("trial_id")["preemptions"].max()
    budgets = reached["workload"].map({name: rules.budget(name) for name in rules.targets}).astype(float)
    special = (reached["evaluations"] == 1) | (reached["last_time"] > 1.01 * budgets)
    special |= reached["state"].isin(["over budget", "unfinished"])
    special |= reached["trial_id"].isin(preempted.index[preempted > 0])
    for row in records(reached[special]):
        place, budget = str(where[row.trial_id]), rules.budget(row.workload)
        if row.evaluations == 1:
            detail = f"at step {row.last_step:.0f}, {row.last_time:.0f} s"
            odd.add("warning", place, "single evaluation", detail, "no learning curve; judged by that one")
        if row.last_time > 1.01 * budget:
            detail = f"{row.last_time:.0f} s of {budget:.0f} s"
            odd.add("warning", place, "budget overrun", detail, "evaluations beyond the budget are no hits")
        if row.state == "over budget":
            odd.add("warning", place, "hit over budget", f"after {budget:.0f} s", "a miss")
        if row.state == "unfinished" and row.evaluations > 1:
            detail = f"ended after {100 * row.share:.0f} % of the budget without reaching the target"
            odd.add("note", place, "unfinished", detail, "no hit, shown apart from misses")
        if preempted.get(row.trial_id, 0) > 0:
            odd.add("note", place, "preempted", f"{preempted[row.trial_id]:.0f} times", "read as one run")


def _clocks(rules: Rules, reached: pd.DataFrame, odd: Oddities) -> None:
    groups = reached.groupby(["submission", "workload"])
    usual = groups["ms_per_step"].transform("median")
    apart = (reached["ms_per_step"] > STEP_TIME * usual) | (reached["ms_per_step"] < usual / STEP_TIME)
    for row, median in zip(records(reached[apart]), usual[apart], strict=True):
        place = f"{row.submission}/{row.study}/{row.workload}/trial_{row.trial}"
        detail = f"{row.ms_per_step:.3g} ms, the median is {median:.3g}"
        odd.add("warning", place, "outlying step time", detail, "kept: look at the machine")
    for row in records(groups[["eval_period", "ms_per_step"]].median().reset_index()):
        stated = rules.targets[row.workload].eval_period
        # A period cannot be shorter than a step.
        longest = max(stated, row.ms_per_step / 1e3) if np.isfinite(stated) else np.nan
        if row.eval_period > PERIOD * longest or row.eval_period < longest / PERIOD:
            detail = f"{row.workload}: {row.eval_period:.0f} s, the benchmark says {stated:.0f}"
            odd.add("warning", row.submission, "outlying evaluation period", detail, "times are quantised by it")


def _seeds(table: pd.DataFrame, odd: Oddities) -> None:
    known = table[table["seed"].fillna("") != ""]
    again = known[known.duplicated(["submission", "workload", "framework", "trial", "seed"])]
    for (submission, workload), part in again.groupby(["submission", "workload"]):
        detail = f"{workload}: studies share a seed"
        odd.add("note", str(submission), "same seed", detail, "studies may not be independent", len(part))


def odd_steps(findings: pd.DataFrame) -> set[tuple[str, str]]:
    """Submission and workload of every finding that steps there do not compare with those of others."""
    mine = findings[findings["what"].isin(["inner-loop steps", "other batch size"])]
    return {(row.where, row.detail.partition(":")[0]) for row in records(mine)}


def step_outliers(reached: pd.DataFrame) -> list[tuple[str, str, str, str, str, int]]:
    """Submissions whose steps are no updates of the usual size, by time per step or by batch size."""
    odd = Oddities()
    typical = reached.groupby(["workload", "submission"])[["ms_per_step", "batch_size"]].median().reset_index()
    action = "its steps-to-target is not comparable"
    for workload, part in typical.groupby("workload"):
        if len(part) < 3:
            continue
        usual = part["ms_per_step"].median()
        batch = part["batch_size"].median()
        for row in records(part):
            if row.ms_per_step > STEP_SIZE * usual or row.ms_per_step < usual / STEP_SIZE:
                detail = f"{workload}: {row.ms_per_step:.3g} ms per step, the median submission needs {usual:.3g}"
                odd.add("warning", row.submission, "inner-loop steps", detail, action)
            elif row.batch_size > 2 * batch or row.batch_size < batch / 2:
                detail = f"{workload}: batch size {row.batch_size:g}, the median is {batch:g}"
                odd.add("warning", row.submission, "other batch size", detail, action)
    return odd.rows
