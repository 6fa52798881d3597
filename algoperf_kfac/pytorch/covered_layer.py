"""A covered layer with its parameters."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from algoperf_kfac.layers import LayerSpec


@dataclasses.dataclass(frozen=True)
class CoveredLayer:
    """A layer with its parameters."""

    spec: LayerSpec
    weight: Tensor
    bias: Tensor | None

    @property
    def params(self) -> list[Tensor]:
        """Weight and bias, where there is one."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def factor_dtype(self) -> torch.dtype:
        """What its factors and its direction are computed in: at least float32."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    @property
    def factor_like(self) -> Tensor:
        """An empty tensor on the weight's device, in the factors' dtype."""
        return torch.empty(0, dtype=self.factor_dtype, device=self.weight.device)
