"""AlgoPerf's imports, in the order and with the flags its runner expects."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

from workloads.algoperf import import_torchvision


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
