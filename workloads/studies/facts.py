"""What commands ask of workloads without a framework: order, constants, and how their targets were set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from workloads import registry, target_file


def task(name: str) -> Any:
    """The class that holds a workload's sizes and budget, as plain values in place of properties."""
    return registry.WORKLOADS[name].task()


def base_of(name: str) -> str:
    """The workload a held-out variant is one of; of a base workload its own name."""
    return registry.WORKLOADS[name].base


def validation_target(name: str) -> float:
    """The validation target of a workload."""
    return target_file.read(base_of(name), name).validation


def record(name: str) -> dict[str, Any]:
    """What the file of targets says of a workload; empty where it says nothing."""
    return target_file.entries(base_of(name)).get(name, {})


def in_order(names: Sequence[str]) -> list[str]:
    """Workloads as a suite runs them: base workloads before variants, each by the `suite_order` of its task."""
    return sorted(names, key=lambda name: (registry.WORKLOADS[name].is_variant, task(name).suite_order, name))
