"""The embedded workloads by name."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from commands import frameworks
from commands.errors import UserError
from submissions.common import batch_sizes
from workloads.workload import Workload


@dataclass(frozen=True)
class Entry:
    """Where a workload lives.

    Attributes:
      package: holds `<framework>/workload.py`, one for each framework.
      class_name: of the workload, the same in each framework.
      frameworks: those it exists for.
    """

    package: str
    class_name: str
    frameworks: tuple[str, ...]


WORKLOADS = {
    "mnist_vit": Entry("workloads.mnist_vit", "MnistVitWorkload", ("pytorch", "jax")),
    "bible_lm": Entry("workloads.bible_lm", "BibleLmWorkload", ("pytorch", "jax")),
}


def load(name: str, framework: str) -> Workload:
    """A new instance of the workload.

    Raises:
      UserError: no workload of that name, not in that framework, or the framework or the data are not installed.
    """
    if name not in WORKLOADS:
        raise UserError(f"Unknown workload '{name}'. Known: {', '.join(WORKLOADS)}.")
    entry = WORKLOADS[name]
    if framework not in entry.frameworks:
        raise UserError(f"Workload '{name}' has no framework '{framework}'. Known: {', '.join(entry.frameworks)}.")
    try:
        module = importlib.import_module(f"{entry.package}.{framework}.workload")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("workloads"):
            raise
        raise frameworks.missing(error, framework) from None
    return getattr(module, entry.class_name)()


def batch_size(name: str) -> int | None:
    """The global batch size to train an embedded workload with; None for the name of another."""
    if name not in WORKLOADS:
        return None
    entry = WORKLOADS[name]
    task = importlib.import_module(f"{entry.package}.workload")
    size: int = getattr(task, f"Base{entry.class_name}").batch_size
    return size


batch_sizes.ask_also(batch_size)  # the submissions know AlgoPerf's alone
