"""Finished trials as small files for the repository, and back: nothing of the machine, numbers to a few digits.

One file for each stage, workload and framework: JSON, compressed by xz. What all its trials share stands once, a
column of evaluations is a list, or one value if it never changes.
"""

from __future__ import annotations

import csv
import json
import lzma
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

from commands import atomic
from commands.errors import UserError
from workloads.runner import experiment
from workloads.runner.jobs import CHECKOUT
from workloads.runner.logs import write_table

STAGES = ("tuning", "race", "pace", "targets")
# Significant digits: of what scores and paces are made of, of other metrics, of other times.
DIGITS, METRIC_DIGITS, TIME_DIGITS = 6, 5, 3
FORMAT = 1
EXACT = ("target", "best_metric")  # of an outcome: what tuning ranks by
# Columns that repeat another, and are written back from it.
COPIES = {"score": "accumulated_submission_time"}
TIMED = "accumulated_eval_time"  # tells how fast the machine was
LEFT_OUT = ("os_platform",)  # of the meta data: it names the machine
Object: TypeAlias = dict[str, Any]
Chosen: TypeAlias = dict[str, dict[str, Object]]  # workload -> submission -> `chosen/<workload>/<submission>.json`


def pack(directory: Path, destination: Path) -> list[Path]:
    """Writes the finished trials below a directory of a suite or of targets; returns the files.

    What an archive at the destination has of other workloads stays: its trials, what was chosen, the commands.

    Raises:
        UserError: there is none.
    """
    groups: dict[str, list[Path]] = {}
    for stage in STAGES:
        for trial in sorted(directory.glob(f"{stage}/*/*/*/trial_*")):
            if experiment.outcome(trial) is not None:
                groups.setdefault(f"{stage}_{trial.parent.name}", []).append(trial)
    if not groups:
        raise UserError(f"{directory} holds no finished trial; give the --experiment_dir of a suite or of targets.")
    destination.mkdir(parents=True, exist_ok=True)
    written = []
    for name, trials in groups.items():
        packed = [_packed(trial, directory) for trial in trials]
        content = {"format": FORMAT, "common": _common(packed), "trials": packed}
        text = json.dumps(content, separators=(",", ":"), sort_keys=True)
        path = destination / f"{name}.json.xz"
        atomic.write_bytes(path, lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
        written.append(path)
    chosen = chosen_records(destination)
    for workload, records in chosen_records(directory).items():
        chosen[workload] = chosen.get(workload, {}) | records
    if chosen:
        path = destination / "chosen.json"
        atomic.write_text(path, json.dumps(chosen, indent=1) + "\n")
        written.append(path)
    notes = experiment.read_json(directory / "suite.json")
    if notes is not None:
        before: Object = experiment.read_json(destination / "suite.json") or {}
        now: Object = notes
        commands = dict.fromkeys([*before.get("commands", []), *now.get("commands", [])])
        atomic.write_json(destination / "suite.json", {**notes, "commands": list(commands)})
        written.append(destination / "suite.json")
    return written


def unpack(source: Path, directory: Path) -> int:
    """Writes the trials of an archive to where a suite looks for them; returns how many were not there yet.

    Raises:
        UserError: there is no archive, or a file of it cannot be read.
    """
    files = sorted(source.glob("*.json.xz"))
    if not files:
        raise UserError(f"{source} holds no archive (*.json.xz).")
    count = 0
    for path in files:
        try:
            content = json.loads(lzma.decompress(path.read_bytes()))
            trials = list(_unpacked(content))
        except (lzma.LZMAError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"The archive {path} cannot be read: {type(error).__name__}: {error}.") from None
        for name, files_of_trial, rows in trials:
            folder = directory / name
            if (folder / "outcome.json").exists():
                continue
            folder.mkdir(parents=True, exist_ok=True)
            write_table(folder / "eval_measurements.csv", rows)
            # The outcome last: with it the trial is finished.
            for file in ("hparams", "meta_data_0", "flags_0", "outcome"):
                if files_of_trial[file] is not None:
                    atomic.write_json(folder / f"{file}.json", files_of_trial[file])
            count += 1
    return count


def chosen_records(directory: Path) -> Chosen:
    """What a suite chose, from its directory or from an archive; empty where nothing was."""
    packed = experiment.read_json(directory / "chosen.json")
    if packed is not None:
        return cast(Chosen, packed)
    found: Chosen = {}
    for path in sorted(directory.glob("chosen/*/*.json")):
        record = None if path.name.endswith(".points.json") else experiment.read_json(path)
        if record is not None:
            found.setdefault(path.parent.name, {})[path.stem] = record
    return found


def chosen_points(record: Object) -> list[Object]:
    """The points a record of what was chosen names, best first."""
    return [found["point"] for found in record["ranking"][: len(record["chosen"])]]


def _packed(trial: Path, directory: Path) -> Object:
    outcome: Object = dict(experiment.outcome(trial) or {})
    meta = experiment.read_json(trial / "meta_data_0.json") or {}
    flags = experiment.read_json(trial / "flags_0.json") or {}
    return {
        "trial": str(trial.relative_to(directory)),
        "hparams": experiment.read_json(trial / "hparams.json"),
        "meta": {name: value for name, value in meta.items() if name not in LEFT_OUT},
        "flags": {name: _without_machine(value, directory) for name, value in flags.items()},
        "outcome": {name: value if name in EXACT else _rounded(value) for name, value in outcome.items()},
        "evaluations": _columns(
            trial / "eval_measurements.csv", outcome, bool(meta.get("workload.lower_is_better"))
        ),
    }


def _columns(path: Path, outcome: Mapping[str, Any], lower_is_better: bool) -> Object:
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns: Object = {name: [_number(row[name]) for row in rows] for name in (rows[0] if rows else ())}
    for name, source in COPIES.items():
        if columns.get(name) == columns.get(source):
            columns.pop(name, None)
    found: Object = {"": len(rows)}
    for name, exact in columns.items():
        digits = METRIC_DIGITS if "/" in name else TIME_DIGITS
        if name in (outcome["metric"], TIMED, *COPIES, *COPIES.values()):
            digits = DIGITS
        values = [_rounded(value, digits) for value in exact]
        if name == outcome["metric"]:
            # A number that rounding would carry over the target stays as it is.
            values = [
                one if _meets(one, outcome, lower_is_better) == _meets(value, outcome, lower_is_better) else value
                for one, value in zip(values, exact, strict=True)
            ]
        found[name] = values[0] if len(set(map(str, values))) == 1 else values
    return found


def _meets(value: Any, outcome: Mapping[str, Any], lower_is_better: bool) -> bool:
    if not isinstance(value, (int, float)):
        return False
    return value <= outcome["target"] if lower_is_better else value >= outcome["target"]


def _common(packed: Sequence[Object]) -> Object:
    """What all trials say of meta data, flags and outcome; it is taken out of each."""
    common: Object = {}
    for part in ("meta", "flags", "outcome"):
        first = packed[0][part]
        shared = {
            name: value
            for name, value in first.items()
            if all(name in one[part] and one[part][name] == value for one in packed)
        }
        common[part] = shared
        for one in packed:
            one[part] = {name: value for name, value in one[part].items() if name not in shared}
    return common


def _unpacked(content: Object) -> Iterator[tuple[str, Object, list[dict[str, Any]]]]:
    """Folder, files and evaluations of each trial."""
    if content["format"] != FORMAT:
        raise ValueError(f"format {content['format']}, where {FORMAT} is known")
    for one in content["trials"]:
        name = Path(one["trial"])
        if name.is_absolute() or ".." in name.parts:
            raise ValueError(f"a trial outside the folder: {name}")
        parts = {part: {**content["common"][part], **one[part]} for part in ("meta", "flags", "outcome")}
        files = {
            "hparams": one["hparams"],
            "meta_data_0": parts["meta"],
            "flags_0": parts["flags"],
            "outcome": parts["outcome"],
        }
        columns = dict(one["evaluations"])
        count = columns.pop("")
        full = {key: value if isinstance(value, list) else [value] * count for key, value in columns.items()}
        for copy, source in COPIES.items():
            if copy not in full and source in full:
                full[copy] = full[source]
        yield str(name), files, [{key: full[key][k] for key in full} for k in range(count)]


def _number(text: str) -> Any:
    """A number of a table, as JSON keeps it: whole ones as such, what is not finite or no number as text."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        value = float(text)
    except ValueError:
        return text
    return value if math.isfinite(value) else text


def _rounded(value: Any, digits: int = DIGITS) -> Any:
    return float(f"{value:.{digits}g}") if isinstance(value, float) and math.isfinite(value) else value


def _without_machine(value: Any, directory: Path) -> Any:
    """A flag's value with no path of this machine in it."""
    if not isinstance(value, str) or not Path(value).is_absolute():
        return value
    for root in (directory, CHECKOUT):
        if Path(value).is_relative_to(root):
            return str(Path(value).relative_to(root))
    return Path(value).name
