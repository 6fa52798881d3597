"""The pre-LN transformer block of the embedded models, in flax; see `workloads.pytorch.transformer`."""

from __future__ import annotations

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

Rate = float | jax.Array


class Dropout(nn.Module):
    """Dropout whose rate may be traced; at rate 0 it draws nothing.

    Draws from the rng `dropout`.
    """

    @nn.compact
    def __call__(self, x: jax.Array, rate: Rate, *, train: bool) -> jax.Array:
        if not train or (isinstance(rate, (int, float)) and rate == 0):
            return x
        key = self.make_rng("dropout")

        def drop(x: jax.Array) -> jax.Array:
            keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
            return jnp.where(keep, x / (1.0 - rate), 0.0)

        return jax.lax.cond(rate > 0, drop, lambda x: x, x)


HIDDEN_SCORE = -1e10  # not -inf: where all is hidden, a softmax of it is uniform and not NaN


class Attention(nn.Module):
    """Multi-head attention over (N, R, width), in flax's own layers: kernels (width, heads, width / heads)."""

    heads: int
    causal: bool
    use_bias: bool = True

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        dropout_rate: Rate,
        memory: jax.Array | None = None,
        visible: jax.Array | None = None,
        *,
        train: bool,
    ) -> jax.Array:
        """What each position of `x` finds.

        Args:
            x: (N, R, width).
            dropout_rate: on the attention.
            memory: (N, S, width), what is looked at; None for `x` itself.
            visible: (N, S), which positions may be looked at; None for all.
            train: whether dropout acts.
        """
        width = x.shape[-1]
        size = width // self.heads
        layer = partial(nn.DenseGeneral, use_bias=self.use_bias, kernel_init=nn.initializers.xavier_uniform())
        seen = x if memory is None else memory
        query, key, value = (
            layer((self.heads, size), name=name)(inputs)
            for name, inputs in (("query", x), ("key", seen), ("value", seen))
        )  # (N, R or S, heads, size)
        scores = jnp.einsum("nqhd,nkhd->nhqk", query, key) / math.sqrt(size)
        if visible is not None:
            scores = jnp.where(visible[:, None, None, :], scores, HIDDEN_SCORE)
        if self.causal:
            future = jnp.triu(jnp.ones(scores.shape[-2:], bool), 1)
            scores = jnp.where(future, -jnp.inf, scores)
        attention = Dropout()(nn.softmax(scores), dropout_rate, train=train)
        mixed = jnp.einsum("nhqk,nkhd->nqhd", attention, value)
        return layer(width, axis=(-2, -1), name="out")(mixed)


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, at each position; gated by a third if `glu`."""

    hidden: int
    glu: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, dropout_rate: Rate, *, train: bool) -> jax.Array:
        hidden = nn.gelu(dense(self.hidden, "linear1")(x), approximate=True)
        if self.glu:
            hidden = hidden * dense(self.hidden, "gate")(x)
        return dense(x.shape[-1], "linear2")(Dropout()(hidden, dropout_rate, train=train))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), over (N, R, width); norm(x + ...) if `post_norm`."""

    hidden: int
    heads: int
    causal: bool
    glu: bool = False
    post_norm: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, dropout_rate: Rate, *, train: bool) -> jax.Array:
        attention = Attention(self.heads, causal=self.causal, name="attention")
        mlp = Mlp(self.hidden, self.glu, name="mlp")
        for normalise, layer in ((norm("norm1"), attention), (norm("norm2"), mlp)):
            update = layer(x if self.post_norm else normalise(x), dropout_rate, train=train)
            x = x + Dropout()(update, dropout_rate, train=train)
            x = normalise(x) if self.post_norm else x
        return x


def dense(features: int, name: str) -> nn.Dense:
    """A linear layer with Xavier-uniform weights and zero biases."""
    return nn.Dense(features, kernel_init=nn.initializers.xavier_uniform(), name=name)


def norm(name: str) -> nn.LayerNorm:
    """A layer normalisation that computes the variance as PyTorch does, from the centred values."""
    return nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, name=name)


def sinusoids(length: int, width: int, longest: float = 10_000.0) -> jax.Array:
    """Position codes (length, width): sines, then cosines, of wavelengths from 2 pi to 2 pi `longest`."""
    frequencies = longest ** -jnp.linspace(0, 1, width // 2)
    angles = jnp.arange(length)[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
