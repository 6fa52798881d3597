"""bible_lm in JAX: its language model."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from workloads.bible_lm.task import BibleLmTask
from workloads.data import bible
from workloads.jax.transformer import Block, Dropout, Rate, dense, norm
from workloads.jax.workload import JaxWorkload


class LanguageModel(nn.Module):
    """Characters -> causal transformer blocks -> logits of the next character, at each position.

    The output layer is not tied to the embedding. Attributes: `num_symbols` and `length` (of a window), then the
    sizes of model, stack, attention and MLP; `post_norm` as in the blocks.
    """

    num_symbols: int
    length: int
    width: int
    depth: int
    heads: int
    hidden: int
    post_norm: bool = False

    @nn.compact
    def __call__(self, symbols: jax.Array, dropout_rate: Rate = 0.0, *, train: bool = False) -> jax.Array:
        """Logits (N, R, num_symbols) of symbol numbers (N, R)."""
        init = nn.initializers.normal(0.02)
        x = nn.Embed(self.num_symbols, self.width, embedding_init=init, name="symbols")(symbols)
        positions = nn.Embed(self.length, self.width, embedding_init=init, name="positions")
        x = x + positions(jnp.arange(symbols.shape[1]))
        x = Dropout()(x, dropout_rate, train=train)
        for index in range(self.depth):
            block = Block(self.hidden, self.heads, causal=True, post_norm=self.post_norm, name=f"blocks_{index}")
            x = block(x, dropout_rate, train=train)
        return dense(self.num_symbols, "output")(norm("norm")(x))


class BibleLmWorkload(JaxWorkload, BibleLmTask):
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
