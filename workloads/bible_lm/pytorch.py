"""bible_lm in PyTorch: its language model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from workloads.bible_lm.task import BibleLmTask
from workloads.data import bible
from workloads.pytorch.transformer import Block, initialise_linear
from workloads.pytorch.workload import PyTorchWorkload


class LanguageModel(nn.Module):
    """Characters -> causal transformer blocks -> logits of the next character, at each position.

    The output layer is not tied to the embedding. Args: `num_symbols` and `length` (of a window), then the sizes of
    model, stack, attention and MLP; `post_norm` as in the blocks.
    """

    def __init__(
        self,
        num_symbols: int,
        length: int,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
        post_norm: bool = False,
    ) -> None:
        super().__init__()
        self.symbols = nn.Embedding(num_symbols, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(
            Block(width, hidden, heads, causal=True, post_norm=post_norm) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.output = nn.Linear(width, num_symbols)
        nn.init.normal_(self.symbols.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)
        initialise_linear(self.blocks)
        initialise_linear(self.output)

    def forward(self, symbols: torch.Tensor, dropout_rate: float = 0.0) -> torch.Tensor:
        """Logits (N, R, num_symbols) of symbol numbers (N, R)."""
        x = self.symbols(symbols) + self.positions.weight[: symbols.shape[1]]
        x = F.dropout(x, dropout_rate, self.training)
        for block in self.blocks:
            x = block(x, dropout_rate)
        return self.output(self.norm(x))


class BibleLmWorkload(PyTorchWorkload, BibleLmTask):
    """See `BibleLmTask`; inputs, targets and weights are (N, 64), logits (N, 64, 71)."""

    def build_model(self) -> nn.Module:
        return LanguageModel(
            num_symbols=bible.NUM_SYMBOLS,
            length=self.length,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            hidden=self.mlp_width,
            post_norm=self.post_norm,
        )
