"""Nesterov momentum (Sutskever et al. 2013): what it is in both frameworks, as AlgoPerf's baselines set it up."""

from submissions.common.description import Said
from submissions.common.hyperparameters import NON_NEGATIVE, POSITIVE, UNIT

SAID: Said = {
    "title": "Nesterov momentum",
    "text": (
        "Gradient descent with Nesterov momentum (Sutskever et al., 2013) for all parameters, weight decay in "
        "the gradient. Linear warm-up, then cosine decay."
    ),
    "hyperparameters": {
        "learning_rate": (0.3, POSITIVE),
        "one_minus_beta1": (0.1, UNIT),
        "weight_decay": (1e-5, NON_NEGATIVE),
    },
    "training": {"warmup_factor": 0.1, "grad_clip": 1.0},
}
