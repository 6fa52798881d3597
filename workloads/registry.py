"""The embedded workloads: the folders of this package that hold a task."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from commands import frameworks
from commands.errors import UserError
from submissions.common import batch_sizes
from workloads.workload import Workload


@dataclass(frozen=True)
class Entry:
    """A workload's folder `workloads/NAME`.

    Attributes:
        name: of the folder.
        frameworks: those it has a model file for: `pytorch.py`, `jax.py`.
    """

    name: str
    frameworks: tuple[str, ...]

    @property
    def class_name(self) -> str:
        """Of the workload, in each of its model files: MnistVitWorkload in mnist_vit."""
        return f"{self._camel_case}Workload"

    @property
    def task_name(self) -> str:
        """Of its task, the class in `task.py` that the workload is made from: MnistVitTask in mnist_vit."""
        return f"{self._camel_case}Task"

    @property
    def _camel_case(self) -> str:
        return "".join(part.capitalize() for part in self.name.split("_"))

    def module(self, file: str) -> ModuleType:
        """One of the folder's files: "task" or a framework's name."""
        return importlib.import_module(f"workloads.{self.name}.{file}")


def _entries() -> dict[str, Entry]:
    folders = sorted(path.parent for path in Path(__file__).parent.glob("*/task.py"))
    return {
        folder.name: Entry(
            folder.name, tuple(name for name in frameworks.FRAMEWORKS if (folder / f"{name}.py").is_file())
        )
        for folder in folders
    }


WORKLOADS = _entries()


def load(name: str, framework: str) -> Workload:
    """A new instance of the workload.

    Raises:
        UserError: no workload of that name, not in that framework, or the framework or the data are not installed.
    """
    check(name)
    entry = WORKLOADS[name]
    if framework not in entry.frameworks:
        raise UserError(f"Workload '{name}' has no framework '{framework}'. Known: {', '.join(entry.frameworks)}.")
    try:
        module = entry.module(framework)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("workloads"):
            raise
        raise frameworks.missing(error, framework) from None
    workload: Workload = getattr(module, entry.class_name)()
    return workload


def check(name: str) -> None:
    """Raises UserError for a workload that is not there, with those that are."""
    if name not in WORKLOADS:
        raise UserError(f"Unknown workload '{name}'. Known: {', '.join(WORKLOADS)}.")


def batch_size(name: str) -> int | None:
    """The global batch size to train an embedded workload with; None for the name of another."""
    if name not in WORKLOADS:
        return None
    entry = WORKLOADS[name]
    size: int = getattr(entry.module("task"), entry.task_name).batch_size
    return size


batch_sizes.ask_also(batch_size)  # the submissions know AlgoPerf's alone
