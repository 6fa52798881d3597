"""How fast this machine's device is, measured once and kept in the user's cache: `plan --calibrate`."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from algoperf_kfac.seconds import TABLES, Speed
from commands import atomic
from commands.errors import UserError

SIZES = (64, 128, 256, 512, 1024, 2048)
SUMMED = 2**25  # entries of the array whose sums over positions are timed, 134 MB
REPEATS, PATIENCE = 5, 2.0  # the best of so many; no further ones after so many seconds
Operation = Callable[[], None]


class Device(Protocol):
    """What a framework's module `submissions.cli.*_speed` has."""

    def name(self) -> str:
        """The device's, and what of the software matters to its speed."""

    def operations(self, size: int) -> Mapping[str, Operation]:
        """By field of `Speed`, an operation on matrices of this size that returns when the device is done."""

    def sum_of(self, entries: int) -> Operation:
        """The sums over positions of so many numbers, shaped as `rows_of` says."""


def rows_of(entries: int) -> tuple[int, int, int]:
    """Examples, positions and features of so many numbers: a layer's input, at most 64 by 256 for each example."""
    features = math.gcd(entries, 256)
    positions = math.gcd(entries // features, 64)
    return entries // features // positions, positions, features


def device(framework: str) -> Device:
    """The device of a framework.

    Raises:
        UserError: the framework is not installed.
    """
    try:
        found: Device = importlib.import_module(f"submissions.cli.{framework}_speed")
    except ModuleNotFoundError as error:
        raise UserError(
            f"--framework={framework} needs the module '{error.name}', which is not installed"
        ) from None
    return found


def path() -> Path:
    """The file, in the folder that XDG_CACHE_HOME names, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "algoperf-kfac" / "calibration.json"


def measure(framework: str) -> Speed:
    """Times of this machine's device, the best of a few each."""
    here = device(framework)
    times: dict[str, dict[int, float]] = {field: {} for field in TABLES}
    for size in SIZES:
        for field, operation in here.operations(size).items():
            times[field][size] = _best(operation)
    rate = 4 * SUMMED / _best(here.sum_of(SUMMED))
    return Speed(here.name(), **times, bytes_per_second=rate)


def _best(operation: Operation) -> float:
    """Seconds of an operation that has run once already: that run compiles, and takes memory."""
    operation()
    seconds: list[float] = []
    while not seconds or (len(seconds) < REPEATS and sum(seconds) < PATIENCE):
        start = time.perf_counter()
        operation()
        seconds.append(time.perf_counter() - start)
    return max(min(seconds), 1e-9)  # a clock may not tell two moments apart


def keep(framework: str, speed: Speed) -> Path:
    """Puts a calibration into the file, beside those of other devices.

    Raises:
        UserError: the file cannot be read or written.
    """
    file = path()
    kept = _read(file) | {_key(framework, speed.device): dataclasses.asdict(speed)}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(file, json.dumps(kept, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}; XDG_CACHE_HOME names another folder") from None
    return file


def known(framework: str) -> Speed | None:
    """The calibration of this machine's device, None if there is none.

    Raises:
        UserError: the file is not one that `keep` wrote.
    """
    kept = _read(path())
    entry = kept.get(_key(framework, device(framework).name())) if kept else None
    if entry is None:
        return None
    try:
        tables = {field: {int(size): float(value) for size, value in entry[field].items()} for field in TABLES}
        return Speed(str(entry["device"]), **tables, bytes_per_second=float(entry["bytes_per_second"]))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(_BROKEN.format(path())) from None


_BROKEN = "{} is no calibration of this program; delete it, and measure again with --calibrate"


def _read(file: Path) -> dict[str, Any]:
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    except ValueError:
        raise UserError(_BROKEN.format(file)) from None
    if not isinstance(kept, dict):
        raise UserError(_BROKEN.format(file))
    return kept


def _key(framework: str, name: str) -> str:
    return f"{framework}: {name}"
