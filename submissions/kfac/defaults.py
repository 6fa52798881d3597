"""The point both K-FAC submissions train with where the search space leaves a hyperparameter open."""

from __future__ import annotations

from typing import Any

DEFAULTS: dict[str, Any] = {
    "learning_rate": 1e-2,
    "one_minus_beta1": 0.1,
    "beta2": 0.99,
    "weight_decay": 0.05,
    "warmup_factor": 0.05,
    "horizon_factor": 0.5,
}
