"""Which folders are trials, and of which submission, study and workload; and what lies beside them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from scoring.oddities import Oddities
from scoring.read.folders import Entry, Folder, archive_stem, is_log

WORKLOAD = re.compile(r"(.+)_(jax|pytorch)")
TRIAL = re.compile(r"trial_(\d+)")
STUDY = re.compile(r"(?:study|seed|rep|repetition)?[ _-]?\d+", re.IGNORECASE)
# The official runner may append the time of start to an experiment's name; its scorer reads such folders as one.
TIMESTAMP = re.compile(r"-\d{4}(?:-\d{2}){5}$")
KNOWN_FILES = ("measurements.csv", "plot.png")


@dataclass(frozen=True, slots=True)
class TrialFolder:
    """One trial: where it belongs, and its files."""

    submission: str
    study: str
    workload: str
    framework: str
    trial: int
    where: str
    files: dict[str, Entry]
    above: str

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        """What names a trial: no two may share it."""
        return (self.submission, self.study, self.workload, self.framework, self.trial)

    def named(self, prefix: str) -> list[tuple[str, Entry]]:
        """Its files ``<prefix><k>.json`` in the order of k: one for each start of the run."""
        names = [name for name in self.files if name.startswith(prefix) and name.endswith(".json")]
        return [(name, self.files[name]) for name in sorted(names, key=lambda name: (len(name), name))]


def find_trials(found: Iterable[Folder], odd: Oddities) -> list[TrialFolder]:
    """The trials among ``found``; everything beside them is reported and left alone."""
    trials: list[TrialFolder] = []
    found = list(found)
    homes = {folder.parts[:-1] for folder in found if WORKLOAD.fullmatch(folder.parts[-1])}
    for folder in found:
        name = folder.parts[-1] if folder.parts else ""
        parent = folder.parts[-2] if len(folder.parts) > 1 else ""
        in_workload = WORKLOAD.fullmatch(parent)
        trial = TRIAL.fullmatch(name)
        if trial and in_workload:
            trials.append(_trial(folder, int(trial[1]), in_workload))
        elif in_workload:
            what = "backup directory" if name.startswith("trial") else "stray directory"
            odd.add("warning", folder.where, what, "beside the trials of a workload", "ignored")
        elif "eval_measurements.csv" in folder.files:
            odd.add("warning", folder.where, "trial outside a workload", f"its parent is {parent!r}", "ignored")
        elif folder.parts[:-1] in homes and not WORKLOAD.fullmatch(name):
            odd.add("note", folder.where, "stray directory", "not named <workload>_<framework>", "ignored")
        if not (trial and in_workload):
            _strays(folder, odd)
    return trials


def _trial(folder: Folder, number: int, workload: re.Match[str]) -> TrialFolder:
    above = folder.parts[:-2]
    study = "study_0"
    if above and STUDY.fullmatch(above[-1]):
        study, above = above[-1], above[:-1]
    submission = TIMESTAMP.sub("", above[-1]) if above else "unnamed"
    parent = above[-2] if len(above) > 1 else ""
    return TrialFolder(submission, study, workload[1], workload[2], number, folder.where, folder.files, parent)


def _strays(folder: Folder, odd: Oddities) -> None:
    names = [name for name in folder.files if archive_stem(name) is None and not is_log(name)]
    if names:
        shown = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
        odd.add("note", folder.where, "stray file", shown, "ignored", len(names))


def distinct(groups: list[list[TrialFolder]], odd: Oddities) -> list[TrialFolder]:
    """The trials of several inputs under names that differ.

    The same trial twice in one input (an archive beside its unpacked folder, say) counts once; a submission of the
    same name in another input is another submission and takes the name of the folder above it in front.
    """
    kept: dict[tuple[str, str, str, str, int], TrialFolder] = {}
    places: set[str] = set()
    for trials in groups:
        trials = [trial for trial in trials if _place(trial) not in places]
        clashing = {trial.submission for trial in trials if trial.key in kept}
        for trial in sorted(trials, key=lambda trial: (trial.key, _place(trial))):
            if trial.submission in clashing:
                trial = replace(trial, submission=f"{trial.above}/{trial.submission}")
            if trial.key in kept:
                odd.add("warning", trial.where, "duplicate trial", f"also at {kept[trial.key].where}", "ignored")
                continue
            kept[trial.key] = trial
        for name in sorted(clashing):
            odd.add(
                "note", name, "same name twice", "two inputs hold a submission of this name", "the second renamed"
            )
        places |= {_place(trial) for trial in trials}
    return [kept[key] for key in sorted(kept)]


def _place(trial: TrialFolder) -> str:
    entry = trial.files.get("eval_measurements.csv")
    return entry.path if entry is not None and entry.path else trial.where
