"""K-FAC-reduce (arXiv 2311.00636): what it is, and the point it trains with where a search space leaves it open."""

from submissions.common.kfac.method import kfac

# Statistics more often than in K-FAC-expand: a batch gives one row per example, not per position.
DESCRIPTION = kfac(
    "K-FAC-reduce",
    "inputs are averaged, output gradients summed over positions that share a weight; but kernels that read "
    "several positions take K-FAC-expand's input factor, and output gradients whose sums vanish the identity.",
    approximation="mixed",
    learning_rate=3e-2,
    warmup_factor=0.05,
    horizon_factor=0.5,
    damping=1e-3,
    factor_decay=0.81,
    factor_interval=4,
    refresh_interval=12,
)
