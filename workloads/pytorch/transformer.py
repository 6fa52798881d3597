"""The pre-LN transformer block of the embedded models, in plain linear projections as in AlgoPerf's ViT."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

HIDDEN_SCORE = -1e10  # not -inf: where all is hidden, a softmax of it is uniform and not NaN


class Attention(nn.Module):
    """Multi-head attention over (N, R, width), written out so that its four linear layers stay visible."""

    def __init__(self, width: int, heads: int, *, causal: bool, bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.query = nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(width, width, bias=bias)
        self.value = nn.Linear(width, width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)

    def forward(
        self,
        x: torch.Tensor,
        dropout_rate: float,
        memory: torch.Tensor | None = None,
        visible: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What each position of `x` finds.

        Args:
            x: (N, R, width).
            dropout_rate: on the attention.
            memory: (N, S, width), what is looked at; None for `x` itself.
            visible: (N, S), which positions may be looked at; None for all.
        """
        n, r, width = x.shape
        shape = (n, -1, self.heads, width // self.heads)
        seen = x if memory is None else memory
        inputs = ((self.query, x), (self.key, seen), (self.value, seen))
        query, key, value = (layer(input_).view(shape).transpose(1, 2) for layer, input_ in inputs)
        scores = query @ key.transpose(-2, -1) / math.sqrt(shape[-1])  # (N, heads, R, S)
        if visible is not None:
            scores = scores.masked_fill(~visible[:, None, None, :], HIDDEN_SCORE)
        if self.causal:
            future = torch.ones(r, r, dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(future, -math.inf)
        attention = F.dropout(scores.softmax(dim=-1), dropout_rate, self.training)
        return self.out((attention @ value).transpose(1, 2).reshape(n, r, width))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, at each position; gated by a third if `glu`."""

    def __init__(self, width: int, hidden: int, *, glu: bool = False) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, hidden)
        self.gate = nn.Linear(width, hidden) if glu else None
        self.linear2 = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor, dropout_rate: float) -> torch.Tensor:
        hidden = F.gelu(self.linear1(x), approximate="tanh")
        if self.gate is not None:
            hidden = hidden * self.gate(x)
        return self.linear2(F.dropout(hidden, dropout_rate, self.training))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), over (N, R, width); norm(x + ...) if `post_norm`."""

    def __init__(
        self, width: int, hidden: int, heads: int, *, causal: bool, glu: bool = False, post_norm: bool = False
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads, causal=causal)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, hidden, glu=glu)
        self.post_norm = post_norm

    def forward(self, x: torch.Tensor, dropout_rate: float) -> torch.Tensor:
        for normalise, layer in ((self.norm1, self.attention), (self.norm2, self.mlp)):
            update = layer(x if self.post_norm else normalise(x), dropout_rate)
            x = x + F.dropout(update, dropout_rate, self.training)
            x = normalise(x) if self.post_norm else x
        return x


def initialise_linear(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases in every linear layer below `module`."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def sinusoids(length: int, width: int, longest: float = 10_000.0) -> torch.Tensor:
    """Position codes (length, width): sines, then cosines, of wavelengths from 2 pi to 2 pi `longest`."""
    frequencies = longest ** -torch.linspace(0, 1, width // 2)
    angles = torch.arange(length)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)
