"""Every way a model can use a weight: covered with the right factors, or listed with the reason; never silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import Array, lax

from algoperf_kfac.jax import KFAC
from tests.jax.models import Apply, Stack, check, conv, of, raw, stack, transposed, wavy
from tests.jax.support import normal


class Repeated(nn.Module):
    """One module called twice, and once more on fewer positions."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dense = nn.Dense(4)
        return dense(jnp.tanh(dense(x))) + dense(x[:, :1])


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


def single_outputs(p: Any, x: Array) -> tuple[Array, Array, Array]:
    """Dimensions of size 1 that are indexed away before the bias, or never there."""
    x = jnp.tanh((p["a"].T @ x[..., None])[..., 0] + p["b"])
    return x @ p["c"] + p["d"], (x @ p["e"])[:, 0] + p["f"], x @ p["g"][0] + p["h"]


def repeated_weights(p: Any, x: Array) -> Array:
    """A weight for each example, all of them one, as what maps over examples spells it."""
    n = len(x)
    x = jnp.tanh(x @ jnp.broadcast_to(p["a"], (n, *p["a"].shape)) + p["b"])
    x = jnp.tanh(jnp.einsum("nri,nij->nrj", x, jnp.tile(p["c"], (n, 1, 1))))
    return jnp.einsum("noi,nri->nro", jnp.repeat(p["d"][None], n, 0).swapaxes(1, 2), x)


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
    "raw-single-outputs": (
        lambda: raw(single_outputs, normal(1, 3, 4), a=(4, 5), b=(5,), c=(5,), d=(), e=(5, 1), f=(), g=(1, 5),
                    h=()),
        {"a": "b", "c": "d", "e": "f", "g": "h"}, set(),
    ),
    "raw-weights-repeated": (
        lambda: raw(repeated_weights, normal(1, 2, 3, 4), a=(4, 3), b=(3,), c=(3, 5), d=(5, 2)),
        {"a": "b", "c": None, "d": None}, set(),
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
    "raw-reshaped-in-another-order": (
        lambda: raw(lambda p, x: jax.lax.reshape(jax.lax.reshape(x @ jax.lax.reshape(p["w"], (4, 6), (2, 0, 1)),
                                                                 (6, 1, 3), (1, 0)) + p["b"], (6, 3)),
                    normal(1, 3, 4), w=(2, 3, 4), b=(6, 1, 1)),
        {"w": "b"}, set(),
    ),
    "mapped-over-kernels": (
        lambda: raw(lambda p, x: jax.vmap(lambda w: jax.lax.conv(x, w, (1, 1), "SAME"))(p["w"]),
                    normal(1, 2, 3, 4, 2), w=(2, 5, 3, 2, 2)),
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


def test_an_unused_vector_is_no_scale() -> None:
    """Of a layer that the model lost, its bias says so, too."""
    apply, params, args = raw(
        lambda p, x: x @ p["w"] * p["scale"], normal(1, 3, 4), w=(4, 3), scale=(3,), dead=(3,)
    )
    reasons = {f.name: f.reason for f in KFAC(apply, wavy, params, *args).coverage().fallbacks}
    assert reasons["dead"] == "no operation with a rule reads it"
    assert reasons["scale"].startswith("scale or bias")


# What is not covered says why -------------------------------------------------------------------------------------


@jax.custom_vjp
def opaque(w: Array, x: Array) -> Array:
    return x @ w


opaque.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, g: (r[1].T @ g, g @ r[0].T))

BEFORE = "dot_general reads a function of it, not the parameter itself"
REASONS: dict[str, tuple[Apply, dict[str, tuple[int, ...]], dict[str, str]]] = {
    "two-layouts": (
        lambda p, x: (x @ p["w"]) @ p["w"].T, {"w": (4, 3)}, {"w": "different layouts"},
    ),
    "low-rank-product": (
        lambda p, x: x @ (p["a"] @ p["b"]), {"a": (4, 2), "b": (2, 3)},
        {"a": BEFORE, "b": BEFORE},
    ),
    "normalised-weight": (
        lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"])), {"w": (4, 3)}, {"w": BEFORE},
    ),
    "scaled-second-use": (
        lambda p, x: x @ p["w"] + x @ (2 * p["w"]), {"w": (4, 3)}, {"w": "also read by dot_general"},
    ),
    "scaled-by-data": (
        lambda p, x: x @ p["w"] + x @ (p["w"] / x[0, 0]), {"w": (4, 3)}, {"w": "also read by dot_general"},
    ),
    "spectral-norm": (  # power iteration multiplies with the weight itself as well
        lambda p, x: x @ (p["w"] / jnp.linalg.norm(x[0] @ p["w"])),
        {"w": (4, 3)}, {"w": "also read by dot_general"},
    ),
    "normalised-inside-remat": (
        lambda p, x: jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(p["w"] / p["w"].max(), x),
        {"w": (4, 3)}, {"w": BEFORE},
    ),
    "derived-times-weight": (
        lambda p, x: x @ ((2 * p["a"]) @ p["b"]), {"a": (4, 2), "b": (2, 3)},
        {"a": BEFORE, "b": BEFORE},
    ),
    "sliced-second-use": (
        lambda p, x: x @ p["w"] + (x[:, :2] @ p["w"][:2]), {"w": (4, 3)}, {"w": "also read by dot_general"},
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
