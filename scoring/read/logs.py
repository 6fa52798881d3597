"""Read run directories, submission directories, directories of submissions, and archives into one tidy table."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import numpy as np
import numpy.typing as npt
import pandas as pd

from commands.errors import UserError
from scoring.oddities import Oddities
from scoring.read import cache, copies, sanity
from scoring.read.archives import unpack
from scoring.read.describe import describe
from scoring.read.folders import Folder, Survey, survey
from scoring.read.layout import ANYWHERE, TrialFolder, find_trials
from scoring.read.parse import parse

NAMES = ("submission", "study", "workload", "framework", "trial", "hyperparameters")
Patterns = str | Sequence[str] | None


@dataclass(frozen=True)
class Logs:
    """What was read.

    Attributes:
      evals: one row per evaluation: submission, study, workload, framework, trial, hyperparameters (JSON), step,
        time (seconds of accumulated submission time), the other clocks, believed, and one column per metric, such
        as ``validation/accuracy``. Rows of one trial stand together, in the order of steps.
      trials: one row per trial folder, with what its meta_data and flags say; ``trial_id`` joins the two.
      oddities: everything odd met on the way: level, where, what, detail, action, count.
      inputs: the directories and archives it was read from.
    """

    evals: pd.DataFrame
    trials: pd.DataFrame
    oddities: pd.DataFrame
    inputs: tuple[str, ...] = ()

    def select(
        self,
        submission: Patterns = None,
        workload: Patterns = None,
        framework: Patterns = None,
        exclude: Patterns = None,
    ) -> Logs:
        """The trials whose names match, with their evaluations.

        Each argument is a pattern such as ``muon*``, several separated by commas, or a list of patterns; None takes
        all. ``exclude`` leaves submissions out. A submission may be named with its framework, ``nadamw (jax)``.

        Raises:
          UserError: a pattern matches nothing, or nothing is left.
        """
        keep = np.ones(len(self.trials), dtype=bool)
        wanted = {"submission": submission, "workload": workload, "framework": framework}
        for column, patterns in wanted.items():
            if patterns is not None:
                keep &= _matching(self.trials, patterns, column)
        if exclude is not None:
            keep &= ~_matching(self.trials, exclude, "submission")
        if not keep.any():
            raise UserError("no trial is left: choose fewer or other submissions, workloads and frameworks")
        trials = self.trials[keep].reset_index(drop=True)
        evals = self.evals[np.isin(self.evals["trial_id"].to_numpy(), trials["trial_id"].to_numpy())]
        return replace(self, evals=evals.reset_index(drop=True), trials=trials)


def _matching(trials: pd.DataFrame, patterns: str | Sequence[str], kind: str) -> npt.NDArray[np.bool_]:
    """Which trials have a name that matches one of the patterns; a name in full matches itself."""
    parts = patterns.split(",") if isinstance(patterns, str) else patterns
    columns = [trials[kind]]
    if kind == "submission":
        columns.append(trials["submission"] + " (" + trials["framework"] + ")")
    keep = np.zeros(len(trials), dtype=bool)
    for pattern in (part.strip() for part in parts):
        mine = np.any([[_matches(name, pattern) for name in column] for column in columns], axis=0)
        if not mine.any():
            raise UserError(f"no {kind} is called {pattern}: there are {', '.join(sorted(set(trials[kind])))}")
        keep |= mine
    return keep


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)


def read(roots: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], use_cache: bool = True) -> Logs:
    """The logs below ``roots``: directories at any level from a trial up, or archives.

    Args:
      roots: one path or several.
      use_cache: keep what was parsed, and read it again only if a file has changed; archives are then not opened.

    Raises:
      UserError: a root does not exist, or holds no trial.
    """
    inputs = [roots] if isinstance(roots, (str, os.PathLike)) else list(roots)
    odd = Oddities()
    found = [(str(root), survey(root, odd)) for root in inputs]
    key = cache.key([root for root, _ in found], [line for _, part in found for line in part.signature()])
    stored = cache.load(key) if use_cache else None
    if stored is None:
        evals, trials = _read(found, odd)
        if use_cache:
            cache.store(key, evals, trials, odd.rows)
    else:
        evals, trials, odd.rows = stored
    return Logs(_named(evals, trials), trials, odd.table(), tuple(str(root) for root in inputs))


def _read(found: list[tuple[str, Survey]], odd: Oddities) -> tuple[pd.DataFrame, pd.DataFrame]:
    groups = []
    for root, part in found:
        # A trial or workload given by itself is judged by its own name; only what it lies in is missing.
        trials = _trials(part, odd)
        if not trials:
            raise UserError(f"{root}: holds no trial (<workload>_<framework>/trial_<i>/eval_measurements.csv)")
        groups.append(trials)
    folders = copies.group(groups, odd)
    table = pd.DataFrame([describe(trial, odd) for trial in folders])
    where = [trial.where for trial in folders]
    evals = sanity.check(parse(_contents(folders, odd), odd), where, odd)
    counts = np.bincount(evals["trial_id"].to_numpy()[evals["believed"].to_numpy()], minlength=len(folders))
    table["evaluations"] = counts
    chosen = copies.choose(folders, table, evals, odd)
    evals, table = _only(chosen, evals, table)
    _excuse({where[k] for k in range(len(folders))} - {where[k] for k in chosen}, odd)
    table = _separate(table, odd)
    sanity.missing_metrics(evals, table, table["metric"], odd)
    return evals, table


def _trials(part: Survey, odd: Oddities) -> list[TrialFolder]:
    found = find_trials(part.folders, part.root, odd)
    for archive in part.archives:
        inside = unpack(archive, odd)
        # An archive is often packed with its one folder: what lies in there is as deep as in the folder itself.
        root = _single_top(inside)
        packed = find_trials(inside, root, odd)
        found += [replace(trial, home=ANYWHERE) for trial in packed] if part.folders else packed
    return found


def _single_top(inside: list[Folder]) -> tuple[str, ...]:
    top = inside[0]
    return (*top.parts, top.subfolders[0]) if len(top.subfolders) == 1 and not top.files else top.parts


def _contents(trials: list[TrialFolder], odd: Oddities) -> Iterator[tuple[int, str, bytes]]:
    for trial_id, trial in enumerate(trials):
        entry = trial.files.get("eval_measurements.csv")
        if entry is None:
            odd.add("error", trial.where, "no measurements", "no eval_measurements.csv", "the trial has no data")
            continue
        try:
            yield trial_id, trial.where, entry.read()
        except OSError as error:
            odd.add("error", trial.where, "unreadable", str(error.strerror), "the trial has no data")


def _only(chosen: list[int], evals: pd.DataFrame, table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The tables of the chosen trials, which are numbered anew."""
    if len(chosen) < len(table):
        number = np.full(len(table), -1, dtype=np.int32)
        number[chosen] = np.arange(len(chosen), dtype=np.int32)
        evals = evals.assign(trial_id=number[evals["trial_id"].to_numpy()])
        evals = evals[evals["trial_id"] >= 0]
        order = np.argsort(evals["trial_id"].to_numpy(), kind="stable")
        evals = evals.iloc[order].reset_index(drop=True)
        table = table.iloc[chosen].reset_index(drop=True)
    table = table.copy()
    table.insert(0, "trial_id", np.arange(len(table)))
    return evals, table


def _excuse(dropped: set[str], odd: Oddities) -> None:
    """What is wrong with a copy that does not count has cost nothing."""
    kept = ("duplicate trial", "backup directory")
    odd.rows = [
        ("note", where, what, detail, "another copy of the trial counts", count)
        if where in dropped and what not in kept
        else (level, where, what, detail, action, count)
        for level, where, what, detail, action, count in odd.rows
    ]


def _separate(table: pd.DataFrame, odd: Oddities) -> pd.DataFrame:
    """Studies of unusual names are submissions of their own if they were started from different files.

    Only the flags can tell a folder of runs from a submission whose studies have names of their own.
    """
    odd_names = table[~table["usual"]]
    if odd_names.empty:
        return table.drop(columns="usual")
    table = table.copy()
    for name, part in odd_names.groupby("submission"):
        paths = part.groupby("study")["submission_path"].agg(lambda column: column.iloc[0])
        studies = ", ".join(sorted(set(part["study"]))[:5])
        if paths.nunique() > 1:
            table.loc[part.index, "submission"] = part["study"]
            table.loc[part.index, "study"] = "study_0"
            detail = f"{studies}: their flags name different submission files"
            odd.add("note", str(name), "folder of runs", detail, "each is a submission")
        elif part["study"].nunique() > 1 or not paths.iloc[0]:
            action = "read as studies; if they are submissions, give this folder itself as input"
            odd.add("warning", str(name), "unusual study names", studies, action)
    keys = ["submission", "study", "workload", "framework", "trial"]
    if table.duplicated(keys).any():
        raise UserError(f"two runs are called {table[table.duplicated(keys)]['submission'].iloc[0]}: rename one")
    return table.drop(columns="usual")


def _named(evals: pd.DataFrame, trials: pd.DataFrame) -> pd.DataFrame:
    """The evaluations with the names of their trials, as categories: a few bytes a row."""
    ids = evals["trial_id"].to_numpy()
    names = {}
    for name in NAMES:
        if name == "trial":
            names[name] = pd.Series(trials[name].to_numpy()[ids], dtype="int32")
        else:
            whole = pd.Categorical(trials[name])
            names[name] = pd.Series(pd.Categorical.from_codes(whole.codes[ids], dtype=whole.dtype))
    return pd.concat([pd.DataFrame(names), evals], axis=1)
