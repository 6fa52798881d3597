"""Every way a model can use a weight: covered with the right factors, or listed with the reason; never silence."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from jax import Array, lax

from algoperf_kfac.jax import KFAC, Positions, layer_states
from algoperf_kfac.jax.operations import ConvGeometry
from algoperf_kfac.jax.transform import find_state
from tests.jax import naive
from tests.jax.support import applier, assert_equal, examples, factors, initialise, normal, observe

Apply = Callable[..., Any]


def wavy(outputs: Any, *args: Any) -> Array:
    """A loss whose gradient differs in every output."""
    return sum(jnp.sin(f + jnp.arange(f.size).reshape(f.shape)).sum() for f in jax.tree.leaves(outputs))


def of(module: nn.Module, *args: Any) -> tuple[Apply, Any, tuple[Any, ...]]:
    """A module's function, parameters and arguments."""
    return applier(module), initialise(module, *args), args


class Stack(nn.Module):
    """Modules one after the other."""

    layers: tuple[Any, ...]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for layer in self.layers:
            x = layer(x)
        return x


def stack(*layers: Any, x: Array) -> tuple[Apply, Any, tuple[Any, ...]]:
    return of(Stack(layers), x)


def conv(features: int, kernel: tuple[int, ...], *size: int, **options: Any) -> tuple[Apply, Any, tuple[Any, ...]]:
    return of(nn.Conv(features, kernel, **options), normal(1, 3, *size))


def transposed(features: int, kernel: tuple[int, ...], *size: int, **options: Any) -> Any:
    return of(nn.ConvTranspose(features, kernel, **options), normal(1, 3, *size))


def raw(function: Apply, *args: Any, **shapes: tuple[int, ...]) -> tuple[Apply, Any, tuple[Any, ...]]:
    """A function of parameters by name."""
    return function, {name: normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}, args


class Repeated(nn.Module):
    """One module called twice, and once more on fewer positions."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dense = nn.Dense(4)
        return dense(jnp.tanh(dense(x))) + dense(x[:, :1])


class RematBlock(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.Dense(3)(nn.relu(nn.Dense(5)(x)))


def nchw(p: Any, x: Array) -> Array:
    out = lax.conv_general_dilated(x, p["w"], (2, 1), [(1, 0), (2, 1)], rhs_dilation=(1, 2))
    return out + p["b"][:, None, None]


def iohw(p: Any, x: Array) -> Array:
    return lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=("HWNC", "IOHW", "NHWC"))


@jax.custom_vjp
def clipped(x: Array) -> Array:
    return x


clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.5, 0.5),))


def per_example(p: Any, x: Array) -> Array:
    """A model of one example, mapped over the batch."""

    def one(x: Array) -> Array:
        x = lax.conv_general_dilated(x[None], p["k"], (1,), "SAME")[0]
        return jnp.tanh(x.T @ p["w"] + p["b"]) @ p["v"]

    return jax.vmap(one)(x)


def to_half(p: Any, x: Array) -> Array:
    return (x.astype(jnp.float32) @ p["w"].astype(jnp.float32)).astype(jnp.float64) + p["b"]


# name -> the model, its covered layers with their biases, and the parameters left over.
SQUARE = (2, 3)  # examples, positions
CASES: dict[str, tuple[Callable[[], Any], dict[str, str | None], set[str]]] = {
    "dense": (lambda: of(nn.Dense(3), normal(1, 5, 4)), {"kernel": "bias"}, set()),
    "dense-positions-no-bias": (
        lambda: of(nn.Dense(3, use_bias=False), normal(1, 2, 3, 2, 4)), {"kernel": None}, set(),
    ),
    "dense-of-a-vector": (lambda: of(nn.Dense(3), normal(1, 4)), {"kernel": "bias"}, set()),
    "mlp": (
        lambda: stack(nn.Dense(5), nn.gelu, nn.Dense(3), x=normal(1, 2, 3, 4)),
        {"layers_0/kernel": "layers_0/bias", "layers_2/kernel": "layers_2/bias"}, set(),
    ),
    "dense-general-heads": (lambda: of(nn.DenseGeneral((2, 3)), normal(1, 2, 3, 4)), {"kernel": "bias"}, set()),
    "dense-general-axes": (
        lambda: of(nn.DenseGeneral(5, axis=(-2, -1)), normal(1, 2, 3, 2, 4)), {"kernel": "bias"}, set(),
    ),
    "dense-general-first-axis": (
        lambda: of(nn.DenseGeneral((2, 2), axis=(1, 3)), normal(1, 2, 3, 2, 4)), {"kernel": "bias"}, set(),
    ),
    "dense-general-batch-dim": (
        lambda: of(nn.DenseGeneral(3, axis=-1, batch_dims=(0,)), normal(1, 2, 4, 5)), {"kernel": "bias"}, set(),
    ),
    "einsum-module": (lambda: of(nn.Einsum((4, 2, 3), "btd,dhk->bthk"), normal(1, 2, 3, 4)),
                      {"kernel": "bias"}, set()),
    "einsum-module-transposed-output": (
        lambda: of(nn.Einsum((4, 5), "btd,dk->bkt", use_bias=False), normal(1, 2, 3, 4)), {"kernel": None}, set(),
    ),
    "attention": (
        lambda: of(nn.MultiHeadDotProductAttention(2, qkv_features=4), normal(1, 2, 3, 4)),
        {f"{n}/kernel": f"{n}/bias" for n in ("query", "key", "value", "out")}, set(),
    ),
    "conv1d-causal": (lambda: conv(3, (3,), 5, 2, padding="CAUSAL"), {"kernel": "bias"}, set()),
    "conv1d-strided-dilated": (
        lambda: conv(3, (3,), 9, 2, strides=2, kernel_dilation=2, padding=[(1, 2)]), {"kernel": "bias"}, set(),
    ),
    "conv2d-same-stride": (lambda: conv(3, (3, 2), 5, 4, 2, strides=(2, 1)), {"kernel": "bias"}, set()),
    "conv2d-valid-no-bias": (
        lambda: conv(3, (2, 3), 4, 4, 2, padding="VALID", use_bias=False), {"kernel": None}, set(),
    ),
    "conv2d-circular": (lambda: conv(2, (3, 3), 4, 5, 2, padding="CIRCULAR"), {"kernel": "bias"}, set()),
    "conv2d-reflect": (lambda: conv(2, (3, 3), 4, 5, 2, padding="REFLECT"), {"kernel": "bias"}, set()),
    "conv2d-groups": (lambda: conv(6, (3, 3), 4, 4, 4, feature_group_count=2), {"kernel": "bias"}, set()),
    "conv2d-depthwise": (lambda: conv(6, (2, 2), 3, 3, 3, feature_group_count=3), {"kernel": "bias"}, set()),
    "conv2d-input-dilation": (
        lambda: conv(2, (3, 3), 3, 3, 2, input_dilation=(2, 1), padding=[(2, 1), (0, 1)]),
        {"kernel": "bias"}, set(),
    ),
    "conv2d-two-batch-dims": (lambda: of(nn.Conv(2, (3, 3)), normal(1, 2, 3, 4, 4, 2)), {"kernel": "bias"}, set()),
    "conv3d": (lambda: conv(2, (2, 2, 1), 3, 3, 2, 2), {"kernel": "bias"}, set()),
    "conv-transpose-same": (lambda: transposed(3, (3,), 4, 2, strides=(2,)), {"kernel": "bias"}, set()),
    "conv-transpose-valid-2d": (
        lambda: transposed(2, (3, 2), 3, 3, 3, strides=(2, 3), padding="VALID", kernel_dilation=(1, 2)),
        {"kernel": "bias"}, set(),
    ),
    "conv-transpose-transposed-kernel": (
        lambda: transposed(3, (3, 2), 3, 3, 2, strides=(2, 2), transpose_kernel=True), {"kernel": "bias"}, set(),
    ),
    "conv-transpose-circular": (
        lambda: transposed(3, (3,), 4, 2, strides=(2,), padding="CIRCULAR"), {"kernel": None}, {"bias"},
    ),
    "embedding": (
        lambda: of(Stack((nn.Embed(7, 4), nn.Dense(3))), jnp.array([[0, 3, 3], [6, 1, 2]])),
        {"layers_1/kernel": "layers_1/bias"}, {"layers_0/embedding"},
    ),
    "norms": (
        lambda: stack(nn.Dense(4), nn.LayerNorm(), nn.GroupNorm(2), nn.RMSNorm(), x=normal(1, 2, 3, 4)),
        {"layers_0/kernel": "layers_0/bias"},
        {"layers_1/scale", "layers_1/bias", "layers_2/scale", "layers_2/bias", "layers_3/scale"},
    ),
    "repeated": (lambda: of(Repeated(), normal(1, 2, 3, 4)), {"Dense_0/kernel": "Dense_0/bias"}, set()),
    "jitted": (
        lambda: stack(nn.jit(nn.Dense)(4), jax.jit(nn.gelu), x=normal(1, 2, 3, 4)),
        {"layers_0/kernel": "layers_0/bias"}, set(),
    ),
    "custom-gradients-around": (
        lambda: raw(lambda p, x: clipped(jax.nn.silu(clipped(x @ p["w"] + p["b"])) @ p["v"]),
                    normal(1, 3, 2, 4), w=(4, 3), b=(3,), v=(3, 2)),
        {"w": "b", "v": None}, set(),
    ),
    "raw-weight-on-the-left": (
        lambda: raw(lambda p, x: jnp.einsum("oi,nir->nor", p["w"], x) + p["b"][:, None],
                    normal(1, 2, 4, 3), w=(5, 4), b=(5,)),
        {"w": "b"}, set(),
    ),
    "raw-grouped-einsum": (
        lambda: raw(lambda p, x: jnp.einsum("ngi,goi->ngo", x, p["w"]) + p["b"],
                    normal(1, 3, 2, 4), w=(2, 5, 4), b=(2, 5)),
        {"w": "b"}, set(),
    ),
    "raw-grouped-einsum-positions": (
        lambda: raw(lambda p, x: jnp.einsum("nrgi,giok->nrgok", x, p["w"]),
                    normal(1, 3, 2, 2, 4), w=(2, 4, 3, 2)),
        {"w": None}, set(),
    ),
    "raw-reshaped-and-transposed": (
        lambda: raw(lambda p, x: x @ p["w"].transpose(2, 0, 1).reshape(4, 6), normal(1, 3, 4), w=(2, 3, 4)),
        {"w": None}, set(),
    ),
    "raw-transposed-table": (
        lambda: raw(lambda p, x: x @ p["w"].T + p["b"], normal(1, 3, 4), w=(6, 4), b=(6,)), {"w": "b"}, set(),
    ),
    "raw-conv-nchw": (
        lambda: raw(nchw, normal(1, 3, 2, 5, 6), w=(4, 2, 3, 2), b=(4,)), {"w": "b"}, set(),
    ),
    "raw-conv-iohw": (lambda: raw(iohw, normal(1, 4, 5, 3, 2), w=(2, 4, 3, 3)), {"w": None}, set()),
    "mapped-over-examples": (
        lambda: raw(per_example, normal(1, 3, 2, 5), k=(4, 2, 3), w=(4, 3), b=(3,), v=(3, 2)),
        {"k": None, "w": "b", "v": None}, set(),
    ),
    "bias-added-with-keepdims": (
        lambda: raw(lambda p, x: x @ p["w"] + p["b"], normal(1, 3, 2, 4), w=(4, 3), b=(1, 1, 3)), {"w": "b"}, set(),
    ),
    "bias-over-positions-is-none": (
        lambda: raw(lambda p, x: x @ p["w"] + p["b"], normal(1, 2, 3, 4), w=(4, 3), b=(3, 3)), {"w": None}, {"b"},
    ),
    "square-bias-along-the-wrong-dimension": (
        lambda: raw(lambda p, x: x @ p["w"] + p["b"][:, None], normal(1, 2, 3, 4), w=(4, 3), b=(3,)),
        {"w": None}, {"b"},
    ),
    "bias-of-two-layers": (
        lambda: raw(lambda p, x: x @ p["w"] + p["b"] + (x @ p["v"] + p["b"]), normal(1, 3, 4),
                    w=(4, 3), v=(4, 3), b=(3,)),
        {"w": None, "v": None}, {"b"},
    ),
    "cast": (lambda: raw(to_half, normal(1, 3, 4), w=(4, 3), b=(3,)), {"w": "b"}, set()),
}  # fmt: skip


def check(apply: Apply, params: Any, args: tuple[Any, ...], rtol: float = 1e-10) -> KFAC:
    """Pairs of inputs and output gradients make the gradient, and the library's factors are those of the pairs."""
    recorded = naive.record(apply, wavy, params, *args)
    gradient = jax.tree.leaves(jax.jit(jax.grad(lambda p: wavy(apply(p, *args))))(params))
    for approximation in ("expand", "reduce"):
        optimizer = KFAC(apply, wavy, params, *args, approximation=approximation)
        number = {name: i for i, name in enumerate(optimizer.layers.shapes)}
        got, pairs = observe(optimizer, params, *args, loss_normalizer=1.0)
        for ours, theirs in zip(jax.tree.leaves(got), gradient, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=1e-12)
        assert pairs.keys() == optimizer.layers.covered.keys()
        for name, layer in optimizer.layers.covered.items():
            spec, calls = layer.spec, recorded[layer.spec.weight]
            inputs = np.concatenate([c.input_rows() for c in calls], 1)
            grads = np.concatenate([c.gradient_rows() for c in calls], 1)
            weight = gradient[number[spec.weight]]
            bias = None if spec.bias is None else gradient[number[spec.bias]]
            expected = np.einsum("nrgo,nrgi->goi", grads, inputs)
            if bias is not None:
                expected = np.concatenate([expected, grads.sum((0, 1))[..., None]], 2)
            matrix = layer.view.to_matrix(weight, bias)
            np.testing.assert_allclose(matrix, expected, rtol=0, atol=rtol * np.abs(expected).max())
            back = layer.view.from_matrix(matrix, layer.bias_shape)
            np.testing.assert_array_equal(back[0], weight)
            assert bias is None or np.array_equal(back[1], bias)
            want = naive.factors(inputs, grads, bias=bias is not None, approximation=approximation)
            assert_equal(pairs[name], want, rtol)
    return optimizer


@pytest.mark.parametrize("case", CASES)
def test_layers_by_hand(case: str) -> None:
    """A and B against loops over recorded inputs and output gradients, which in turn must make the gradient."""
    build, covered, left = CASES[case]
    apply, params, args = build()
    optimizer = check(apply, params, args, 1e-5 if case == "cast" else 1e-10)
    assert {la.spec.weight: la.spec.bias for la in optimizer.layers.covered.values()} == covered
    assert {f.name for f in optimizer.coverage().fallbacks} == left
    assert all(f.reason for f in optimizer.coverage().fallbacks)


def test_an_unused_layer_is_listed() -> None:
    apply, params, args = raw(lambda p, x: x @ p["w"], normal(1, 3, 4), w=(4, 3), dead=(4, 3))
    reasons = {f.name: f.reason for f in KFAC(apply, wavy, params, *args).coverage().fallbacks}
    assert reasons == {"dead": "no operation with a rule reads it"}


# Wrapped models against the same computation written without the wrapper -----------------------------------------


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


# What is not covered says why -------------------------------------------------------------------------------------


@jax.custom_vjp
def opaque(w: Array, x: Array) -> Array:
    return x @ w


opaque.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, g: (r[1].T @ g, g @ r[0].T))

REASONS: dict[str, tuple[Apply, dict[str, tuple[int, ...]], dict[str, str]]] = {
    "two-layouts": (
        lambda p, x: (x @ p["w"]) @ p["w"].T, {"w": (4, 3)}, {"w": "different layouts"},
    ),
    "low-rank-product": (
        lambda p, x: x @ (p["a"] @ p["b"]), {"a": (4, 2), "b": (2, 3)},
        {"a": "read by dot_general", "b": "read by dot_general"},
    ),
    "normalised-weight": (
        lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"])), {"w": (4, 3)}, {"w": "read by dot_general"},
    ),
    "scaled-second-use": (
        lambda p, x: x @ p["w"] + x @ (2 * p["w"]), {"w": (4, 3)}, {"w": "tied weight"},
    ),
    "scaled-by-data": (
        lambda p, x: x @ p["w"] + x @ (p["w"] / x[0, 0]), {"w": (4, 3)}, {"w": "tied weight"},
    ),
    "spectral-norm": (  # power iteration multiplies with the weight itself as well
        lambda p, x: x @ (p["w"] / jnp.linalg.norm(x[0] @ p["w"])), {"w": (4, 3)}, {"w": "tied weight"},
    ),
    "normalised-inside-remat": (
        lambda p, x: jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(p["w"] / p["w"].max(), x),
        {"w": (4, 3)}, {"w": "read by dot_general"},
    ),
    "derived-times-weight": (
        lambda p, x: x @ ((2 * p["a"]) @ p["b"]), {"a": (4, 2), "b": (2, 3)},
        {"a": "read by dot_general", "b": "read by dot_general"},
    ),
    "sliced-second-use": (
        lambda p, x: x @ p["w"] + (x[:, :2] @ p["w"][:2]), {"w": (4, 3)}, {"w": "slice reads it too"},
    ),
    "custom-vjp": (
        lambda p, x: opaque(p["w"], x), {"w": (4, 3)}, {"w": "read by custom_vjp"},
    ),
    "table-and-layer": (
        lambda p, x: p["w"][jnp.array([0, 1, 2])] + x @ p["w"], {"w": (4, 3)}, {"w": "tied weight"},
    ),
    "weight-as-carry": (
        lambda p, x: x @ lax.scan(lambda w, _: (jnp.tanh(w), None), p["w"], None, length=2)[0],
        {"w": (4, 3)}, {"w": "read by scan"},
    ),
    "batch-groups": (
        lambda p, x: lax.conv_general_dilated(
            x.reshape(2, 1, 6), p["w"], (1,), "SAME", batch_group_count=2
        ),
        {"w": (2, 1, 3)}, {"w": "read by conv_general_dilated"},
    ),
    "weight-as-input": (
        lambda p, x: lax.conv_general_dilated(p["w"][None, None], x[:, None, :3], (1,), "SAME")[0, 0],
        {"w": (6,)}, {"w": "read by conv_general_dilated"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REASONS)
def test_reasons(case: str) -> None:
    """Nothing is covered by halves: a use without a rule moves the weight to the fallback, with the reason."""
    apply, shapes, reasons = REASONS[case]
    params = {name: normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    coverage = KFAC(apply, wavy, params, normal(1, 3, 4)).coverage()
    assert not coverage.layers
    got = {f.name: f.reason for f in coverage.fallbacks}
    assert got.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in got[name]


def test_penalties_and_norms_do_not_hide_a_layer() -> None:
    """Reading a weight without multiplying it into the data adds to its gradient, not to its curvature."""

    def apply(p: Any, x: Array) -> tuple[Array, Array]:
        w = p["w"]
        return x @ w + p["b"], jnp.square(w).sum() + jnp.abs(w - 1).max() + jnp.where(w > 0, 2 * w, 0).mean()

    optimizer = KFAC(apply, wavy, *raw(apply, w=(4, 3), b=(3,))[1:2], normal(1, 3, 4))
    assert optimizer.coverage().fraction == 1


# Convolutions of every geometry -----------------------------------------------------------------------------------


@st.composite
def geometries(draw: st.DrawFn) -> ConvGeometry:
    dims = draw(st.sampled_from([1, 1, 2, 3]))

    def sizes(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    kernel, stride, dilation, in_dilation = sizes(1, 3), sizes(1, 3), sizes(1, 2), sizes(1, 3)
    in_size = sizes(1, 4)
    padding = tuple((draw(st.integers(-1, 3)), draw(st.integers(-1, 3))) for _ in range(dims))
    out = []
    for k, s, d, i, n, (before, after) in zip(kernel, stride, dilation, in_dilation, in_size, padding, strict=True):
        extent = (n - 1) * i + 1 + before + after - (d * (k - 1) + 1)
        assume(extent >= 0 and (n - 1) * i + 1 + min(before, 0) + min(after, 0) > 0)
        out.append(extent // s + 1)
    return ConvGeometry(
        kernel, stride, dilation, in_dilation, padding, in_size, tuple(out), draw(st.integers(1, 3))
    )


@examples(15)
@given(geometries(), st.integers(0, 9))
def test_patches(conv: ConvGeometry, seed: int) -> None:
    """Unfolded patches and their sums, with and without a mask, against one entry at a time; and the geometry
    against JAX's own convolution."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, 2 * conv.groups, *conv.in_size))
    expected = naive.patches(conv, x)
    np.testing.assert_allclose(conv.patches(jnp.asarray(x)), expected, atol=1e-14)
    mask = rng.integers(0, 2, expected.shape[:2]).astype(float)
    np.testing.assert_allclose(conv.patch_sums(jnp.asarray(x), None), expected.sum(1), atol=1e-12)
    masked = np.einsum("nrgp,nr->ngp", expected, mask)
    np.testing.assert_allclose(conv.patch_sums(jnp.asarray(x), jnp.asarray(mask)), masked, atol=1e-12)
    weight = rng.standard_normal((conv.groups, 3, expected.shape[-1]))
    out = lax.conv_general_dilated(
        jnp.asarray(x), jnp.asarray(weight).reshape(conv.groups * 3, 2, *conv.kernel), conv.stride, conv.padding,
        conv.in_dilation, conv.dilation, feature_group_count=conv.groups,
    )  # fmt: skip
    product = np.einsum("nrgp,gop->ngor", expected, weight).reshape(out.shape)
    np.testing.assert_allclose(out, product, atol=1e-12)


# Positions --------------------------------------------------------------------------------------------------------

MASK = np.array([[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=float)


def split(rows: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
    return [r[m > 0] for r, m in zip(rows, mask, strict=True)]


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("kind", ["mask", "boolean", "gradient", "length-first", "conv", "conv-many-offsets"])
def test_masks(kind: str, approximation: str) -> None:
    """Masked positions count neither in R nor in the sums; an example without positions is no example."""
    mask = MASK
    if kind.startswith("conv"):
        kernel = (3,) if kind == "conv" else (70,)  # above MAX_WINDOWS patches are built after all
        module: nn.Module = nn.Conv(3, kernel, strides=2)
        x = normal(1, 4, 8, 2)
    elif kind == "length-first":
        module, x = nn.Dense(3), normal(1, 4, 4, 2)
    else:
        module, x = nn.Dense(3), normal(1, 4, 4, 2)
    weights = jnp.asarray(mask.T if kind == "length-first" else mask)
    positions = {
        "mask": weights, "boolean": weights > 0, "gradient": Positions("gradient"), "conv": weights,
        "conv-many-offsets": weights, "length-first": Positions(mask=weights, batch_dim=1),
    }[kind]  # fmt: skip

    def loss(f: Array, *args: Any) -> Array:
        return (jnp.sin(f + jnp.arange(f.size).reshape(f.shape)).sum(-1) * weights).sum()

    apply, params, args = of(module, x)
    (call,) = naive.record(apply, loss, params, *args)["kernel"]
    inputs, grads = call.input_rows(), call.gradient_rows()
    if kind == "length-first":
        inputs, grads = inputs.swapaxes(0, 1), grads.swapaxes(0, 1)
    got = factors(apply, loss, params, *args, positions=positions, approximation=approximation)["kernel"]
    want = naive.factors(split(inputs, mask), split(grads, mask), bias=True, approximation=approximation)
    assert_equal(got, want)


@pytest.mark.parametrize("readout", ["sum", "mean"])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_segments(approximation: str, readout: str) -> None:
    """Rows of a packed batch by segment, a mask over rows included; node and edge layers have their own ids."""
    nodes, edges = jnp.array([0, 0, 1, 2, 2, 2]), jnp.array([0, 1, 1, 2, 2, 1, 2])
    mask = np.array([1, 1, 1, 0, 1, 1], dtype=float)

    def apply(p: Any, x: Array, e: Array) -> Array:
        h = jnp.tanh(x @ p["node"]) * mask[:, None]
        m = jnp.tanh(e @ p["edge"] + p["b"])
        pooled = jax.ops.segment_sum(h, nodes, 3) + jax.ops.segment_sum(m, edges, 3)
        return pooled @ p["head"]

    params = {"node": normal(0, 4, 3), "edge": normal(1, 2, 3), "b": normal(2, 3), "head": normal(3, 3, 2)}
    args = normal(4, 6, 4), normal(5, 7, 2)
    options = {"num_segments": 3, "readout": readout}
    positions = [
        Positions(mask=jnp.asarray(mask), segment_ids=nodes, **options), Positions(segment_ids=edges, **options)
    ]  # fmt: skip
    recorded = {name: calls[0] for name, calls in naive.record(apply, wavy, params, *args).items()}
    pairs = factors(apply, wavy, params, *args, positions=positions, approximation=approximation)
    for name, ids, keep in (
        ("node", nodes, mask),
        ("edge", edges, np.ones(7)),
        ("head", jnp.arange(3), np.ones(3)),
    ):
        rows = [
            [t[(np.asarray(ids) == n) & (keep > 0), 0] for n in range(3)]
            for t in (recorded[name].input_rows(), recorded[name].gradient_rows())
        ]
        want = naive.factors(*rows, bias=name == "edge", approximation=approximation, readout=readout)
        assert_equal(pairs[name], want)


def test_blocks_above_the_largest_factor() -> None:
    """Block-diagonal and one-sided factors are the blocks of the whole ones."""
    apply, params, args = of(nn.Dense(3), normal(1, 6, 9))
    whole = factors(apply, wavy, params, *args)["kernel"]
    parts = factors(apply, wavy, params, *args, max_factor_dim=4)["kernel"]
    ends = [0, 4, 7, 10]
    for block, (start, stop) in zip(parts.A, itertools.pairwise(ends), strict=True):
        np.testing.assert_allclose(block, whole.A[start:stop, start:stop], atol=1e-12)
    one = factors(apply, wavy, params, *args, max_factor_dim=4, large_factor="one_sided")["kernel"]
    assert one.A == ()
    np.testing.assert_allclose(one.B, whole.B, atol=1e-12)


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_scales_of_mean_losses(approximation: str) -> None:
    """A mean loss, the summed one with its count, and AlgoPerf's mapping have the same factors."""
    apply, params, (x,) = of(nn.Dense(3), normal(1, 5, 2, 4))
    summed = factors(apply, wavy, params, x, approximation=approximation)["kernel"]
    mean = factors(apply, lambda f, x: wavy(f) / 5, params, x, loss_normalizer=None, approximation=approximation)
    assert_equal(mean["kernel"], summed)
    tokens = factors(apply, lambda f, x: wavy(f) / 10, params, x, loss_normalizer=10, approximation=approximation)
    assert_equal(tokens["kernel"], summed)
    optimizer = KFAC(
        apply, lambda f, x: {"summed": wavy(f), "n_valid_examples": jnp.asarray(7.0)}, params, x,
        approximation=approximation,
    )  # fmt: skip
    _, pairs = observe(optimizer, params, x)
    assert_equal(pairs["kernel"], summed)
