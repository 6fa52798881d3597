"""What cases are run with: AlgoPerf's imports, in the order and with the flags its runner expects; and versions."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence
from types import ModuleType

from workloads.algoperf import import_torchvision

PACKAGES = ("algoperf", "torch", "torchvision", "jax", "flax", "optax", "tensorflow", "numpy")


def versions() -> str:
    """What the cases are run with here."""
    found = {name: _version(name) for name in PACKAGES}
    packages = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    return f"Python {platform.python_version()}, {packages}; one thread of a CPU."


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def load_runner(framework: str, workload_name: str, arguments: Sequence[str] = ()) -> ModuleType:
    """AlgoPerf's `submission_runner` as a module, its flags parsed and its frameworks initialised.

    Raises:
        ModuleNotFoundError: AlgoPerf is not installed.
    """
    if framework == "pytorch":
        import_torchvision()
    import submission_runner
    from absl import flags, logging

    logging.set_verbosity(logging.WARNING)
    flags.FLAGS(["runner", f"--framework={framework}", f"--workload={workload_name}", *arguments])
    if framework == "pytorch":
        import torch
        from algoperf import profiler, pytorch_utils

        torch.set_num_threads(1)
        pytorch_utils.pytorch_init(False, 0, profiler.PassThroughProfiler())
    runner: ModuleType = submission_runner
    return runner
