"""K-FAC in PyTorch: `KFAC`, a `torch.optim.Optimizer`, and what it is made of."""

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.errors import MissingStatisticsError
from algoperf_kfac.positions import Positions
from algoperf_kfac.pytorch.capture import Capture
from algoperf_kfac.pytorch.monitoring import FactorPair
from algoperf_kfac.pytorch.nadamw import NadamW
from algoperf_kfac.pytorch.optimizer import KFAC

__all__ = ["KFAC", "Capture", "FactorPair", "KFACConfig", "MissingStatisticsError", "NadamW", "Positions"]
