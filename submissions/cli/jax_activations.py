"""See `algoperf_kfac.jax.activations`."""

from __future__ import annotations

from algoperf_kfac.jax.activations import activation_bytes

__all__ = ["activation_bytes"]
