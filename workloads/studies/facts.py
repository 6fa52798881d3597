"""What commands ask of workloads without a framework: their order, bases, constants, and how targets were set."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from commands.errors import UserError
from workloads import registry

LAST = 1000  # the place of a workload without a `suite_order`


def task(name: str) -> Any:
    """The class that holds a workload's sizes, budget and targets, as plain values in place of properties."""
    entry = registry.WORKLOADS[name]
    return getattr(entry.module("task"), entry.task_name)


def base_of(name: str) -> str:
    """The workload a variant is one of; of a base workload its own name."""
    return getattr(registry.WORKLOADS[name], "base", name)


def is_tuned_on(name: str) -> bool:
    """Whether K-FAC's own point and algorithm were found on the workload, so that it is no test of them."""
    return bool(getattr(task(name), "tuned_on", False))


def in_order(names: Sequence[str]) -> list[str]:
    """Workloads as a suite runs them: base workloads before variants, then by `suite_order` of their tasks."""
    return sorted(names, key=lambda name: (base_of(name) != name, getattr(task(name), "suite_order", LAST), name))


def targets_file(name: str) -> Path:
    """Where a base workload keeps the targets of itself and its variants, and how they were set."""
    return Path(registry.__file__).parent / base_of(name) / "targets.json"


def record(name: str) -> dict[str, Any]:
    """What the file of targets says of a workload; empty where there is none.

    Raises:
        UserError: the file cannot be read.
    """
    path = targets_file(name)
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")).get(name, {})
        return found
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"The targets in {path} cannot be read: {error}.") from None
