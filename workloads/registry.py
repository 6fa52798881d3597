"""The embedded workloads: the folders of this package that hold a task, and the variants these declare."""

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
    """A workload: a folder `workloads/NAME`, or a held-out variant that its task declares.

    Attributes:
        name: of the workload.
        base: of the folder.
        frameworks: those it has a model file for: `pytorch.py`, `jax.py`.
    """

    name: str
    base: str
    frameworks: tuple[str, ...]

    @property
    def is_variant(self) -> bool:
        """Whether it is a held-out variant of the folder's workload."""
        return self.name != self.base

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
        return "".join(part.capitalize() for part in self.base.split("_"))

    def module(self, file: str) -> ModuleType:
        """One of the folder's files: "task" or a framework's name."""
        return importlib.import_module(f"workloads.{self.base}.{file}")

    def task(self) -> type[Workload]:
        """The task without a framework, with the variant's attributes."""
        return self._varied(getattr(self.module("task"), self.task_name))

    def workload(self, framework: str) -> type[Workload]:
        """The workload in a framework, with the variant's attributes."""
        return self._varied(getattr(self.module(framework), self.class_name))

    def _varied(self, class_: type[Workload]) -> type[Workload]:
        if not self.is_variant:
            return class_
        changes = class_.VARIANTS[self.name.removeprefix(f"{self.base}_")]
        # Nobody tuned on a variant, whatever its base.
        own = {"tuned_on": False, "name": self.name, "__module__": class_.__module__}
        return type(class_.__name__, (class_,), {**changes, **own})


def _entries() -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for folder in sorted(path.parent for path in Path(__file__).parent.glob("*/task.py")):
        there = tuple(name for name in frameworks.FRAMEWORKS if (folder / f"{name}.py").is_file())
        entry = Entry(folder.name, folder.name, there)
        names = (folder.name, *(f"{folder.name}_{part}" for part in entry.task().VARIANTS))
        found |= {name: Entry(name, folder.name, there) for name in names}
    return found


WORKLOADS = _entries()
BASES = [name for name, entry in WORKLOADS.items() if not entry.is_variant]


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
        class_ = entry.workload(framework)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("workloads"):
            raise
        raise frameworks.missing(error, framework) from None
    return class_()


def check(name: str) -> None:
    """Raises UserError for a workload that is not there, with those that are."""
    if name not in WORKLOADS:
        raise UserError(f"Unknown workload '{name}'. Known: {', '.join(WORKLOADS)}.")


def batch_size(name: str) -> int | None:
    """The global batch size to train an embedded workload with; None for the name of another."""
    if name not in WORKLOADS:
        return None
    size: int = WORKLOADS[name].task().batch_size  # type: ignore[assignment]
    return size


batch_sizes.ask_also(batch_size)  # the submissions know AlgoPerf's alone
