"""Whether AlgoPerf is here, and its imports in the order and with the flags its runner expects."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

INSTALLED = all(importlib.util.find_spec(name) is not None for name in ("algoperf", "submission_runner"))
REASON = "AlgoPerf is not installed here; docs/official.md says how to make an environment with it"
FRAMEWORKS = ("pytorch", "jax")


def load_runner(framework: str, workload_name: str, arguments: Sequence[str] = ()) -> Any:
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
    return submission_runner


def import_torchvision() -> None:
    """Imports torchvision, which some PyTorch workloads need for their data only.

    Beside a torch it was not built for (a CPU build of torch, say) its import stops at two operators that none of
    these workloads calls; declaring them is enough.
    """
    import torch

    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)  # it undoes its declarations when it is collected
        import torchvision  # noqa: F401


_LIBRARIES: list[Any] = []
