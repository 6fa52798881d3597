"""Uses the toy scaling and the toy kind in JAX; run by test_rooms, which adds them to a copy of the library."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import algoperf_kfac
from algoperf_kfac import KFACConfig, plan
from algoperf_kfac.jax import KFAC
from algoperf_kfac.jax.transform import find_state
from benchmarks.official.gradient_check_jax import compare, listening
from tests.jax.support import assert_equal, factors, normal

OPTIONS = {"factor_interval": 2, "initial_statistics": 1, "refresh_interval": 2, "learning_rate": 1e-2}


def model(params: Any, x: Array) -> Array:
    return jnp.tanh(x @ params["in"]["w"] * params["scale"] + params["shift"]) @ params["out"]["w"]


def loss(f: Array, x: Array) -> Array:
    return jnp.square(f - 0.3).sum()


def initial(seed: int = 0) -> Any:
    return {
        "in": {"w": normal(seed, 5, 3)},
        "out": {"w": normal(seed + 1, 3, 2)},
        "scale": normal(seed + 2, 3),
        "shift": normal(seed + 3, 3),
    }


class Run:
    """A model in training."""

    def __init__(self, **options: Any) -> None:
        self.x = normal(9, 6, 4, 5)
        self.params = initial()
        self.optimizer = KFAC(model, loss, self.params, self.x, **{**OPTIONS, **options})
        self.state = self.optimizer.init(self.params)
        self.losses: list[float] = []
        self._plain, self._statistics = jax.jit(self._plain_step), jax.jit(self._statistics_step)

    def _plain_step(self, params: Any, state: Any) -> Any:
        value, gradient = jax.value_and_grad(lambda p: loss(model(p, self.x), self.x))(params)
        updates, state = self.optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    def _statistics_step(self, params: Any, state: Any) -> Any:
        value, gradient, statistics = self.optimizer.value_grad_and_statistics(params, self.x, loss_normalizer=1.0)
        updates, state = self.optimizer.update(gradient, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state, value

    def steps(self, first: int, end: int) -> None:
        for step in range(first, end):
            run = self._statistics if self.optimizer.is_statistics_step(step) else self._plain
            self.params, self.state, value = run(self.params, self.state)
            self.losses.append(float(value))


def the_scaling_trains_and_resumes() -> None:
    run = Run(scaling="smoothed")
    run.steps(0, 5)
    assert run.losses[-1] < run.losses[0], run.losses
    for stack in find_state(run.state).stacks.values():
        assert (stack.kept["steps"] == 5).all()
        assert stack.kept["average"].any()
    saved = flax.serialization.to_bytes((run.params, run.state))
    like = Run(scaling="smoothed")
    like.params, like.state = flax.serialization.from_bytes((like.params, like.state), saved)
    assert jax.tree.structure(like.state) == jax.tree.structure(run.state)
    for other in (run, like):
        other.steps(5, 8)
    both = zip(jax.tree.leaves((run.params, run.state)), jax.tree.leaves((like.params, like.state)), strict=True)
    assert all(np.array_equal(p, q) for p, q in both)


def the_plan_counts_it() -> None:
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), initial())
    x = normal(9, 6, 4, 5).astype(jnp.float32)
    configs = [KFACConfig(**OPTIONS, scaling=name) for name in ("smoothed", "power")]
    toy, power = (plan(model, single, x, config=config) for config in configs)
    for ours, theirs in zip(toy.layers, power.layers, strict=True):
        assert ours.preconditioning == theirs.preconditioning + 3 * ours.spec.num_parameters
        assert ours.refresh == theirs.refresh
    counts = 4 * len(toy.layers)  # one of steps for each layer
    assert toy.memory.kfac_state == power.memory.kfac_state + 4 * toy.coverage.num_covered + counts
    state = KFAC(model, loss, single, x, config=configs[0]).init(single)
    assert toy.memory.state == sum(leaf.nbytes for leaf in jax.tree.leaves(find_state(state)))


def the_kind_is_covered() -> None:
    coverage = Run().optimizer.coverage()
    layer = next(spec for spec in coverage.layers if spec.weight == "scale")
    assert (layer.kind, layer.groups, layer.in_dim, layer.bias) == ("scale", 3, 1, "shift"), layer
    assert coverage.fraction == 1
    seen = next(la for la in plan(model, initial(), normal(9, 6, 4, 5)).layers if la.spec.weight == "scale")
    assert (seen.load.examples, seen.load.positions) == (6, 4), seen.load
    assert seen.statistics > 0
    assert seen.model == 6 * 24 * 3


def its_approximation_is_its_own() -> None:
    coverage = Run(approximation={"scale": "reduce"}).optimizer.coverage()
    found = {spec.kind: spec.approximation for spec in coverage.layers}
    assert found == {"linear": "expand", "scale": "reduce"}, found


def its_factors_are_right() -> None:
    params, x = initial(), normal(9, 6, 4, 5)
    with listening() as products:
        optimizer = KFAC(model, loss, params, x, **OPTIONS)
        _, gradient, _ = optimizer.value_grad_and_statistics(params, x)
        errors, _ = compare(optimizer.layers, gradient, products)
    assert set(errors) == {"in", "out", "scale"}, errors
    assert max(errors.values()) < 1e-12, errors
    inputs = x @ params["in"]["w"]
    hidden = jnp.tanh(inputs * params["scale"] + params["shift"])
    delta = 2 * (model(params, x) - 0.3) @ params["out"]["w"].T * (1 - jnp.square(hidden))
    for approximation in ("expand", "reduce"):
        g, rows = delta, jnp.stack([inputs, jnp.ones_like(inputs)], -1)  # (N, R, groups, P_in + 1)
        if approximation == "reduce":
            rows, g = rows.mean(1, keepdims=True), g.sum(1, keepdims=True)
        a = jnp.einsum("nrgi,nrgj->gij", rows, rows) / (rows.shape[0] * rows.shape[1])
        b = jnp.square(g).sum((0, 1)).reshape(3, 1, 1)
        assert_equal(factors(model, loss, params, x, approximation=approximation)["scale"], (a, b))


if __name__ == "__main__":
    assert Path(algoperf_kfac.__file__).is_relative_to(sys.argv[1]), algoperf_kfac.__file__
    jax.config.update("jax_enable_x64", True)
    the_scaling_trains_and_resumes()
    the_plan_counts_it()
    the_kind_is_covered()
    its_approximation_is_its_own()
    its_factors_are_right()
