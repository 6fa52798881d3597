"""Finds what the plan's flags name: AlgoPerf's workloads, and functions of the user's."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from commands.errors import UserError
from submissions.common.api import Tree, Workload
from workloads.algoperf import FROM_1_0, NOT_INSTALLED, OLDER, is_older


def official_workload(name: str, framework: str) -> Workload:
    """An instance of AlgoPerf's workload.

    Raises:
        UserError: AlgoPerf is not installed, or has no such workload.
    """
    try:
        from algoperf.workloads import workloads
    except ImportError:
        raise UserError(f"workload '{name}' is none of this repository's, and {NOT_INSTALLED}") from None
    if name not in workloads.WORKLOADS:
        if name == FROM_1_0 and is_older():
            raise UserError(f"unknown workload '{name}'. {OLDER}")
        raise UserError(f"unknown workload '{name}'; AlgoPerf's are {', '.join(sorted(workloads.WORKLOADS))}")
    entry = workloads.WORKLOADS[name]
    path = f"{workloads.BASE_WORKLOADS_DIR}{entry['workload_path']}_{framework}/workload.py"
    try:
        workload: Workload = workloads.import_workload(path, entry["workload_class_name"], return_class=True)()
    except ModuleNotFoundError as error:
        raise UserError(f"workload '{name}' needs the module '{error.name}', which is not installed") from None
    return workload


def load(reference: str) -> Callable[[], Tree]:
    """A function by "package.module:function".

    Raises:
        UserError: there is no such function.
    """
    module_name, _, function_name = reference.partition(":")
    try:
        function: Callable[[], Tree] = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--model={reference}: {error}; give it as package.module:function") from None
    except Exception as error:  # whatever the user's module does when it is imported
        raise UserError(f"--model={reference}: importing it raises {line(error)}") from error
    if not callable(function):
        raise UserError(f"--model={reference} is no function")
    return function


def line(error: Exception) -> str:
    """What went wrong, on one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
