"""K-FAC-expand (arXiv 2311.00636): what it is, and the point it trains with where a search space leaves it open."""

from submissions.common.kfac.method import kfac

DESCRIPTION = kfac(
    "K-FAC-expand",
    "every position that shares a layer's weight counts as an example of its own.",
    approximation="expand",
    learning_rate=2e-2,
    warmup_factor=0.05,
    horizon_factor=0.48,
    damping=1e-4,
    factor_decay=0.9,
    factor_interval=8,
    refresh_interval=24,
)
