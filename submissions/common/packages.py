"""Packages that a submission needs beside its framework: found, or named with the line that installs them."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Package:
    """A package on PyPI.

    Attributes:
        name: on PyPI.
        version: the release it was tried with, and the oldest that is taken.
        reason: why it is needed, in half a sentence; an export lists it.
        module: what is imported, where it is called otherwise.
    """

    name: str
    version: str
    reason: str
    module: str = ""

    @property
    def requirement(self) -> str:
        """As pip takes it."""
        return f"{self.name}=={self.version}"

    def is_installed(self) -> bool:
        """Whether that release or a newer one can be imported; nothing is imported."""
        if importlib.util.find_spec(self.module or self.name) is None:
            return False
        try:
            return _numbers(importlib.metadata.version(self.name)) >= _numbers(self.version)
        except importlib.metadata.PackageNotFoundError:  # a folder on the path, without its records
            return True


class MissingPackage(ModuleNotFoundError):
    """A submission's package is not installed; the message is one line, with the remedy."""


def require(packages: Iterable[Package], title: str) -> None:
    """Raises MissingPackage, with a line for pip, unless all packages are installed.

    Args:
        title: the submission's.
    """
    missing = [package for package in packages if not package.is_installed()]
    if missing:
        names = " and ".join(f"{package.name} {package.version}" for package in missing)
        line = " ".join(f"'{package.requirement}'" for package in missing)
        raise MissingPackage(f"{title} needs {names}, which is not installed. Run: pip install {line}")


def _numbers(version: str) -> tuple[int, ...]:
    """The release as numbers; what follows them (rc1, +cpu) does not count."""
    numbers = []
    for part in version.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)
