"""Which folder of a trial counts where there are several: the same twice, a restart beside it, a backup.

Adding a fragment must never change a score, so the most complete copy counts, whatever it is called.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from scoring import facts
from scoring.frames import records
from scoring.metrics import higher_is_better
from scoring.oddities import Oddities
from scoring.read.layout import ANYWHERE, Key, Parts, TrialFolder


def group(inputs: list[list[TrialFolder]], odd: Oddities) -> list[TrialFolder]:
    """The trials of several inputs in the order of their keys, copies of one trial side by side.

    The same folder given twice counts once. A submission of the same name in another folder is another submission
    and takes the name of that folder in front. In the same folder they are time-stamped starts of one.
    """
    kept: list[TrialFolder] = []
    taken: dict[Key, Parts] = {}
    places: set[str] = set()
    for trials in _by_home(inputs):
        trials = [trial for trial in trials if _place(trial) not in places]
        clashing = {trial.submission for trial in trials if _apart(trial.home, taken.get(trial.key, ANYWHERE))}
        trials = [_renamed(trial) if trial.submission in clashing else trial for trial in trials]
        for name in sorted(clashing):
            detail = "two folders hold a submission of this name"
            odd.add("note", name, "same name twice", detail, "the second renamed")
        kept += trials
        taken |= {trial.key: trial.home for trial in trials}
        places |= {_place(trial) for trial in trials}
    _note_merged(kept, odd)
    # The plain name before a backup, the earlier start before the later: of equal copies the first counts.
    return sorted(kept, key=lambda trial: (trial.key, trial.backup, trial.where))


def _by_home(inputs: list[list[TrialFolder]]) -> Iterator[list[TrialFolder]]:
    """The trials of each input, those of one folder of submissions together; what may lie anywhere comes last."""
    for trials in inputs:
        homes = sorted({trial.home for trial in trials}, key=lambda home: (home == ANYWHERE, home))
        for home in homes:
            yield [trial for trial in trials if trial.home == home]


def _apart(one: Parts, other: Parts) -> bool:
    return one != other and ANYWHERE not in (one, other)


def _renamed(trial: TrialFolder) -> TrialFolder:
    above = trial.home[-1] if trial.home else ""
    return replace(trial, submission=f"{above}/{trial.submission}")


def _note_merged(trials: list[TrialFolder], odd: Oddities) -> None:
    """One name in two folders whose trials do not clash is read as one submission, and said."""
    homes: dict[str, set[Parts]] = {}
    for trial in trials:
        if trial.home != ANYWHERE:
            homes.setdefault(trial.submission, set()).add(trial.home)
    for name, found in sorted(homes.items()):
        if len(found) > 1:
            detail = f"its trials lie in {len(found)} folders"
            odd.add(
                "warning", name, "one name in several folders", detail, "read as one: rename one if they are two"
            )


def _place(trial: TrialFolder) -> str:
    entry = trial.files.get("eval_measurements.csv")
    return entry.path if entry is not None and entry.path else trial.where


def choose(trials: Sequence[TrialFolder], table: pd.DataFrame, evals: pd.DataFrame, odd: Oddities) -> list[int]:
    """Positions of the copies that count, one for each key, in order.

    Args:
      trials: as ``group`` returns them; the position is the trial_id.
      table: one row per trial, with ``evaluations`` and what its meta_data state.
      evals: one row per evaluation, of all copies.
    """
    copies: dict[Key, list[int]] = {}
    for position, trial in enumerate(trials):
        copies.setdefault(trial.key, []).append(position)
    chosen = []
    for positions in copies.values():
        if len(positions) == 1:
            if trials[positions[0]].backup:
                trial = trials[positions[0]]
                detail = f"there is no trial_{trial.trial} but this copy"
                odd.add("warning", trial.where, "only a backup", detail, "it counts")
            chosen.append(positions[0])
            continue
        parts = {k: evals[(evals["trial_id"] == k) & evals["believed"]] for k in positions}
        facts = dict(zip(positions, records(table.iloc[positions]), strict=True))
        # max() keeps the first of equals.
        best = max(positions, key=lambda k: _completeness(facts[k], parts[k]))
        chosen.append(best)
        for k in positions:
            if k != best:
                _report(trials[k].where, trials[best].where, parts[k], parts[best], odd)
    return chosen


def _completeness(trial: Any, evals: pd.DataFrame) -> tuple[bool, float, float]:
    """Whether the run came to its end, by its meta_data or else the benchmark's target; if not, how far it came.

    Of several runs that came to their end none is more complete: the first in order counts, not the best.
    """
    if evals.empty:
        return (False, -1.0, 0.0)
    last = evals.iloc[-1]
    # Self-tuning has up to three times the budget; where no flags exclude it, less is no end.
    budget = trial.budget * (1.0 if trial.ruleset == "external" else 3.0)
    ended = last["time"] >= 0.97 * budget or any(
        last["step"] >= limit for limit in (trial.max_global_steps, trial.ended_at)
    )
    known = facts.targets().get(trial.workload)
    if trial.metric and np.isfinite(trial.target):
        lower = trial.lower_is_better
        known = (trial.metric, trial.target, lower == "no" if lower else higher_is_better(trial.metric))
    if known and f"validation/{known[0]}" in evals:
        metric, target, upward = known
        values = evals[f"validation/{metric}"]
        hit = values >= target if upward else values <= target
        ended = ended or bool(hit.any())
    return (True, 0.0, 0.0) if ended else (False, float(last["step"]), float(len(evals)))


def _report(here: str, other: str, mine: pd.DataFrame, theirs: pd.DataFrame, odd: Oddities) -> None:
    one, two = (part.drop(columns=["trial_id", "row"]).to_numpy(dtype=float) for part in (mine, theirs))
    if np.array_equal(one, two, equal_nan=True):
        odd.add("warning", here, "duplicate trial", f"the same rows as {other}", "counted once")
        return
    detail = f"differs: {_extent(mine)} here, {_extent(theirs)} in {other}"
    odd.add("warning", here, "duplicate trial", detail, "the more complete copy counts, this one does not")


def _extent(evals: pd.DataFrame) -> str:
    return f"{len(evals)} evaluations to step {evals['step'].iloc[-1]:.0f}" if len(evals) else "no evaluation"
