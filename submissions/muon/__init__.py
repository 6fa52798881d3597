"""Muon (Jordan et al., 2024; Liu et al., arXiv 2502.16982): what it is in both frameworks.

Configured as Liu et al. recommend for matrices that share learning rate and weight decay with AdamW: updates of
an RMS of 0.2, Nesterov momentum of 0.95, five Newton-Schulz iterations; AdamW for embeddings, output layer and
vectors.
"""

from submissions.common.description import Said
from submissions.common.hyperparameters import FRACTION, NON_NEGATIVE, POSITIVE, UNIT

SAID: Said = {
    "title": "Muon",
    "text": (
        "Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon) for the matrices of hidden layers, "
        "scaled to AdamW's length as by Liu et al. (2025, https://arxiv.org/abs/2502.16982), and Adam with "
        "decoupled weight decay for embeddings, output layer, biases and norms. Linear warm-up, then cosine decay."
    ),
    "hyperparameters": {
        "learning_rate": (1e-2, POSITIVE),
        "one_minus_beta1": (0.05, UNIT),  # of Muon's momentum; Adam's stays at the authors' 0.9
        "beta2": (0.95, FRACTION),  # of Adam
        "weight_decay": (0.1, NON_NEGATIVE),
    },
    "training": {"warmup_factor": 0.1, "grad_clip": 0.5},
}
ADAM_BETA1 = 0.9
RMS = 0.2
