"""The pre-LN transformer block of the embedded models, in plain linear projections as in AlgoPerf's ViT."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    """Multi-head self-attention over (N, R, width), written out so that its four linear layers stay visible."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, dropout_rate: float) -> torch.Tensor:
        n, r, width = x.shape
        shape = (n, r, self.heads, width // self.heads)
        query, key, value = (layer(x).view(shape).transpose(1, 2) for layer in (self.query, self.key, self.value))
        scores = query @ key.transpose(-2, -1) / math.sqrt(shape[-1])  # (N, heads, R, R)
        if self.causal:
            future = torch.ones(r, r, dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(future, -math.inf)
        attention = F.dropout(scores.softmax(dim=-1), dropout_rate, self.training)
        return self.out((attention @ value).transpose(1, 2).reshape(n, r, width))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, at each position."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor, dropout_rate: float) -> torch.Tensor:
        hidden = F.gelu(self.linear1(x), approximate="tanh")
        return self.linear2(F.dropout(hidden, dropout_rate, self.training))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), over (N, R, width)."""

    def __init__(self, width: int, hidden: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads, causal=causal)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, hidden)

    def forward(self, x: torch.Tensor, dropout_rate: float) -> torch.Tensor:
        update = self.attention(self.norm1(x), dropout_rate)
        x = x + F.dropout(update, dropout_rate, self.training)
        update = self.mlp(self.norm2(x), dropout_rate)
        return x + F.dropout(update, dropout_rate, self.training)


def initialise_linear(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases in every linear layer below `module`."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
