"""The points the K-FAC submissions train with where the search space leaves a hyperparameter open.

One point per approximation, the same for every workload.
"""

from __future__ import annotations

from typing import Any

_COMMON: dict[str, Any] = {
    "one_minus_beta1": 0.2,
    "beta2": 0.99,
    "weight_decay": 0.05,
    "grad_clip": 0.25,
}

DEFAULTS: dict[str, dict[str, Any]] = {
    "expand": _COMMON
    | {
        "learning_rate": 2e-2,
        "warmup_factor": 0.1,
        "horizon_factor": 0.48,
        "damping": 1e-4,
        "factor_decay": 0.98,
        "factor_interval": 2,
        "refresh_interval": 6,
    },
    # Statistics at every step: they cost reduce little, and a batch gives it one row per example, not per position.
    "reduce": _COMMON
    | {
        "learning_rate": 3e-2,
        "warmup_factor": 0.05,
        "horizon_factor": 0.5,
        "damping": 1e-3,
        "factor_decay": 0.9,
        "factor_interval": 1,
        "refresh_interval": 5,
    },
}
