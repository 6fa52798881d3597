"""bible_translation in PyTorch: its encoder-decoder transformer."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from workloads.bible_translation.byte_pairs import PADDING
from workloads.bible_translation.task import BibleTranslationTask, TransformerConfig
from workloads.pytorch.transformer import Attention, initialise_linear, sinusoids
from workloads.pytorch.workload import PyTorchWorkload

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"relu": F.relu, "tanh": torch.tanh}


class Transformer(nn.Module):
    """Pieces of a source, and of the target before -> logits of the target's next piece, at each position.

    One table embeds sources and targets and is the output layer, too.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.shared_embedding = nn.Embedding(config.num_pieces, config.width)
        self.encoder = Stack(config, has_memory=False)
        self.decoder = Stack(config, has_memory=True)
        nn.init.normal_(self.shared_embedding.weight)
        initialise_linear(self)

    def forward(self, sources: torch.Tensor, targets: torch.Tensor, dropout_rate: float = 0.0) -> torch.Tensor:
        """Logits (N, R, num_pieces) of piece numbers (N, S) and (N, R), both padded with 0."""
        visible = sources != PADDING
        memory = self.encoder(self.shared_embedding(sources), visible, dropout_rate)
        before = F.pad(targets[:, :-1], (1, 0), value=PADDING)
        x = self.decoder(self.shared_embedding(before), targets != PADDING, dropout_rate, memory, visible)
        # Entries of the table and of x have variance 1: so have the logits.
        return torch.matmul(x, self.shared_embedding.weight.T) / math.sqrt(x.shape[-1])


class Stack(nn.Module):
    """Position codes and blocks: the encoder, or with a memory the decoder."""

    def __init__(self, config: TransformerConfig, *, has_memory: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config, has_memory=has_memory) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=1e-6) if config.pre_ln else nn.Identity()

    def forward(
        self,
        x: torch.Tensor,
        visible: torch.Tensor,
        dropout_rate: float,
        memory: torch.Tensor | None = None,
        memory_visible: torch.Tensor | None = None,
    ) -> torch.Tensor:
        x = x + sinusoids(x.shape[1], x.shape[2]).to(x.device)
        x = F.dropout(x, dropout_rate, self.training)
        for block in self.blocks:
            x = block(x, visible, dropout_rate, memory, memory_visible)
        return self.norm(x)


class Block(nn.Module):
    """Self-attention, in the decoder attention to the memory, and MLP: each with layer norm, dropout and a sum."""

    def __init__(self, config: TransformerConfig, *, has_memory: bool) -> None:
        super().__init__()
        self.pre_ln = config.pre_ln
        self.temperature = config.attention_temp
        self.norm_attention = nn.LayerNorm(config.width, eps=1e-6)
        self.attention = Attention(config.width, config.heads, causal=has_memory, bias=False)
        if has_memory:
            self.norm_cross_attention = nn.LayerNorm(config.width, eps=1e-6)
            self.cross_attention = Attention(config.width, config.heads, causal=False, bias=False)
        self.norm_mlp = nn.LayerNorm(config.width, eps=1e-6)
        self.mlp = Mlp(config)

    def forward(
        self,
        x: torch.Tensor,
        visible: torch.Tensor,
        dropout_rate: float,
        memory: torch.Tensor | None,
        memory_visible: torch.Tensor | None,
    ) -> torch.Tensor:
        def add(x: torch.Tensor, norm: nn.Module, update: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
            changed = x + F.dropout(update(norm(x) if self.pre_ln else x), dropout_rate, self.training)
            return changed if self.pre_ln else norm(changed)

        heat = self.temperature
        x = add(x, self.norm_attention, lambda x: self.attention(heat * x, dropout_rate, x, visible))
        if memory is not None:
            attend = self.cross_attention
            x = add(x, self.norm_cross_attention, lambda x: attend(heat * x, dropout_rate, memory, memory_visible))
        return add(x, self.norm_mlp, lambda x: self.mlp(x, dropout_rate))


class Mlp(nn.Module):
    """Two linear layers with an activation between them, at each position; in a gated one, with a third."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.linear1 = nn.Linear(config.width, config.mlp_width)
        self.gate = nn.Linear(config.width, config.mlp_width) if config.glu else None
        self.linear2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: torch.Tensor, dropout_rate: float) -> torch.Tensor:
        hidden = self.activation(self.linear1(x))
        if self.gate is not None:
            hidden = hidden * self.gate(x)
        return self.linear2(F.dropout(hidden, dropout_rate, self.training))


class BibleTranslationWorkload(PyTorchWorkload, BibleTranslationTask):
    """See `BibleTranslationTask`; inputs, targets and weights are (N, 48), logits (N, 48, 512)."""

    def build_model(self) -> nn.Module:
        return Transformer(self.config)
