"""Which folders are trials, and of which submission, study and workload; and what lies beside them.

A workload folder is one that holds trials, whatever it is called; ``_jax`` or ``_pytorch`` at the end of its name
is the framework. Above it stands the study and above that the submission. A folder named like a study (``study_3``)
is one; of other names, the study is the one above the workload only if the submission lies below the input as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from scoring.oddities import Oddities
from scoring.read.folders import Entry, Folder, archive_stem, is_log

WORKLOAD = re.compile(r"(.+)_(jax|pytorch)")
TRIAL = re.compile(r"trial_(\d+)")
# A copy somebody put aside: trial_1_backup, trial_1.old, trial_1 (copy).
BACKUP = re.compile(r"trial_(\d+)\D.*")
STUDY = re.compile(r"(?:study|seed|rep|repetition)?[ _-]?\d+", re.IGNORECASE)
# The same of a whole study: study_1_backup, study_1.old, study_1 (copy). Other endings name studies of their own.
_ASIDE = "backup|bak|old|copy|orig|saved?|tmp|broken|failed|crashed|aborted|partial"
STUDY_BACKUP = re.compile(rf"((?:study|seed|rep|repetition)[ _-]?\d+)[ _.(-]+(?:{_ASIDE})\b.*", re.IGNORECASE)
# The official runner may append the time of start to an experiment's name; its scorer reads such folders as one.
TIMESTAMP = re.compile(r"-\d{4}(?:-\d{2}){5}$")

Parts = tuple[str, ...]
# The home of what an archive among other files holds: it is packed from what may well lie beside it.
ANYWHERE: Parts = ()
Key = tuple[str, str, str, str, int]


@dataclass(frozen=True, slots=True)
class TrialFolder:
    """One trial: where it belongs, and its files.

    Attributes:
      home: the folder above the submission, by all its parts; its name tells submissions of one name apart.
      backup: whether the folder is a copy put aside.
      usual: whether the study is named as studies are.
    """

    submission: str
    study: str
    workload: str
    framework: str
    trial: int
    where: str
    files: dict[str, Entry]
    home: Parts
    backup: bool = False
    usual: bool = True

    @property
    def key(self) -> Key:
        """What names a trial; folders that share it are copies."""
        return (self.submission, self.study, self.workload, self.framework, self.trial)

    def named(self, prefix: str) -> list[tuple[str, Entry]]:
        """Its files ``<prefix><k>.json`` in the order of k: one for each start of the run."""
        names = [name for name in self.files if name.startswith(prefix) and name.endswith(".json")]
        return [(name, self.files[name]) for name in sorted(names, key=lambda name: (len(name), name))]


def find_trials(found: Iterable[Folder], root: Parts, odd: Oddities) -> list[TrialFolder]:
    """The trials among the folders of one input; everything beside them is reported and left alone."""
    found = list(found)
    homes = _workload_folders(found)
    above_workloads = {home[:-1] for home in homes}
    trials: list[TrialFolder] = []
    for folder in found:
        name = folder.parts[-1] if folder.parts else ""
        parent = folder.parts[:-1]
        number = TRIAL.fullmatch(name) or BACKUP.fullmatch(name)
        if parent in homes and number:
            backup = not TRIAL.fullmatch(name)
            if backup:
                action = "counts only where it is the more complete copy"
                odd.add("warning", folder.where, "backup directory", "beside the trials of a workload", action)
            trials.append(_trial(folder, int(number[1]), root, backup))
            continue
        if parent in homes:
            what = "backup directory" if name.startswith("trial") else "stray directory"
            if "eval_measurements.csv" in folder.files:
                odd.add("error", folder.where, what, "holds a trial", "lost: name it trial_<number>")
            else:
                odd.add("warning", folder.where, what, "beside the trials of a workload", "ignored")
        elif "eval_measurements.csv" in folder.files:
            detail = f"its parent {parent[-1] if parent else ''!r} is no folder of a workload"
            odd.add("error", folder.where, "trial outside a workload", detail, "lost: move it into one")
        elif parent in above_workloads and folder.parts not in homes:
            odd.add("note", folder.where, "stray directory", "holds no trial", "ignored")
        _strays(folder, odd)
    return trials


def _workload_folders(found: list[Folder]) -> set[Parts]:
    """The folders that hold trials, but for those that hold workloads: a trial lying there has none."""
    candidates: set[Parts] = set()
    for folder in found:
        parent = folder.parts[:-1]
        if not parent or not TRIAL.fullmatch(folder.parts[-1]):
            continue
        logged = any(is_log(name) for name in folder.files)
        if WORKLOAD.fullmatch(parent[-1]) or (logged and not STUDY.fullmatch(parent[-1])):
            candidates.add(parent)
    holding = {home[:depth] for home in candidates for depth in range(len(home))}
    return candidates - holding


def _trial(folder: Folder, number: int, root: Parts, backup: bool) -> TrialFolder:
    *above, name = folder.parts[:-1]
    suffixed = WORKLOAD.fullmatch(name)
    workload, framework = (suffixed[1], suffixed[2]) if suffixed else (name, "")
    study, usual = "study_0", True
    last = TIMESTAMP.sub("", above[-1]) if above else ""
    copy = STUDY_BACKUP.fullmatch(last)
    if above and (STUDY.fullmatch(last) or copy):
        study, backup = (copy[1], True) if copy else (last, backup)
        above.pop()
    elif len(above) - len(root) >= 2:
        study, usual = last, False
        above.pop()
    submission = TIMESTAMP.sub("", above[-1]) if above else "unnamed"
    return TrialFolder(
        submission, study, workload, framework, number, folder.where, folder.files, tuple(above[:-1]), backup, usual
    )


def _strays(folder: Folder, odd: Oddities) -> None:
    names = [name for name in folder.files if archive_stem(name) is None and not is_log(name)]
    if names:
        shown = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
        odd.add("note", folder.where, "stray file", shown, "ignored", len(names))
