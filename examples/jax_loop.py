"""Shows the training loop in JAX: two compiled steps, one with statistics and one without.

    python -m examples.jax_loop

The optimizer is an optax transformation whose update takes, on statistics steps, what
`value_grad_and_statistics` returns beside loss and gradient.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from algoperf_kfac.jax import KFAC


class Model(nn.Module):
    """A classifier."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.gelu(nn.Dense(64)(x))
        return nn.Dense(3)(x)


def main() -> None:
    model = Model()

    def apply_fn(params, x, y):
        return model.apply({"params": params}, x)

    def loss_fn(outputs, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(outputs, y).mean()

    x = jax.random.normal(jax.random.key(0), (128, 20))
    y = jnp.argmax(x[:, :3], axis=1)
    params = model.init(jax.random.key(1), x)["params"]
    optimizer = KFAC(apply_fn, loss_fn, params, x, y, approximation="reduce", learning_rate=1e-2)
    state = optimizer.init(params)

    @jax.jit
    def plain(params, state, x, y):
        loss, gradient = jax.value_and_grad(lambda p: loss_fn(apply_fn(p, x, y), x, y))(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    @jax.jit
    def with_statistics(params, state, x, y):
        loss, gradient, statistics = optimizer.value_grad_and_statistics(params, x, y)
        updates, state = optimizer.update(gradient, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for step in range(40):
        run = with_statistics if optimizer.is_statistics_step(step) else plain
        params, state, loss = run(params, state, x, y)
        losses.append(float(loss))
    print(optimizer.coverage())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps")
    assert losses[-1] < losses[0]


if __name__ == "__main__":
    main()
