"""Learning-rate schedules as factors in [0, 1], free of any framework."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

DECAYS: Mapping[str, Callable[[float], float]] = MappingProxyType(
    {
        "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
        "linear": lambda progress: 1.0 - progress,
        "one_minus_sqrt": lambda progress: 1.0 - math.sqrt(progress),
    }
)
"""Shapes of the decay: from the progress behind the warm-up, in [0, 1], to the factor, from 1 down to 0."""


def warmup_decay(step: int, total_steps: int, warmup_steps: int, shape: str = "cosine") -> float:
    """Linear warm-up, then down to zero; with half a cosine it is the schedule of AlgoPerf's baselines.

    The first step already moves (factor 1/warmup_steps), and the schedule stays at its last value, not at
    zero, beyond the horizon, so that a run that overshoots its horizon still makes some progress.

    Args:
        step: number of updates made so far, from 0.
        total_steps: the horizon, in steps.
        warmup_steps: length of the linear part, in steps; 0 for none.
        shape: of the decay, one of `DECAYS`.

    Returns:
        The factor for the learning rate of the update about to be made.

    Raises:
        ValueError: if the horizon is not positive or does not leave a step after the warm-up, or for an unknown
            shape.
    """
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}")
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(f"warmup_steps must lie in [0, total_steps={total_steps}), got {warmup_steps}")
    if shape not in DECAYS:
        raise ValueError(f"shape must be one of {tuple(DECAYS)}, got {shape!r}")
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    decay_steps = total_steps - warmup_steps
    return DECAYS[shape](min(step - warmup_steps, decay_steps - 1) / decay_steps)
