"""K-FAC in JAX: an optax transformation, and the capture of the statistics it needs."""

from __future__ import annotations

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.jax.capture import MissingStatisticsError, value_grad_and_statistics
from algoperf_kfac.jax.discovery import CoveredLayer, Layers, discover
from algoperf_kfac.jax.factors import Positions
from algoperf_kfac.jax.sharding import batch_mesh, replicate, shard_batch
from algoperf_kfac.jax.stacks import layer_states
from algoperf_kfac.jax.transform import KFAC, FactorPair, KFACState, factors, kfac, metrics, scale_by_kfac

__all__ = [
    "KFAC",
    "CoveredLayer",
    "FactorPair",
    "KFACConfig",
    "KFACState",
    "Layers",
    "MissingStatisticsError",
    "Positions",
    "batch_mesh",
    "discover",
    "factors",
    "kfac",
    "layer_states",
    "metrics",
    "replicate",
    "scale_by_kfac",
    "shard_batch",
    "value_grad_and_statistics",
]
