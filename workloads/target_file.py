"""The targets of a workload: `targets.json` in its folder, written by `python -m workloads.targets`."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands import atomic
from commands.errors import UserError

FOLDER = Path(__file__).resolve().parent
NAME = "targets.json"


@dataclass(frozen=True)
class Targets:
    """What a workload asks for.

    Attributes:
        validation, test: of the target metric.
        provisional: whether they were set by less than the rules of docs/workloads.md ask for.
    """

    validation: float
    test: float
    provisional: bool


def entries(base: str) -> dict[str, dict[str, Any]]:
    """All that the file of a folder says, by workload: the targets and how they were set; empty without a file.

    Raises:
        UserError: it cannot be read.
    """
    path = FOLDER / base / NAME
    try:
        found: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        return found
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it, or remove it.") from None


def write(base: str, name: str, entry: Mapping[str, object]) -> Path:
    """Puts the entry of a workload into the file of its folder; the others stay."""
    path = FOLDER / base / NAME
    atomic.write_text(path, json.dumps({**entries(base), name: entry}, indent=2) + "\n")
    read.cache_clear()
    return path


@functools.cache
def read(base: str, name: str) -> Targets:
    """The targets of the workload `name` whose folder is `base`.

    Raises:
        UserError: the file is missing or damaged, or has no entry of that name.
    """
    path = FOLDER / base / NAME
    remedy = f"set them by `python -m workloads.targets --workloads={name}`"
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))[name]
        found = Targets(float(entry["validation"]), float(entry["test"]), bool(entry["provisional"]))
    except FileNotFoundError:
        raise UserError(f"The workload '{base}' has no {NAME}; {remedy}.") from None
    except KeyError as error:
        raise UserError(f"{path} has no entry {error} for '{name}'; {remedy}.") from None
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); {remedy}.") from None
    if not (math.isfinite(found.validation) and math.isfinite(found.test)):
        raise UserError(f"{path}: the targets of '{name}' are not finite; {remedy}.")
    return found
