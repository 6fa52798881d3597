"""The learning-rate schedule all submissions share: a function of the step alone, so resuming needs no state."""

from __future__ import annotations

from algoperf_kfac.schedule import warmup_cosine


def learning_rate_factor(step_hint: int, horizon_factor: float, warmup_factor: float, step: int) -> float:
    """Warm-up and cosine decay over `horizon_factor * step_hint` steps, as a factor in [0, 1].

    Args:
        step_hint: the workload's.
        horizon_factor: length of the whole schedule, relative to `step_hint`.
        warmup_factor: length of the warm-up, relative to the whole.
        step: the number of updates made so far.
    """
    total = max(1, round(horizon_factor * step_hint))
    warmup = min(round(warmup_factor * total), total - 1)
    return warmup_cosine(step, total, warmup)
