"""Learning-rate schedules as factors in [0, 1], free of any framework."""

from __future__ import annotations

import math


def warmup_cosine(step: int, total_steps: int, warmup_steps: int) -> float:
    """Linear warm-up, then half a cosine down to zero: the schedule of AlgoPerf's baselines.

    The first step already moves (factor 1/warmup_steps), and the schedule stays at its last value, not at
    zero, beyond the horizon, so that a run that overshoots its horizon still makes some progress.

    Args:
        step: number of updates made so far, from 0.
        total_steps: the horizon, in steps.
        warmup_steps: length of the linear part, in steps; 0 for none.

    Returns:
        The factor for the learning rate of the update about to be made.

    Raises:
        ValueError: if the horizon is not positive or does not leave a step after the warm-up.
    """
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}")
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(f"warmup_steps must lie in [0, total_steps={total_steps}), got {warmup_steps}")
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    decay_steps = total_steps - warmup_steps
    progress = min(step - warmup_steps, decay_steps - 1) / decay_steps
    return 0.5 * (1.0 + math.cos(math.pi * progress))
