"""A weight with another use than those that are recorded is not covered; what is covered has its whole gradient."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array, lax
from jax.experimental.sparse import BCOO
from jax.sharding import PartitionSpec

from algoperf_kfac.jax import KFAC
from tests.jax import naive
from tests.jax.models import wavy
from tests.jax.support import normal

Use = Callable[[Array, Array, Array], Any]
D = 4
SIZES = np.array([3, 2])


@jax.custom_vjp
def opaque(x: Array, w: Array) -> Array:
    return x @ w


opaque.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))


@jax.custom_jvp
def doubled(w: Array) -> Array:
    return 2 * w


doubled.defjvp(lambda primals, tangents: (2 * primals[0], 2 * tangents[0]))


def inner_step(x: Array, w: Array, e: Array) -> Array:
    return x @ (w - 0.1 * jax.grad(lambda w: jnp.square(x @ e @ w).mean())(w))


# Second uses of a weight that `x @ w` reads, too, with data x (examples, D) and e (D, D).
HIDDEN: dict[str, Use] = {
    "plus-data": lambda x, w, e: x @ (w + e),
    "interpolated": lambda x, w, e: x @ (0.9 * w + 0.1 * e),
    "times-data": lambda x, w, e: x @ (w * e),
    "times-a-number-of-the-data": lambda x, w, e: x @ (w * e.sum()),
    "rows-scaled-by-data": lambda x, w, e: x @ (w * e[0]),
    "masked-by-data": lambda x, w, e: x @ jnp.where(e > 0, w, 0.0),
    "clipped-by-data": lambda x, w, e: x @ jnp.clip(w, -jnp.abs(e).max(), jnp.abs(e).max()),
    "power-of-data": lambda x, w, e: x @ jnp.exp(w) ** e,
    "elementwise": lambda x, w, e: (x[:, :, None] * w).sum(1),
    "elementwise-with-one-example": lambda x, w, e: (x[0][:, None] * w).sum(),
    "distances": lambda x, w, e: jnp.square(x[:, None] - w.T).sum(-1),
    "largest": lambda x, w, e: jnp.maximum(x[:, :, None], w).sum(1),
    "inner-step": inner_step,
    "inner-gradient": lambda x, w, e: jax.grad(lambda h: jnp.tanh(h * w).sum())(e),
    "scaled": lambda x, w, e: x @ (2 * w),
    "normalised": lambda x, w, e: x @ (w / jnp.linalg.norm(w)),
    "spectral": lambda x, w, e: x @ (w / jnp.linalg.norm(x[0] @ w)),
    "standardised": lambda x, w, e: x @ ((w - w.mean(0)) / w.std(0)),
    "triangle": lambda x, w, e: x @ jnp.tril(w),
    "symmetric": lambda x, w, e: x @ (w + w.T),
    "squared": lambda x, w, e: x @ (w @ w),
    "gram": lambda x, w, e: x @ (w.T @ w),
    "chained": lambda x, w, e: jnp.linalg.multi_dot([x, w, w]),
    "expm": lambda x, w, e: x @ jax.scipy.linalg.expm(0.1 * w),
    "inverse": lambda x, w, e: x @ jnp.linalg.inv(w + 5 * jnp.eye(D)),
    "solve": lambda x, w, e: jnp.linalg.solve(w + 5 * jnp.eye(D), x.T).T,
    "solve-triangular": lambda x, w, e: jax.scipy.linalg.solve_triangular(w + 5 * jnp.eye(D), x.T).T,
    "determinant": lambda x, w, e: x * jnp.linalg.slogdet(w + 5 * jnp.eye(D))[1],
    "trace": lambda x, w, e: x * jnp.trace(w),
    "norm": lambda x, w, e: x * jnp.linalg.norm(w),
    "fft": lambda x, w, e: x @ jnp.fft.fft(w).real,
    "cumulative": lambda x, w, e: x @ jnp.cumsum(w, 0),
    "sorted": lambda x, w, e: x @ jnp.sort(w, 0),
    "the-largest-two": lambda x, w, e: x[:, :2] @ lax.top_k(w.T, 2)[0].T,
    "rows-by-data": lambda x, w, e: x @ w[jnp.argsort(e[:, 0])],
    "columns-by-data": lambda x, w, e: x @ w[:, jnp.argsort(e[:, 0])],
    "entries-by-data": lambda x, w, e: x * jnp.take_along_axis(w, jnp.argsort(e, 0), 0)[0],
    "slice-by-data": lambda x, w, e: x * lax.dynamic_slice(w, (jnp.argmax(e[:, 0]), 0), (1, D)),
    "written-to": lambda x, w, e: x @ w.at[0].set(e[0]),
    "added-to": lambda x, w, e: x @ w.at[jnp.argmax(e[:, 0])].add(e[0]),
    "written-into-data": lambda x, w, e: x @ lax.dynamic_update_slice(e, w[:2], (0, 0)),
    "first-rows": lambda x, w, e: x[:, :2] @ w[:2],
    "second-half": lambda x, w, e: x[:, :2] @ jnp.split(w, 2)[1],
    "unstacked": lambda x, w, e: x[:, :1] * [*w][1],
    "beside-data": lambda x, w, e: jnp.concatenate([x, x], 1) @ jnp.concatenate([w, e]),
    "padded": lambda x, w, e: jnp.pad(x, ((0, 0), (1, 1))) @ jnp.pad(w, ((1, 1), (0, 0))),
    "product-of-rows": lambda x, w, e: jnp.einsum("ni,nj,ij->nij", x, x, w),
    "kronecker": lambda x, w, e: jnp.tile(x, 2) @ jnp.kron(jnp.eye(2), w),
    "convolved": lambda x, w, e: jax.vmap(lambda a: jnp.convolve(a, w[0], mode="same"))(x),
    "ragged": lambda x, w, e: lax.ragged_dot(x, jnp.stack([w, e]), SIZES),
    "custom-vjp": lambda x, w, e: opaque(x, w),
    "custom-jvp": lambda x, w, e: x @ doubled(w),
    "remat-of-a-function": lambda x, w, e: x @ jax.checkpoint(lambda w: 2 * w)(w),
    "jit-of-a-function": lambda x, w, e: x @ jax.jit(lambda w: 2 * w)(w),
    "behind-a-barrier": lambda x, w, e: x @ (2 * lax.optimization_barrier((x, w))[1]),
    "either-of-two": lambda x, w, e: x @ lax.cond(e[0, 0] > 0, lambda: w, lambda: 2 * w),
    "in-one-branch": lambda x, w, e: lax.cond(e[0, 0] > 0, lambda x: x * w[0], lambda x: x, x),
    "carried": lambda x, w, e: x @ lax.fori_loop(0, 2, lambda i, w: jnp.tanh(w), w),
    "rows-in-turn": lambda x, w, e: lax.scan(lambda h, row: (h + row, None), x, w)[0],
    "out-of-a-loop": lambda x, w, e: x @ lax.scan(lambda c, _: (c, 2 * w), 0, None, length=1)[1][0],
    "associative": lambda x, w, e: x @ lax.associative_scan(jnp.multiply, w),
    "returned": lambda x, w, e: w,
    "a-function-returned": lambda x, w, e: (w * w).sum(0),
    "its-transposed-returned": lambda x, w, e: w.T,
    "penalty-of-data": lambda x, w, e: (w * e).sum(),
    "penalty-times-the-loss": lambda x, w, e: x.mean() * jnp.square(w).sum(),
    "logarithm-of-loss-and-penalty": lambda x, w, e: jnp.log(jnp.square(x).mean() + jnp.square(w).sum()),
}


def build(use: Use) -> tuple[Callable[..., Any], Any, tuple[Any, ...]]:
    def apply(p: Any, x: Array, e: Array) -> Any:
        return x @ p["w"], use(x, p["w"], e)

    return apply, {"w": normal(0, D, D)}, (normal(1, 5, D), normal(2, D, D))


@pytest.mark.parametrize("case", HIDDEN)
def test_a_second_use(case: str) -> None:
    apply, params, args = build(HIDDEN[case])
    coverage = KFAC(apply, wavy, params, *args).coverage()
    assert not coverage.layers
    (fallback,) = coverage.fallbacks
    assert any(word in fallback.reason for word in ("also read by", "read in different layouts", "tied weight"))


# Uses that are recorded, or have no part in the gradient, or in the curvature.
HARMLESS: dict[str, Use] = {
    "twice": lambda x, w, e: x @ w,
    "bilinear": lambda x, w, e: jnp.einsum("ni,ij,nj->n", x, w, x),
    "in-a-loop": lambda x, w, e: lax.fori_loop(0, 2, lambda i, h: jnp.tanh(h @ w), x),
    "in-remat": lambda x, w, e: jax.checkpoint(lambda x, w: jnp.tanh(x @ w))(x, w),
    "out-of-remat": lambda x, w, e: x @ jax.checkpoint(lambda w: w)(w),
    "out-of-jit": lambda x, w, e: x @ jax.jit(lambda w: w)(w),
    "behind-a-barrier": lambda x, w, e: x @ lax.optimization_barrier((x, w))[1],
    "without-gradient": lambda x, w, e: x @ lax.stop_gradient(2 * w),
    "compared": lambda x, w, e: x * (w > e).sum(),
    "counted": lambda x, w, e: x * jnp.argmax(w),
    "rounded": lambda x, w, e: x @ jnp.round(w),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_what_hides_nothing(case: str) -> None:
    """The layer stays, and the captured pairs make the whole gradient."""
    apply, params, args = build(HARMLESS[case])
    assert KFAC(apply, wavy, params, *args).coverage().fraction == 1
    if case in ("in-a-loop", "in-remat"):  # the recorder of the tests does not follow these
        return
    pairs = naive.record(apply, wavy, params, *args)["w"]
    made = sum(np.einsum("nrgo,nrgi->io", pair.gradient_rows(), pair.input_rows()) for pair in pairs)
    gradient = jax.grad(lambda p: wavy(apply(p, *args)))(params)["w"]
    np.testing.assert_allclose(made, gradient, atol=1e-12)


def penalised(p: Any, x: Array, e: Array) -> Array:
    loss = jnp.square(x @ p["w"]).mean()
    return 0.5 * (loss + 1e-2 * jnp.square(p["w"]).sum() - jnp.abs(p["w"]).max()) / 2


def test_penalties() -> None:
    """Whether the model returns them by themselves or adds them to a loss of its own."""
    _, params, args = build(HARMLESS["twice"])
    beside = lambda p, x, e: (x @ p["w"], jnp.square(p["w"]).sum(), jnp.linalg.norm(p["w"]))  # noqa: E731
    for apply in (penalised, beside):
        assert KFAC(apply, wavy, params, *args).coverage().fraction == 1


# Of everything, with old weights that are closed over, or come as an argument in a tree like the parameters.
PENALTIES: dict[str, Callable[[Any, Any], Array]] = {
    "distance": lambda p, old: jnp.square(p["w"] - old["w"]).sum(),
    "distances": lambda p, old: sum(
        ((a - b) ** 2).sum() for a, b in zip(*map(jax.tree.leaves, (p, old)), strict=True)
    ),
    "norm": lambda p, old: optax.global_norm(jax.tree.map(jnp.subtract, p, old)),
    "weighted": lambda p, old: (
        1e-3 * (jnp.square(old["w"]) * jnp.abs(p["w"] - 1)).sum() + 1e-3 * (p["v"] ** 2).sum()
    ),
}


@pytest.mark.parametrize("case", PENALTIES)
@pytest.mark.parametrize("given", [True, False])
def test_penalties_of_old_weights(case: str, *, given: bool) -> None:
    params = {"w": normal(0, D, D), "b": normal(1, D), "v": normal(2, D, D)}
    closed, x = jax.tree.map(lambda t: t + 0.1, params), normal(3, 5, D)

    def apply(p: Any, x: Array, old: Any, strength: float) -> Any:
        penalty = PENALTIES[case](p, old if given else closed)
        return (x @ p["w"] + p["b"]) @ p["v"], strength * penalty

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = KFAC(apply, wavy, params, x, closed, 0.1)
    assert optimizer.coverage().fraction == 1


def test_a_penalty_of_data_takes_no_other_layer_along() -> None:
    """The reasons name the use, in a warning, too; a penalty that is added to it stays one."""

    def apply(p: Any, x: Array, e: Array) -> Any:
        return (x @ p["w"] + p["b"]) @ p["v"], (p["w"] * e).sum() + (p["b"] * e[0]).sum() + (p["v"] ** 2).sum()

    params = {"w": normal(0, D, D), "b": normal(1, D), "v": normal(2, D, D)}
    with pytest.warns(UserWarning, match="left to NadamW: w "):
        coverage = KFAC(apply, wavy, params, normal(3, 5, D), normal(4, D, D)).coverage()
    assert [layer.weight for layer in coverage.layers] == ["v"]
    assert all(f.reason.startswith("also read by") for f in coverage.fallbacks)


def test_a_real_weight_on_complex_data_is_left_by_name() -> None:
    def apply(p: Any, x: Array) -> Array:
        return jnp.abs(jnp.fft.fft(x) @ p["w"]) + x @ p["v"]

    params, x = {"w": normal(0, D, D), "v": normal(1, D, D)}, normal(2, 5, D)
    coverage = KFAC(apply, wavy, params, x).coverage()
    assert [layer.weight for layer in coverage.layers] == ["v"]
    assert "complex numbers" in coverage.fallbacks[0].reason


def test_aux_may_hold_parameters() -> None:
    """It has no part in the loss; without `has_aux` it would be an output."""
    _, params, args = build(HARMLESS["twice"])

    def apply(p: Any, x: Array, e: Array) -> tuple[Array, Any]:
        return x @ p["w"], {"weights": p["w"], "norms": jnp.abs(p["w"]).sum(0)}

    assert KFAC(apply, wavy, params, *args, has_aux=True).coverage().fraction == 1
    assert KFAC(apply, wavy, params, *args).coverage().fraction == 0


@pytest.mark.parametrize(
    ("use", "reason"),
    [
        (lambda x, w, e: x @ (0.5 * w), "dot_general reads a function of it, not the parameter itself"),
        (lambda x, w, e: x @ (w + e), "dot_general reads a function of it, not the parameter itself"),
        (lambda x, w, e: x @ w[:, :2], "dot_general reads a function of it, not the parameter itself"),
        (lambda x, w, e: (x[:, :, None] * w).sum(1), "read by mul, which has no rule"),
        (lambda x, w, e: x @ lax.stop_gradient(w), "its gradient is stopped before it is read"),
        (lambda x, w, e: w[jnp.argsort(e[0])] + x[:4], "embedding: its inputs are one-hot"),
        (lambda x, w, e: w.T[jnp.argsort(e[0])] + x[:4], "embedding: its inputs are one-hot"),
        (lambda x, w, e: jnp.take(w, jnp.argsort(e[0]), axis=1), "embedding: its inputs are one-hot"),
        (lambda x, w, e: lax.dynamic_index_in_dim(w, jnp.argmax(e[0])) + x, "embedding: its inputs are one-hot"),
        (lambda x, w, e: x, "no operation with a rule reads it"),
    ],
)
def test_the_only_use(use: Use, reason: str) -> None:
    """A weight without any use that is recorded has the reason that is true of it."""
    params, args = build(use)[1:]
    (fallback,) = KFAC(lambda p, x, e: use(x, p["w"], e), wavy, params, *args).coverage().fallbacks
    assert reason in fallback.reason


@jax.custom_jvp
def squashed(x: Array, w: Array) -> Array:
    return jnp.tanh(x @ w)


squashed.defjvp(lambda xw, d: (squashed(*xw), (1 - squashed(*xw) ** 2) * (d[0] @ xw[1] + xw[0] @ d[1])))


def in_shards(x: Array, w: Array, e: Array) -> Array:
    mesh = jax.make_mesh((1,), ("d",))
    spec = PartitionSpec("d")
    return jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec)(x, w)


# Products without a rule: by the words that the warning has of them.
UNREADABLE: dict[str, tuple[Use, str]] = {
    "custom-vjp": (lambda x, w, e: opaque(x, w), "read by custom_vjp_call"),
    "custom-jvp": (lambda x, w, e: squashed(x, w), "read by custom_jvp_call"),
    "in-shards": (in_shards, "read by shard_map"),
    "spelt-out": (lambda x, w, e: (x[..., None] * w).sum(1), "read by mul"),
    "solved": (lambda x, w, e: jnp.linalg.solve(w + 5 * jnp.eye(D), x.T).T, "solve reads a function of it"),
    "filtered": (lambda x, w, e: jnp.fft.irfft(jnp.fft.rfft(x) * jnp.fft.rfft(w[0])), "mul reads a function"),
    "on-the-left": (
        lambda x, w, e: lax.conv_general_dilated(w[None], x[:, :, None], (1,), "VALID")[0].T, "read by conv_general"
    ),
    "rows-by-number": (lambda x, w, e: x @ w[jnp.arange(D)], "dot_general reads a function of it"),
    "of-sparse-data": (lambda x, w, e: BCOO.fromdense(x, nse=x.size) @ w, "read by bcoo_dot_general"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_product_without_a_rule_is_said_beside_other_layers(case: str) -> None:
    """However it is spelt; what is left to NadamW by design is not: tables, positions, scales, biases, rates of
    decay (Mamba), the states that loops begin with."""
    use, words = UNREADABLE[case]

    def apply(p: Any, x: Array, e: Array, ids: Array) -> Array:
        x = x + p["table"][ids] + p["places"][jnp.arange(5)] + p["added"]
        x = x + jnp.tanh(x[..., None] * jnp.exp(p["decay"])).sum(-1)
        x = x + lax.scan(lambda c, _: (jnp.tanh(c @ e), None), p["state"], None, 2)[0][:, None]
        x = (x @ p["v"]).reshape(2, 5, 2, D // 2) * p["scale"]
        return use(x.reshape(-1, D), p["w"], e)

    shapes = {"w": (D, D), "v": (D, D), "table": (7, D), "places": (5, D), "added": (5, D), "scale": (2, D // 2)}
    shapes |= {"decay": (D, 2), "state": (2, D)}
    params = {name: normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    with pytest.warns(UserWarning, match=f"left to NadamW: w .*{words}") as said:
        optimizer = KFAC(apply, wavy, params, normal(8, 2, 5, D), normal(9, D, D), jnp.arange(10).reshape(2, 5) % 7)
    assert [layer.name for layer in optimizer.coverage().layers] == ["v"]
    assert len(said) == 1
    assert not any(f"{name} (" in str(said[0].message) for name in shapes.keys() - {"w"})


def test_matrices_taken_from_a_stack_are_weights() -> None:
    """A number for each row says which of them it takes; of tables, as of codebooks, rows are embeddings."""

    def apply(p: Any, x: Array, ids: Array) -> Array:
        x = x @ p["v"] + p["tables"][0][ids] + p["tables"][ids % 2, ids]
        return jnp.einsum("nd,ndk->nk", x, p["stack"][ids])

    params = {"v": normal(0, D, D), "stack": normal(1, 3, D, D), "tables": normal(2, 2, 3, D)}
    with pytest.warns(UserWarning, match=r"left to NadamW: stack \(dot_general reads a function of it, .*?\)\."):
        KFAC(apply, wavy, params, normal(3, 5, D), jnp.arange(5) % 3)


def test_a_square_table_that_is_also_a_layer() -> None:
    """Only x @ table.T makes it the output layer; of a square one the shape does not tell."""

    def apply(p: Any, tokens: Array, *, transposed: bool) -> Array:
        x = p["w"][tokens]
        return jnp.tanh(x) @ (p["w"].T if transposed else p["w"])

    params, tokens = {"w": normal(0, D, D)}, jnp.array([[0, 1, 3], [2, 2, 1]])
    for transposed in (True, False):
        apply_fn = lambda p, t, transposed=transposed: apply(p, t, transposed=transposed)  # noqa: E731
        assert KFAC(apply_fn, wavy, params, tokens).coverage().fraction == float(transposed)


def test_positions_added_to_a_batch_of_one() -> None:
    """Data of a parameter's size make no weight of it: the layers behind have their inputs."""

    def apply(p: Any, x: Array) -> Array:
        h = x + p["positions"]
        h = h + jnp.tanh(h * p["scale"]) @ p["in"]
        return h @ p["out"]

    params = {"positions": normal(0, 1, 3, D), "scale": normal(1, D), "in": normal(2, D, D), "out": normal(3, D, 2)}
    for examples in (1, 2):
        coverage = KFAC(apply, wavy, params, normal(4, examples, 3, D)).coverage()
        assert [layer.name for layer in coverage.layers] == ["in", "out"]
