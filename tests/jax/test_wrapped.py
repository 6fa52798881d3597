"""Models in loops, branches and transformations against the same computation written without the wrapper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array, lax

from algoperf_kfac.jax import KFAC, layer_states
from algoperf_kfac.jax.transform import find_state
from tests.jax import naive
from tests.jax.models import Apply, of, raw, wavy
from tests.jax.support import applier, assert_equal, factors, normal


class Cell(nn.Module):
    """A turn of a loop: a recurrent layer with an input of its own."""

    @nn.compact
    def __call__(self, carry: Array, x: Array) -> tuple[Array, Array]:
        carry = jnp.tanh(nn.Dense(3, name="h")(carry) + nn.Dense(3, use_bias=False, name="x")(x))
        return carry, carry


def unrolled(cell: nn.Module, features: int) -> Apply:
    """The cell's outputs over time, by a Python loop."""

    def apply(params: Any, x: Array) -> Array:
        carry = cell.apply({"params": params["cell"]}, jax.random.key(0), x[:, 0].shape, method="initialize_carry")
        outputs = []
        for t in range(x.shape[1]):
            carry, y = cell.apply({"params": params["cell"]}, carry, x[:, t])
            outputs.append(y)
        return jnp.stack(outputs, 1)

    return apply


class Loop(nn.Module):
    """`Cell` through nn.scan, its parameters shared by all turns."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scan = nn.scan(
            nn.remat(Cell), variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1
        )
        return scan(name="cell")(jnp.zeros((len(x), 3)), x)[1]


def loop(params: Any, x: Array) -> Array:
    carry, outputs = jnp.zeros((len(x), 3)), []
    for t in range(x.shape[1]):
        carry, _ = Cell().apply({"params": params["cell"]}, carry, x[:, t])
        outputs.append(carry)
    return jnp.stack(outputs, 1)


def fori(p: Any, x: Array) -> Array:
    return lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ p["w"] + p["b"]), x)


def fori_unrolled(p: Any, x: Array) -> Array:
    for _ in range(3):
        x = jnp.tanh(x @ p["w"] + p["b"])
    return x


def branching(p: Any, x: Array) -> Array:
    x = lax.cond(x[0, 0] < 9, lambda x: jnp.tanh(x @ p["w"] + p["b"]), lambda x: x[:, :3] @ p["u"], x)
    return x @ p["v"]


def straight(p: Any, x: Array) -> Array:
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]


class RematBlock(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.Dense(3)(nn.relu(nn.Dense(5)(x)))


def rnn(cell: Any, **options: Any) -> tuple[Apply, Apply, Any, tuple[Any, ...]]:
    apply, params, args = of(nn.RNN(cell(3, param_dtype=jnp.float64), **options), normal(1, 2, 4, 2))
    return apply, unrolled(cell(3, param_dtype=jnp.float64), 3), params, args


WRAPPED: dict[str, Callable[[], tuple[Apply, Apply, Any, tuple[Any, ...]]]] = {
    "lstm": lambda: rnn(nn.LSTMCell),
    "optimized-lstm": lambda: rnn(nn.OptimizedLSTMCell),
    "gru": lambda: rnn(nn.GRUCell),
    "simple-unrolled-by-two": lambda: rnn(nn.SimpleCell, unroll=2),
    "scan-over-remat": lambda: (applier(Loop()), loop, *of(Loop(), normal(1, 2, 4, 2))[1:]),
    "fori-loop": lambda: (fori, fori_unrolled, *raw(fori, normal(1, 2, 4), w=(4, 4), b=(4,))[1:]),
    "remat": lambda: (
        applier(nn.remat(RematBlock)()), applier(RematBlock()), *of(RematBlock(), normal(1, 2, 3, 4))[1:],
    ),
    "remat-policy": lambda: (
        applier(nn.remat(RematBlock, policy=jax.checkpoint_policies.dots_saveable)()),
        applier(RematBlock()),
        *of(RematBlock(), normal(1, 2, 3, 4))[1:],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRAPPED)
def test_wrapped_layers(case: str) -> None:
    """Loops, recurrent cells and rematerialised blocks have the factors of the plain computation, calls joined."""
    apply, plain, params, args = WRAPPED[case]()
    recorded = naive.record(plain, wavy, params, *args)
    for approximation in ("expand", "reduce"):
        optimizer = KFAC(apply, wavy, params, *args, approximation=approximation)
        assert {la.spec.weight for la in optimizer.layers.covered.values()} == recorded.keys()
        biased = {la.spec.bias for la in optimizer.layers.covered.values()} - {None}
        assert biased == {name for name in optimizer.layers.shapes if name.split("/")[-1] in ("bias", "b")}
        pairs = factors(apply, wavy, params, *args, approximation=approximation)
        for name, layer in optimizer.layers.covered.items():
            calls = recorded[layer.spec.weight]
            want = naive.factors(
                np.concatenate([c.input_rows() for c in calls], 1),
                np.concatenate([c.gradient_rows() for c in calls], 1),
                bias=layer.spec.bias is not None,
                approximation=approximation,
            )
            assert_equal(pairs[name], want)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: Array, _: Any = None) -> tuple[Array, None]:
        return x + nn.Dense(4, name="out")(jnp.tanh(nn.Dense(5, name="in")(x))), None


class Layers(nn.Module):
    """Three blocks whose parameters are stacked."""

    remat: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        block = nn.remat(Block) if self.remat else Block
        scan = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scan(name="blocks")(x, None)[0]


def layers_unrolled(params: list[Any], x: Array) -> Array:
    for p in params:
        x, _ = Block().apply({"params": p}, x)
    return x


class Parallel(nn.Module):
    """A Dense layer with different weights for each position."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kind = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=1, out_axes=1)
        return kind(5, name="dense")(x)


def parallel_unrolled(params: list[Any], x: Array) -> Array:
    return jnp.stack([nn.Dense(5).apply({"params": p}, x[:, i]) for i, p in enumerate(params)], 1)


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("kind", ["scan", "scan-of-remat", "vmap"])
def test_stacked_layers(kind: str, approximation: str) -> None:
    """One parameter for several layers: a group of factors for each, equal to those of separate layers."""
    module = Parallel() if kind == "vmap" else Layers(kind == "scan-of-remat")
    plain = parallel_unrolled if kind == "vmap" else layers_unrolled
    apply, params, (x,) = of(module, normal(1, 2, 3, 2, 4) if kind == "vmap" else normal(1, 2, 3, 4))
    root = "dense" if kind == "vmap" else "blocks"
    pairs = factors(apply, wavy, params, x, approximation=approximation)
    separate = [jax.tree.map(lambda t, i=i: t[i], params[root]) for i in range(3)]
    expected = factors(plain, wavy, separate, x, approximation=approximation)
    assert pairs.keys() == ({root} if kind == "vmap" else {f"{root}/in", f"{root}/out"})
    for name, pair in pairs.items():
        parts = [expected[f"{i}{name.removeprefix(root)}"] for i in range(3)]
        assert_equal(pair, (np.stack([p.A for p in parts]), np.stack([p.B for p in parts])))


class Behind(nn.Module):
    """Layers stacked along a dimension of their parameters that is not the first: of biases the last."""

    vmap: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if not self.vmap:
            scan = nn.scan(Block, variable_axes={"params": 1}, split_rngs={"params": True}, length=3)
            return scan(name="blocks")(x, None)[0]
        kind = nn.vmap(nn.Dense, variable_axes={"params": 1}, split_rngs={"params": True}, in_axes=1, out_axes=1)
        return kind(3, name="dense")(x)  # as many outputs as layers: shapes do not tell


@pytest.mark.parametrize("vmap", [False, True])
def test_biases_of_layers_stacked_behind_are_in_their_layers(vmap: bool) -> None:
    """Factors, check and updates are those of the same layers stacked in front."""
    apply, behind, (x,) = of(Behind(vmap), normal(1, 2, 3, 2, 4) if vmap else normal(1, 2, 3, 4))
    front = jax.tree.map(lambda t: jnp.moveaxis(t, 1, 0), behind)
    module = nn.vmap(nn.Dense, variable_axes={"params": 0}, in_axes=1, out_axes=1)(3, name="dense")

    def twin(params: Any, x: Array) -> Array:
        if vmap:
            return module.apply({"params": params["dense"]}, x)
        return applier(Layers())(params, x)

    updates = []
    for function, params in ((apply, behind), (twin, front)):
        optimizer = KFAC(function, wavy, params, x, learning_rate=1.0, weight_decay=0.0, factor_interval=1)
        assert optimizer.coverage().fraction == 1
        assert max(optimizer.check(params, x).values()) < 1e-10
        _, gradient, statistics = optimizer.value_grad_and_statistics(params, x)
        update, state = optimizer.update(gradient, optimizer.init(params), params, statistics=statistics)
        updates.append((update, optimizer.factors(state)))
    (of_behind, pairs), (of_front, expected) = updates
    assert pairs.keys() == expected.keys()
    for name in pairs:
        assert_equal(pairs[name], expected[name])
    moved = jax.tree.map(lambda t: jnp.moveaxis(t, 1, 0), of_behind)
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-8, atol=1e-10), moved, of_front)


class Handed(nnx.Module):
    """nnx hands out a module's states behind each transformation: its next call reads those."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        def dense(rngs: nnx.Rngs) -> nnx.Linear:
            return nnx.Linear(4, 4, rngs=rngs, param_dtype=jnp.float64)

        self.stack = nnx.split_rngs(splits=3)(nnx.vmap(dense))(rngs)
        self.one, self.other, self.third = dense(rngs), dense(rngs), dense(rngs)

    def blocks(self, x: Array) -> Array:
        scan = nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return scan(nnx.remat(lambda x, layer: jnp.tanh(layer(x))))(x, self.stack)

    def branch(self, x: Array, number: int) -> Array:
        branches = [lambda m, x: jnp.tanh(m.one(x)), lambda m, x: jnp.tanh(m.other(x))]
        return nnx.switch(jnp.asarray(number), branches, self, x)

    def turns(self, x: Array) -> Array:
        body = nnx.remat(lambda m, x: jnp.tanh(m.third(x)))
        return nnx.fori_loop(0, 2, lambda i, carry: (carry[0], body(*carry)), (self, x))[1]

    def __call__(self, x: Array) -> Array:
        return self.branch(self.turns(self.blocks(self.turns(self.branch(self.blocks(x), 1)))), 0)


def handed(params: Any, x: Array) -> Array:
    """The same without transformations that hand anything out."""

    def dense(name: str, x: Array) -> Array:
        return jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"])

    def blocks(x: Array) -> Array:
        return lax.scan(lambda x, p: (jnp.tanh(x @ p["kernel"] + p["bias"]), None), x, params["stack"])[0]

    def turns(x: Array) -> Array:
        return lax.fori_loop(0, 2, lambda i, x: dense("third", x), x)

    return dense("one", turns(blocks(turns(dense("other", blocks(x))))))


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_states_that_transformations_hand_out(approximation: str) -> None:
    graph, params = nnx.split(Handed(nnx.Rngs(0)))
    x = normal(1, 2, 3, 4)
    pairs = factors(lambda p, x: nnx.merge(graph, p)(x), wavy, params, x, approximation=approximation)
    expected = factors(handed, wavy, params.to_pure_dict(), x, approximation=approximation)
    assert pairs.keys() == expected.keys() == {"stack", "one", "other", "third"}
    for name, pair in pairs.items():
        assert_equal(pair, expected[name])


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_branches(approximation: str) -> None:
    """The branch that is taken has the factors of the plain computation; the other one has none, and waits."""
    apply, params, (x,) = raw(branching, normal(1, 3, 4), w=(4, 3), b=(3,), u=(3, 3), v=(3, 2))
    optimizer = KFAC(apply, wavy, params, x, approximation=approximation)
    assert {la.spec.weight: la.spec.bias for la in optimizer.layers.covered.values()} == {
        "w": "b", "u": None, "v": None
    }  # fmt: skip
    _, gradient, statistics = jax.jit(optimizer.value_grad_and_statistics)(params, x, loss_normalizer=1.0)
    _, state = jax.jit(optimizer.update)(gradient, optimizer.init(params), params, statistics=statistics)
    rest = {k: v for k, v in params.items() if k != "u"}
    expected = factors(straight, wavy, rest, x, approximation=approximation)
    states = layer_states(find_state(state).stacks, optimizer.layers)
    for name in ("w", "v"):
        layer = states[name]
        a, b = (m[0][0] / layer.weight for m in (layer.a, layer.b))
        assert_equal((a, b * 3), expected[name])
    assert int(states["w"].refreshes) == int(states["v"].refreshes) == 1
    assert int(states["u"].refreshes) == 0
    assert not optimizer.factors(state)["u"].A.any()
    assert optimizer.metrics(state)["dropped"] == optimizer.metrics(state)["failures"] == 0


def test_loops_and_branches_in_a_process_without_jit() -> None:
    """Where a model is debugged, statistics are those of the compiled program."""

    def apply(p: Any, x: Array) -> Array:
        x = lax.scan(lambda x, p: (jnp.tanh(x @ p["w"] + p["b"]), None), x, p["stack"])[0]
        return lax.cond(x.sum() < jnp.inf, lambda x: x @ p["u"], lambda x: x @ p["v"], x)

    params = {"stack": {"w": normal(0, 2, 3, 3), "b": normal(1, 2, 3)}, "u": normal(2, 3, 2), "v": normal(3, 3, 2)}
    x = normal(4, 5, 3)
    optimizer = KFAC(apply, wavy, params, x)
    expected = jax.jit(optimizer.value_grad_and_statistics)(params, x)
    with jax.disable_jit():
        assert KFAC(apply, wavy, params, x).layers.covered == optimizer.layers.covered
        found = optimizer.value_grad_and_statistics(params, x)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)
