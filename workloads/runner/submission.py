"""Loads a submission by the path of its file and checks that it has AlgoPerf's functions."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from commands.errors import UserError
from submissions.common.api import DataSelection, InitOptimizerState, PrepareForEval, UpdateParams
from submissions.common.packages import MissingPackage

# What a file imports of a framework, as words in the names of packages and modules.
_WORDS = {"pytorch": {"torch", "pytorch"}, "jax": {"jax", "flax", "optax"}}

REQUIRED = ("init_optimizer_state", "update_params", "data_selection", "get_batch_size")


@dataclass(frozen=True)
class Submission:
    """AlgoPerf's functions of a submission, and whether `update_params` wants the training state."""

    init_optimizer_state: InitOptimizerState
    update_params: UpdateParams
    data_selection: DataSelection
    get_batch_size: Callable[[str], int]
    prepare_for_eval: PrepareForEval | None
    get_eval_batch_size: Callable[[str], int] | None
    needs_train_state: bool


def load(path: str) -> Submission:
    """The submission in a Python file.

    Raises:
        UserError: there is no such file, it cannot be imported, or it or one of its packages lacks something.
    """
    if not os.path.isfile(path):
        raise UserError(f"The submission {path} does not exist; give its Python file as --submission_path.")
    try:
        module = _import(Path(path))
    except MissingPackage as error:
        raise UserError(str(error)) from None
    except Exception as error:
        raise UserError(f"The submission {path} cannot be imported: {type(error).__name__}: {error}.") from error
    missing = [name for name in REQUIRED if not callable(getattr(module, name, None))]
    if missing:
        raise UserError(f"The submission {path} lacks {', '.join(missing)}; it needs {', '.join(REQUIRED)}.")
    return Submission(
        **{name: getattr(module, name) for name in REQUIRED},
        prepare_for_eval=getattr(module, "prepare_for_eval", None),
        get_eval_batch_size=getattr(module, "get_eval_batch_size", None),
        needs_train_state="train_state" in inspect.signature(module.update_params).parameters,
    )


def check_framework(path: str, framework: str) -> None:
    """Raises UserError if a submission's file imports from another framework than it is to run in, and not from it.

    A file that says nothing of either, or that cannot be read, is left to `load`.
    """
    try:
        tree = ast.parse(Path(path).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    names = [
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (getattr(node, "module", None), *(alias.name for alias in node.names))
        if name
    ]
    words = {word for name in names for word in re.split(r"[._]", name)}
    found = sorted(name for name, own in _WORDS.items() if not words.isdisjoint(own))
    if found and framework not in found:
        raise UserError(
            f"The submission {path} is for {found[0]}, by what it imports, and not for {framework}: give "
            f"--framework={found[0]}, or the file of a submission for {framework}."
        )


def batch_size(submission: Submission, workload_name: str, devices: int) -> int:
    """The submission's global batch size.

    Raises:
        UserError: it knows none for the workload, or it does not divide by the number of devices.
    """
    try:
        size = submission.get_batch_size(workload_name)
    except ValueError as error:
        raise UserError(f"The submission has no batch size for workload '{workload_name}': {error}.") from None
    check_divides("batch size", size, devices)
    return size


def check_divides(name: str, size: object, devices: int) -> None:
    """Raises UserError unless `size` is a positive integer divisible by the number of devices."""
    if not isinstance(size, int) or size < 1:
        raise UserError(f"The {name} must be a positive integer, the submission gave {size!r}.")
    if size % devices:
        raise UserError(
            f"The {name} {size} does not divide by the {devices} devices; "
            "use a number of devices that divides it (torchrun --nproc_per_node, in JAX JAX_NUM_CPU_DEVICES)."
        )


def _import(path: Path) -> ModuleType:
    resolved, here = path.resolve(), Path.cwd().resolve()
    inside = resolved.is_relative_to(here)
    parts = resolved.relative_to(here).with_suffix("").parts if inside else ()
    # As the official harness does: a module path relative to the current folder, so that imports between the
    # submission's own files work.
    if inside and all(part.isidentifier() for part in parts):
        if str(here) not in sys.path:
            sys.path.insert(0, str(here))
        return importlib.import_module(".".join(parts))
    spec = importlib.util.spec_from_file_location(f"submission_{abs(hash(resolved))}", resolved)
    if spec is None or spec.loader is None:
        raise ImportError("not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
