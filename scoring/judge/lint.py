"""What may mislead in a set of logs, beyond single files: missing studies, odd clocks, odd targets."""

from __future__ import annotations

import numpy as np
import pandas as pd

from scoring.frames import records
from scoring.judge.targets import Rules
from scoring.oddities import Oddities, merge
from scoring.read.logs import Logs

STEP_TIME = 1.5  # a trial's ms per step against the median of its submission on the workload
STEP_SIZE = 5.0  # a submission's ms per step against the median submission
PERIOD = 2.0  # the median time between evaluations against the period the benchmark states


def lint(logs: Logs, rules: Rules, reached: pd.DataFrame) -> pd.DataFrame:
    """All findings on the logs: those met while reading and those seen only side by side."""
    odd = Oddities()
    _frameworks(logs, odd)
    _completeness(logs, rules, odd)
    _meta_data(logs, rules, odd)
    _trials(logs, rules, reached, odd)
    _clocks(rules, reached, odd)
    _seeds(logs, odd)
    odd.rows += step_outliers(reached)
    return merge(logs.oddities, odd.table())


def _frameworks(logs: Logs, odd: Oddities) -> None:
    for (submission, workload), part in logs.trials.groupby(["submission", "workload"])["framework"]:
        counts = part.value_counts().sort_index()
        if len(counts) > 1:
            detail = f"{workload}: " + ", ".join(f"{count} trials in {name}" for name, count in counts.items())
            odd.add("warning", str(submission), "mixed frameworks", detail, "the one with more studies is scored")
    pairs = logs.trials.drop_duplicates(["submission", "framework"])["submission"]
    alike = logs.trials.drop_duplicates(["submission", "workload", "framework"])
    double = set(alike.loc[alike.duplicated(["submission", "workload"]), "submission"])
    for name in sorted(set(pairs[pairs.duplicated()]) - double):
        odd.add("note", str(name), "mixed frameworks", "workloads differ in framework", "scored as they are")


def _completeness(logs: Logs, rules: Rules, odd: Oddities) -> None:
    keys = ["submission", "workload", "study"]
    counts = logs.trials.groupby(keys)["trial"].nunique().reset_index()
    studies = counts.groupby(["submission", "workload"]).size()
    for name in sorted(set(logs.trials["submission"])):
        for workload in rules.scored:
            present = int(studies.get((name, workload), 0))
            if present == 0:
                odd.add("warning", name, "missing workload", workload, "a miss")
            elif present < rules.studies:
                detail = f"{workload}: {present} of {rules.studies}"
                odd.add("warning", name, "missing study", detail, "each is a miss", rules.studies - present)
    counts = counts[counts["workload"].isin(list(rules.scored)) & (rules.trials > 0)]
    for row in records(counts[counts["trial"] != rules.trials]):
        place, detail = f"{row.submission}/{row.study}", f"{row.workload}: {row.trial} of {rules.trials}"
        if row.trial < rules.trials:
            odd.add("note", place, "missing trial", detail, "the others count", rules.trials - row.trial)
        else:
            odd.add("warning", place, "extra trials", detail, "those of the lowest numbers count")
    others = logs.trials[~logs.trials["workload"].isin(list(rules.scored))]
    for (one, other), part in others.groupby(["submission", "workload"]):
        known = other in rules.unscored or other in rules.targets
        what = "workload without credit" if known else "unknown workload"
        odd.add("note" if known else "warning", str(one), what, str(other), "not scored", len(part))


def _meta_data(logs: Logs, rules: Rules, odd: Oddities) -> None:
    table = logs.trials[logs.trials["workload"].isin(list(rules.targets))]
    known = {
        "target": {name: target.value for name, target in rules.targets.items()},
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


def _seeds(logs: Logs, odd: Oddities) -> None:
    known = logs.trials[logs.trials["seed"].fillna("") != ""]
    again = known[known.duplicated(["submission", "workload", "framework", "trial", "seed"])]
    for (submission, workload), part in again.groupby(["submission", "workload"]):
        detail = f"{workload}: studies share a seed"
        odd.add("note", str(submission), "same seed", detail, "studies may not be independent", len(part))


def step_outliers(reached: pd.DataFrame) -> list[tuple[str, str, str, str, str, int]]:
    """Submissions whose steps are no updates of the usual size, by time per step or by batch size."""
    odd = Oddities()
    typical = reached.groupby(["workload", "submission"])[["ms_per_step", "batch_size"]].median().reset_index()
    for workload, part in typical.groupby("workload"):
        if len(part) < 3:
            continue
        usual = part["ms_per_step"].median()
        batch = part["batch_size"].median()
        for row in records(part):
            if row.ms_per_step > STEP_SIZE * usual or row.ms_per_step < usual / STEP_SIZE:
                detail = f"{workload}: {row.ms_per_step:.3g} ms per step, the median submission needs {usual:.3g}"
                odd.add(
                    "warning", row.submission, "inner-loop steps", detail, "its steps-to-target is not comparable"
                )
            elif row.batch_size > 2 * batch or row.batch_size < batch / 2:
                detail = f"{workload}: batch size {row.batch_size:g}, the median is {batch:g}"
                odd.add(
                    "warning", row.submission, "other batch size", detail, "its steps-to-target is not comparable"
                )
    return odd.rows
