"""The targets of a workload: `targets.json` in its folder, written by `python -m workloads.targets`."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

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
