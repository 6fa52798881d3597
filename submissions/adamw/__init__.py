"""AdamW (Loshchilov and Hutter, arXiv 1711.05101): what it is in both frameworks."""

from submissions.common.description import Said
from submissions.common.hyperparameters import FRACTION, NON_NEGATIVE, POSITIVE, UNIT

SAID: Said = {
    "title": "AdamW",
    "text": (
        "AdamW (Loshchilov and Hutter, 2019, https://arxiv.org/abs/1711.05101) for all parameters. Linear warm-up, "
        "then cosine decay."
    ),
    "hyperparameters": {
        "learning_rate": (5e-3, POSITIVE),
        "one_minus_beta1": (0.1, UNIT),
        "beta2": (0.99, FRACTION),
        "weight_decay": (0.05, NON_NEGATIVE),
    },
    "training": {"warmup_factor": 0.1, "grad_clip": 0.5},
}
EPSILON = 1e-8
