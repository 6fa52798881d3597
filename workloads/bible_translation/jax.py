"""bible_translation in JAX: its encoder-decoder transformer."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from workloads.bible_translation.byte_pairs import PADDING
from workloads.bible_translation.task import BibleTranslationTask, TransformerConfig
from workloads.jax.transformer import Attention, Dropout, Rate, dense, norm, sinusoids
from workloads.jax.workload import JaxWorkload

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"relu": nn.relu, "tanh": jnp.tanh}


class Transformer(nn.Module):
    """Pieces of a source, and of the target before -> logits of the target's next piece, at each position.

    One table embeds sources and targets and is the output layer, too.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, sources: jax.Array, targets: jax.Array, dropout_rate: Rate = 0.0, *, train: bool = False
    ) -> jax.Array:
        """Logits (N, R, num_pieces) of piece numbers (N, S) and (N, R), both padded with 0."""
        config = self.config
        table = nn.Embed(
            config.num_pieces,
            config.width,
            embedding_init=nn.initializers.normal(1.0),
            name="shared_embedding",
        )
        visible = sources != PADDING
        encoder = Stack(config, name="encoder")
        memory = encoder(table(sources), visible, dropout_rate, train=train)
        before = jnp.pad(targets[:, :-1], ((0, 0), (1, 0)), constant_values=PADDING)
        decoder = Stack(config, name="decoder")
        x = decoder(table(before), targets != PADDING, dropout_rate, memory, visible, train=train)
        # Entries of the table and of x have variance 1: so have the logits.
        return table.attend(x) / math.sqrt(config.width)


class Stack(nn.Module):
    """Position codes and blocks: the encoder, or with a memory the decoder."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        visible: jax.Array,
        dropout_rate: Rate,
        memory: jax.Array | None = None,
        memory_visible: jax.Array | None = None,
        *,
        train: bool,
    ) -> jax.Array:
        x = x + sinusoids(x.shape[1], x.shape[2])
        x = Dropout()(x, dropout_rate, train=train)
        for index in range(self.config.depth):
            block = Block(self.config, name=f"blocks_{index}")
            x = block(x, visible, dropout_rate, memory, memory_visible, train=train)
        return norm("norm")(x) if self.config.pre_ln else x


class Block(nn.Module):
    """Self-attention, in the decoder attention to the memory, and MLP: each with layer norm, dropout and a sum."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        visible: jax.Array,
        dropout_rate: Rate,
        memory: jax.Array | None,
        memory_visible: jax.Array | None,
        *,
        train: bool,
    ) -> jax.Array:
        config = self.config

        def add(x: jax.Array, part: str, update: Callable[[jax.Array], jax.Array]) -> jax.Array:
            normalise = norm(f"norm_{part}")
            changed = x + Dropout()(update(normalise(x) if config.pre_ln else x), dropout_rate, train=train)
            return changed if config.pre_ln else normalise(changed)

        attention_of = partial(Attention, config.heads, use_bias=False)
        heat = config.attention_temp
        attention = attention_of(causal=memory is not None, name="attention")
        x = add(x, "attention", lambda x: attention(heat * x, dropout_rate, x, visible, train=train))
        if memory is not None:
            cross = attention_of(causal=False, name="cross_attention")
            x = add(
                x,
                "cross_attention",
                lambda x: cross(heat * x, dropout_rate, memory, memory_visible, train=train),
            )
        return add(x, "mlp", lambda x: Mlp(config, name="mlp")(x, dropout_rate, train=train))


class Mlp(nn.Module):
    """Two linear layers with an activation between them, at each position; in a gated one, with a third."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array, dropout_rate: Rate, *, train: bool) -> jax.Array:
        config = self.config
        hidden = ACTIVATIONS[config.activation](dense(config.mlp_width, "linear1")(x))
        if config.glu:
            hidden = hidden * dense(config.mlp_width, "gate")(x)
        return dense(x.shape[-1], "linear2")(Dropout()(hidden, dropout_rate, train=train))


class BibleTranslationWorkload(JaxWorkload, BibleTranslationTask):
    """See `BibleTranslationTask`; inputs, targets and weights are (N, 48), logits (N, 48, 512)."""

    def build_model(self) -> nn.Module:
        return Transformer(self.config)
