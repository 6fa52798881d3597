"""K-FAC in JAX: an optax transformation, and the capture of the statistics it needs."""

from __future__ import annotations

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.errors import MissingStatisticsError
from algoperf_kfac.jax.capture import value_grad_and_statistics
from algoperf_kfac.jax.checkpoint import from_orbax  # which tells flax of the states, too
from algoperf_kfac.jax.discovery import discover
from algoperf_kfac.jax.layer_book import CoveredLayer, Layers
from algoperf_kfac.jax.monitoring import FactorPair, factors, metrics, summary
from algoperf_kfac.jax.optimizer import KFAC
from algoperf_kfac.jax.pacing import Pacing
from algoperf_kfac.jax.sharding import batch_mesh, replicate, shard_batch
from algoperf_kfac.jax.stacks import layer_states
from algoperf_kfac.jax.statistics import add
from algoperf_kfac.jax.transform import KFACState, kfac, scale_by_kfac
from algoperf_kfac.positions import Positions

__all__ = [
    "KFAC",
    "CoveredLayer",
    "FactorPair",
    "KFACConfig",
    "KFACState",
    "Layers",
    "MissingStatisticsError",
    "Pacing",
    "Positions",
    "add",
    "batch_mesh",
    "discover",
    "factors",
    "from_orbax",
    "kfac",
    "layer_states",
    "metrics",
    "replicate",
    "scale_by_kfac",
    "shard_batch",
    "summary",
    "value_grad_and_statistics",
]
