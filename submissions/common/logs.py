"""When a submission logs: rarely, because the official logger rewrites its whole file at each call."""

from __future__ import annotations

from submissions.common.api import Workload

LOG_PERIOD = 100  # steps


def is_log_step(workload: Workload, global_step: int) -> bool:
    """Whether this step is to be logged: every 100th, if the workload has a logger."""
    return workload.metrics_logger is not None and global_step % LOG_PERIOD == 0
