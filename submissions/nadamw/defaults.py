"""What NadamW trains with, in either framework."""

from __future__ import annotations

# The point of the self-tuning ruleset, and what a search space leaves open.
DEFAULTS = {
    "learning_rate": 9.5e-3,
    "one_minus_beta1": 0.09,
    "beta2": 0.99,
    "weight_decay": 0.026,
    "warmup_factor": 0.1,
    "label_smoothing": 0.0,
    "dropout_rate": 0.0,
    "grad_clip": 0.5,
    "horizon_factor": 1.0,
}
EPSILON = 1e-8
