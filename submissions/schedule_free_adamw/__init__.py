"""Schedule-free AdamW (Defazio et al., arXiv 2405.15682): what it is in both frameworks.

Configured as its authors recommend: a constant learning rate after a warm-up, which may be several times AdamW's,
an interpolation of 0.9, and evaluations at the average.
"""

from submissions.common.description import Said
from submissions.common.hyperparameters import FRACTION, NON_NEGATIVE, OPEN_UNIT, POSITIVE

SAID: Said = {
    "title": "Schedule-free AdamW",
    "text": (
        "Schedule-free AdamW (Defazio et al., 2024, https://arxiv.org/abs/2405.15682) for all parameters, "
        "evaluated at its average. Linear warm-up, then a constant learning rate."
    ),
    "hyperparameters": {
        "learning_rate": (5e-3, POSITIVE),
        "one_minus_beta1": (0.1, OPEN_UNIT),
        "beta2": (0.99, FRACTION),
        "weight_decay": (0.05, NON_NEGATIVE),
    },
    "training": {"warmup_factor": 0.1, "grad_clip": 0.5},
}
EPSILON = 1e-8
