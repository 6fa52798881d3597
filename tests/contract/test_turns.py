"""Layers that a step does not call: they keep their factors and their place, and get no update on that step."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch import nn

import algoperf_kfac.jax
import algoperf_kfac.pytorch
from tests.contract.frameworks import NAMES, module_of
from tests.contract.models import linear, normal

OPTIONS = {
    "factor_interval": 1,
    "refresh_interval": 2,
    "initial_statistics": 0,
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
}
X = normal(6, 3)
BODY, LEFT, RIGHT = "body", "left", "right"


class InPyTorch:
    """A body under two heads of one shape, which take turns."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        self.module = nn.ModuleDict({BODY: nn.Linear(3, 4), LEFT: nn.Linear(4, 2), RIGHT: nn.Linear(4, 2)}).double()
        self.optimizer = algoperf_kfac.pytorch.KFAC(self.module, **OPTIONS | options)

    def step(self, heads: tuple[str, ...]) -> None:
        self.optimizer.zero_grad()
        with self.optimizer.capture():
            h = torch.tanh(self.module[BODY](torch.as_tensor(X)))
            sum((self.module[head](h) - 0.3).square().mean() for head in heads).backward()
        self.optimizer.step()

    def weights(self, layer: str) -> np.ndarray:
        return np.concatenate([p.detach().numpy().ravel() for p in self.module[layer].parameters()])

    def metrics(self) -> dict[str, float]:
        return self.optimizer.metrics()

    def factor(self, layer: str) -> np.ndarray:
        return np.asarray(self.optimizer.factors()[layer].A)


class InJAX:
    """The same, in functions that are compiled for each choice of heads."""

    def __init__(self, **options: Any) -> None:
        shapes = {BODY: (3, 4), LEFT: (4, 2), RIGHT: (4, 2)}
        self.params: Any = {
            name: {"kernel": jnp.asarray(normal(*shape)), "bias": jnp.asarray(normal(shape[1]))}
            for name, shape in shapes.items()
        }
        self.optimizer = algoperf_kfac.jax.KFAC(
            self.apply, self.loss, self.params, jnp.asarray(X), (LEFT, RIGHT), **OPTIONS | options
        )
        self.state = self.optimizer.init(self.params)
        self._step = jax.jit(self._made, static_argnums=2)

    @staticmethod
    def apply(params: Any, x: Any, heads: tuple[str, ...]) -> Any:
        h = jnp.tanh(linear(params[BODY], x))
        return [linear(params[head], h) for head in heads]

    @staticmethod
    def loss(outputs: Any, x: Any, heads: tuple[str, ...]) -> Any:
        return sum(jnp.square(output - 0.3).mean() for output in outputs)

    def _made(self, params: Any, state: Any, heads: tuple[str, ...]) -> Any:
        x = jnp.asarray(X)
        if self.optimizer.config.factor_interval == 1:
            _, gradient, statistics = self.optimizer.value_grad_and_statistics(params, x, heads)
            updates, state = self.optimizer.update(gradient, state, params, statistics=statistics)
        else:
            gradient = jax.grad(lambda p: self.loss(self.apply(p, x, heads), x, heads))(params)
            idle = self.optimizer.idle(params, x, heads)
            updates, state = self.optimizer.update(gradient, state, params, idle=idle)
        return optax.apply_updates(params, updates), state

    def step(self, heads: tuple[str, ...]) -> None:
        self.params, self.state = self._step(self.params, self.state, heads)

    def weights(self, layer: str) -> np.ndarray:
        return np.concatenate([np.asarray(p).ravel() for p in jax.tree.leaves(self.params[layer])])

    def metrics(self) -> dict[str, float]:
        return self.optimizer.metrics(self.state)

    def factor(self, layer: str) -> np.ndarray:
        return np.asarray(self.optimizer.factors(self.state)[layer].A)


RUNS = {"pytorch": InPyTorch, "jax": InJAX}


@pytest.mark.parametrize("framework", NAMES)
def test_heads_that_take_turns(framework: str) -> None:
    run: Any = RUNS[framework]()
    run.step((LEFT, RIGHT))
    for number in range(1, 3):
        before = {layer: run.weights(layer) for layer in (BODY, LEFT, RIGHT)}
        factor = run.factor(RIGHT)
        run.step((LEFT,))
        moved = {layer: (run.weights(layer) != before[layer]).all() for layer in before}
        assert moved == {BODY: True, LEFT: True, RIGHT: False}
        np.testing.assert_array_equal(run.weights(RIGHT), before[RIGHT])
        np.testing.assert_allclose(run.factor(RIGHT), factor, rtol=1e-12)
        metrics = run.metrics()
        assert [metrics[f"{layer}/idle"] for layer in (BODY, LEFT, RIGHT)] == [0, 0, number]
        assert metrics["idle"] == 1
    factor = run.factor(RIGHT)
    run.step((LEFT, RIGHT))
    assert run.metrics()["idle"] == run.metrics()["right/idle"] == 0
    assert (run.weights(RIGHT) != before[RIGHT]).all()
    assert np.abs(run.factor(RIGHT) - factor).max() > 1e-6


@pytest.mark.parametrize("framework", NAMES)
def test_a_step_without_statistics(framework: str) -> None:
    """Neither momentum nor weight decay moves what it does not call."""
    run: Any = RUNS[framework](factor_interval=4, refresh_interval=4)
    run.step((LEFT, RIGHT))
    before = run.weights(RIGHT), run.weights(LEFT)
    run.step((LEFT,))
    np.testing.assert_array_equal(run.weights(RIGHT), before[0])
    assert (run.weights(LEFT) != before[1]).all()


@pytest.mark.parametrize("framework", NAMES)
@pytest.mark.filterwarnings("ignore:K-FAC. right. not called with these arguments")
def test_a_layer_that_no_step_calls(framework: str) -> None:
    run: Any = RUNS[framework]()

    def steps() -> None:
        for _ in range(11):
            run.step((LEFT,))
        run.metrics()

    error = module_of(framework).MissingStatisticsError
    with pytest.raises(
        error, match=r"^1 of 3 layers missed their statistics: right \(missed .*inputs\)\..*exclude"
    ):
        steps()


def test_the_first_program_without_a_layer_says_so() -> None:
    run = InJAX()
    with pytest.warns(
        UserWarning, match=r"^K-FAC: right: not called with these arguments.*idle=optimizer.idle"
    ) as w:
        run.step((LEFT,))
    assert [warning.filename for warning in w] == [__file__]
    run.step((RIGHT,))  # it is not said again
    compute = lambda params: run.optimizer.value_grad_and_statistics(params, jnp.asarray(X), (RIGHT, LEFT))  # noqa: E731
    assert not jax.eval_shape(compute, run.params)[2].idle


def test_micro_batches_of_other_heads_add_up_by_name() -> None:
    """In JAX; a mapping made by hand that lacks a layer is refused."""
    run = InJAX()
    compute = jax.jit(
        partial(run.optimizer.value_grad_and_statistics, run.params, jnp.asarray(X)), static_argnums=0
    )
    whole, left, right = (compute(heads)[2] for heads in ((LEFT, RIGHT), (LEFT,), (RIGHT,)))
    assert (left.idle, right.idle) == ((RIGHT,), (LEFT,))
    total = algoperf_kfac.jax.add(left, right)
    assert total.keys() == whole.keys()
    assert total.idle == ()
    for name, times in ((LEFT, 1), (RIGHT, 1), (BODY, 2)):
        np.testing.assert_allclose(total[name].a_count, times * whole[name].a_count)
        np.testing.assert_allclose(total[name].a[0], times * whole[name].a[0], rtol=1e-12)
    assert jax.tree.map(lambda t: 2 * t, left).idle == (RIGHT,)
    gradient = jax.tree.map(jnp.ones_like, run.params)
    with pytest.raises(ValueError, match="statistics of right are missing: they must come from the same Layers"):
        run.optimizer.update(gradient, run.state, run.params, statistics={n: left[n] for n in left})


def test_a_call_that_reads_a_layer_otherwise_than_it_did() -> None:
    """In JAX, where layers are known before the first step."""

    def apply(params: Any, x: Any, how: str) -> Any:
        h = linear(params[BODY], x) if how != "no bias" else x @ params[BODY]["kernel"]
        if how == "scaled":
            h = x @ (2 * params[BODY]["kernel"])
        return h + jnp.sin(params[BODY]["kernel"].sum() * x[:, :1]) if how == "twice" else h

    params = InJAX().params
    optimizer = algoperf_kfac.jax.KFAC(
        apply, lambda f, *_: jnp.square(f).mean(), {BODY: params[BODY]}, jnp.asarray(X), ""
    )
    # Read otherwise alone, it is not taken for one that is not called.
    for how, reader in (("no bias", "a call without its bias"), ("twice", "mul"), ("scaled", "dot_general")):
        with pytest.raises(
            ValueError, match=f"layer body is also read by {reader}.*It was not when K-FAC was made"
        ):
            optimizer.value_grad_and_statistics({BODY: params[BODY]}, jnp.asarray(X), how)
