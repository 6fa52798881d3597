"""The submissions of this repository, by the names of their folders."""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path
from types import ModuleType

from algoperf_kfac.config import KFACConfig
from commands import frameworks
from commands.errors import UserError
from submissions.common.description import Description, OptimizerConfig
from submissions.common.packages import MissingPackage

FOLDER = Path(__file__).resolve().parent


def path_of(submission: str, framework: str) -> Path:
    """The file AlgoPerf's runner is given."""
    return FOLDER / submission / framework / "submission.py"


def names_in(framework: str) -> list[str]:
    """The submissions that exist in a framework."""
    return sorted(path.parts[-3] for path in FOLDER.glob(f"*/{framework}/submission.py"))


def check(submission: str, framework: str) -> None:
    """Raises UserError unless there is that submission in that framework."""
    if not path_of(submission, framework).is_file():
        known = ", ".join(names_in(framework))
        raise UserError(f"there is no submission '{submission}' in {framework}; known: {known}")


def module_name(submission: str, framework: str) -> str:
    """The module of `path_of`."""
    return f"submissions.{submission}.{framework}.submission"


def load(submission: str, framework: str) -> ModuleType:
    """The module with AlgoPerf's functions and a `DESCRIPTION`.

    Raises:
        UserError: there is no such submission, or its framework or a package of its is not installed.
    """
    check(submission, framework)
    try:
        return importlib.import_module(module_name(submission, framework))
    except MissingPackage as error:
        raise UserError(str(error)) from None
    except ModuleNotFoundError as error:
        raise frameworks.missing(error, framework) from None


def describe(submission: str, framework: str) -> Description[OptimizerConfig]:
    """What a submission says of itself.

    Raises:
        UserError: as `load`.
    """
    described: Description[OptimizerConfig] = load(submission, framework).DESCRIPTION
    return described


def is_kfac(submission: str, framework: str) -> bool:
    """Whether K-FAC is its optimizer.

    Raises:
        UserError: as `load`.
    """
    return issubclass(describe(submission, framework).config, KFACConfig)


def kfac_config(submission: str, framework: str) -> KFACConfig:
    """The configuration of a K-FAC submission at its own point.

    Raises:
        UserError: as `load`, or it is no K-FAC submission.
    """
    _, config = describe(submission, framework).configure(None)
    if not isinstance(config, KFACConfig):
        known = " or ".join(_kfac_names(framework))
        raise UserError(f"{submission} is no K-FAC submission; plan {known}")
    return config


def _kfac_names(framework: str) -> list[str]:
    """The K-FAC submissions of a framework, as far as their packages are installed; K-FAC needs none."""
    found = []
    for name in names_in(framework):
        with contextlib.suppress(UserError):
            if is_kfac(name, framework):
                found.append(name)
    return found
