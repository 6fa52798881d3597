"""Names for what JAX and its users hand over and JAX itself has no type for."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from jax import Array

Tree: TypeAlias = Any
"""A pytree: arrays in any nesting of containers."""

ApplyFn: TypeAlias = Callable[..., Tree]
"""A model: a function of (params, *args) to its outputs, or to (outputs, aux)."""

Loss: TypeAlias = Array | Mapping[str, Array]
"""A scalar, or a mapping with "summed" and "n_valid_examples", whose quotient is the loss."""

LossFn: TypeAlias = Callable[..., Loss]
"""A function of (outputs, *args) to the loss."""

LossTypeLike: TypeAlias = enum.Enum | str
"""A `losses.LossType`, another enum's member of the same name (AlgoPerf's own), or the name."""

Sizes: TypeAlias = tuple[int, ...]
"""A shape, or a part of one."""
