"""K-FAC-expand and K-FAC-reduce for layers that share their weight over positions (arXiv 2311.00636).

What stands here needs no framework, and brings none; the optimizers are in `algoperf_kfac.pytorch` and
`algoperf_kfac.jax`.
"""

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.cost import Plan
from algoperf_kfac.errors import MissingStatisticsError
from algoperf_kfac.layers import Coverage, FallbackSpec, LayerSpec
from algoperf_kfac.planning import plan
from algoperf_kfac.positions import Positions

__version__ = "0.1.0"

__all__ = [
    "Coverage",
    "FallbackSpec",
    "KFACConfig",
    "LayerSpec",
    "MissingStatisticsError",
    "Plan",
    "Positions",
    "__version__",
    "plan",
]
