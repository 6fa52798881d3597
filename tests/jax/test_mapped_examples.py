"""Examples in another dimension within the model: factors as those of a twin written for whole batches."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, lax

from algoperf_kfac import KFACConfig
from algoperf_kfac.jax import KFAC, Positions
from algoperf_kfac.jax.discovery import discover
from algoperf_kfac.jax.layer_book import Layers
from algoperf_kfac.jax.probe import Subject, sight
from algoperf_kfac.jax.tapped_model import TappedModel
from algoperf_kfac.jax.tracing import trace
from algoperf_kfac.positions import as_candidates
from tests.jax.models import wavy
from tests.jax.support import assert_equal, factors, normal

N, P = 4, 2
rng = np.random.default_rng(0)  # for arrays that are made before tests switch to float64
PARAMS = {"cell": rng.normal(size=(P, P)), "w": rng.normal(size=(P, 3)), "v": rng.normal(size=(3, 2))}
Apply = Callable[..., Array]


def mixing(length: int) -> Array:
    """(T, T): what the examples' positions are multiplied by."""
    return jax.nn.softmax(normal(8, length, length))


def head(p: Any, x: Array) -> Array:
    return jnp.tanh(x @ p["w"]) @ p["v"]


def graph(p: Any, x: Array) -> Array:
    return head(p, mixing(len(x)) @ x)


def einsum(p: Any, x: Array) -> Array:
    return head(p, jnp.einsum("st,td->sd", mixing(len(x)), x))


def mixed_between(p: Any, x: Array) -> Array:
    """Examples are first in one layer and second in the other."""
    return mixing(len(x)) @ jnp.tanh(x @ p["w"]) @ p["v"]


def recurrent(p: Any, x: Array) -> Array:
    def cell(h: Array, x: Array) -> tuple[Array, Array]:
        h = jnp.tanh(h @ p["cell"] + x)
        return h, h

    return head(p, lax.scan(cell, jnp.zeros_like(x[0]), x)[1])


def by_position(p: Any, x: Array) -> Array:
    return head(p, lax.map(jnp.sin, x))


def batched_recurrent(p: Any, x: Array) -> Array:
    h, states = jnp.zeros_like(x[:, 0]), []
    for step in range(x.shape[1]):
        h = jnp.tanh(h @ p["cell"] + x[:, step])
        states.append(h)
    return head(p, jnp.stack(states, 1))


# By name: the model of one example (T, features), and its twin of a batch.
MODELS: dict[str, tuple[Apply, Apply]] = {
    "graph": (graph, lambda p, x: head(p, mixing(x.shape[1]) @ x)),
    "einsum": (einsum, lambda p, x: head(p, mixing(x.shape[1]) @ x)),
    "mixed between": (mixed_between, lambda p, x: mixing(x.shape[1]) @ jnp.tanh(x @ p["w"]) @ p["v"]),
    "recurrent": (recurrent, batched_recurrent),
    "by position": (by_position, lambda p, x: head(p, jnp.sin(x))),
}


def mapped(one: Apply) -> Apply:
    return lambda p, x, *_: jax.vmap(one, (None, 0))(p, x)


def params_of(name: str) -> Any:
    return {key: leaf for key, leaf in PARAMS.items() if key != "cell" or name == "recurrent"}


def examples(layers: Layers, apply: Apply, params: Any, *args: Any, positions: Any = None) -> list[tuple[int, int]]:
    """By call, how many examples it is read as on a step, and which dimension runs over them."""
    tapped = TappedModel(trace(apply, params, args), layers, as_candidates(positions))
    return [(layout.num_examples, layout.batch_dim) for layout in tapped.layouts().values()]


def compare(apply: Apply, twin: Apply, params: Any, *args: Any, loss: Any = wavy, **options: Any) -> None:
    got, want = (factors(f, lambda f, *_: loss(f), params, *args, **options) for f in (apply, twin))
    assert got.keys() == want.keys()
    for name in want:
        assert_equal(got[name], want[name])


# Any two of the three together.
TOKENS = [(name, *((3, "expand"), (N, "reduce"), (3, "reduce"))[i % 3]) for i, name in enumerate(MODELS)]


@pytest.mark.parametrize(("name", "length", "approximation"), [*TOKENS, ("graph", N, "reduce")])
def test_tokens(name: str, length: int, approximation: str) -> None:
    """As many positions as examples, too; B is scaled by the number of examples."""
    one, twin = MODELS[name]
    x = normal(3, N, length, P)
    compare(mapped(one), twin, params_of(name), x, approximation=approximation, loss_normalizer=None)


@pytest.mark.parametrize("name", ["graph", "recurrent"])
def test_pooled(name: str) -> None:
    """Nothing is said, either."""
    one, twin = (lambda p, x, f=f: f(p, x).mean(1) for f in (mapped(MODELS[name][0]), MODELS[name][1]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare(one, twin, params_of(name), normal(3, N, 3, P), approximation="reduce", loss_normalizer=None)


@pytest.mark.parametrize(("length", "by_name"), [(3, False), (N, True)])
def test_masks(length: int, by_name: bool) -> None:
    """A mask has the examples first, as the arguments have them."""
    one, twin = MODELS["graph"]
    mask = (jnp.arange(length) <= jnp.arange(N)[:, None]) * 1.0
    compare(
        mapped(one),
        twin,
        params_of("graph"),
        normal(3, N, length, P),
        loss=lambda f: wavy(f * mask[..., None]),
        positions={"w": mask, "v": [Positions(mask)]} if by_name else mask,
        approximation="reduce",
    )


def test_what_is_said_is_above_what_was_seen() -> None:
    """`batch_dim`, 0 included, and masks that fit the layers' own order alone."""
    apply, params, x = mapped(graph), params_of("graph"), normal(3, N, 3, P)
    layers = discover(apply, params, x, config=KFACConfig())
    ones = jnp.ones((3, N))
    for given in (None, Positions("gradient"), Positions(batch_dim=1), Positions(ones, batch_dim=1), ones.T):
        assert examples(layers, apply, params, x, positions=given) == [(N, 1)] * 2
    for given in (Positions(batch_dim=0), ones, [Positions(ones)]):
        assert examples(layers, apply, params, x, positions=given) == [(3, 0)] * 2
    assert examples(layers, apply, params, x, positions={"v": ones}) == [(N, 1), (3, 0)]
    ids = Positions(segment_ids=jnp.broadcast_to(jnp.arange(N), (3, N)), num_segments=N)
    assert examples(layers, apply, params, x, positions=ids) == [(N, 0)] * 2
    with pytest.raises(ValueError, match="fits no layer"):
        examples(layers, apply, params, x, positions=jnp.ones((3, N + 1)))


@pytest.mark.parametrize(("way", "approximation"), [("keys", "expand"), ("drawn", "reduce"), ("mapped", "reduce")])
def test_samples_in_front(way: str, approximation: str) -> None:
    """K samples of each example, (K, N, features), drawn within the model, are its positions."""

    def noise(key: Array, x: Array) -> Array:
        return x + jax.random.normal(key, x.shape)

    def stacked(keys: Array, x: Array) -> Array:
        return jax.vmap(noise, (0, None))(keys, x)

    key = jax.random.key(0)
    applies: dict[str, Apply] = {
        "keys": lambda p, x, keys: head(p, stacked(keys, x)),
        "drawn": lambda p, x, keys: head(p, stacked(jax.random.split(key, 5), x)),
        "mapped": lambda p, x, keys: jax.vmap(lambda k: head(p, noise(k, x)))(jax.random.split(key, 5)),
    }
    compare(
        applies[way],
        lambda p, x, keys: head(p, stacked(keys, x).swapaxes(0, 1)),
        params_of(""),
        normal(3, N, P),
        jax.random.split(key, 5),
        loss=lambda f: jnp.square(f).sum(),  # whatever the order of the outputs
        approximation=approximation,
        loss_normalizer=None,
    )


def test_other_sizes_at_a_step() -> None:
    """What was seen of a single example holds for others, as many as positions or more."""
    apply, params = mapped(graph), params_of("graph")
    layers = discover(apply, params, normal(3, 1, 3, P), config=KFACConfig())
    for length in (1, 3, 5):
        assert examples(layers, apply, params, normal(3, 5, length, P)) == [(5, 1)] * 2


def test_only_the_same_calls_are_read_alike() -> None:
    """A step that calls a layer more often, or on rows of other dimensions, reads it as if nothing was seen."""

    def apply(p: Any, x: Array, way: str) -> Array:
        def one(x: Array) -> Array:
            x = mixing(len(x)) @ x
            x = x[:, None] if way == "other rows" else x
            return sum(jnp.tanh(k * x) @ p["w"] for k in range(1, 3 if way == "often" else 2))

        return jax.vmap(one)(x)

    params, x = {"w": PARAMS["w"]}, normal(3, N, 3, P)
    layers = discover(apply, params, x, "once", config=KFACConfig())
    assert examples(layers, apply, params, x, "once") == [(N, 1)]
    assert examples(layers, apply, params, x, "often") == [(3, 0)] * 2
    assert examples(layers, apply, params, x, "other rows") == [(N, 0)]


def test_a_tied_table() -> None:
    """Its lookups and its output use, each in its own order."""

    def one(p: Any, tokens: Array) -> Array:
        return mixing(len(tokens)) @ p["table"][tokens] @ p["table"].T

    def twin(p: Any, tokens: Array) -> Array:
        return mixing(tokens.shape[1]) @ p["table"][tokens] @ p["table"].T

    params, tokens = {"table": normal(1, 5, P)}, jnp.arange(N * 3).reshape(N, 3) % 5
    for approximation in ("expand", "reduce"):
        got, want = (
            factors(f, lambda f, _: wavy(f), params, tokens, approximation=approximation)["table"]
            for f in (mapped(one), twin)
        )
        np.testing.assert_allclose(got.A, want.A, rtol=1e-10)


def test_a_plan_counts_examples() -> None:
    one, twin = MODELS["graph"]
    args = (normal(3, N, 3, P),)
    loads = [sight(Subject(f, params_of("graph"), args), KFACConfig()).loads for f in (mapped(one), twin)]
    assert loads[0] == loads[1]
    assert loads[0]["w"].examples == N


def length_first(p: Any, x: Array) -> Array:
    """(T, N, P) of which the model makes (N, T, P), and returns that."""
    return head(p, x.swapaxes(0, 1))


def of_one_size(p: Any, x: Array) -> Array:
    return head(p, (mixing(3) @ x).reshape(N, 3, P).swapaxes(0, 1))


def pairs(p: Any, x: Array) -> Array:
    return head(p, x[:, None] - x[None]).sum(1)


def nodes(p: Any, x: Array, of_node: Array) -> Array:
    return jax.ops.segment_sum(head(p, jnp.stack([x, x * x])).sum(0), of_node, 2)


def summed(p: Any, x: Array, y: Array) -> Array:
    return (head(p, x.swapaxes(0, 1)) * y).sum()


X, SEQUENCES = rng.normal(size=(N, P)), rng.normal(size=(N, 3, P))
# By name: a model, its arguments, and the dimension over examples in w.
READ: dict[str, tuple[Apply, tuple[Any, ...], int]] = {
    "batched": (lambda p, x: head(p, mixing(3) @ x), (SEQUENCES,), 0),
    "length first in the arguments": (length_first, (SEQUENCES,), 0),
    "sizes written into the model": (of_one_size, (SEQUENCES,), 0),
    "pairs of examples": (pairs, (X,), 0),
    "nodes, and fewer graphs": (nodes, (X, np.array([0, 0, 1, 1])), 0),
    "closes over its batch": (lambda p: head(p, SEQUENCES.swapaxes(0, 1)), (), 0),
    "a key alone": (lambda p, key: head(p, jax.random.normal(key, (3, N, P))), (jax.random.key(0),), 0),
    "raw keys": (lambda p, key: head(p, jax.random.normal(key, (2, N, P))), (jax.random.PRNGKey(0),), 0),
    "a scalar output": (lambda p, x: head(p, x.swapaxes(0, 1)).sum(), (SEQUENCES,), 1),
    "a scalar output of several sizes": (summed, (SEQUENCES, np.ones(2)), 0),
    "a constant matrix as argument": (lambda p, a, x: head(p, a @ x), (np.full((3, 3), 1 / 3), SEQUENCES), 0),
    "one that is mapped over": (
        lambda p, a, x: jax.vmap(lambda x: head(p, a @ x))(x),
        (np.full((3, 3), 1 / 3), SEQUENCES),
        1,
    ),
    "parameters among the arguments": (
        lambda p, old, n, x: jax.vmap(lambda x: graph(p, x) + n * graph(old, x))(x),
        ({"w": PARAMS["w"], "v": PARAMS["v"]}, np.float64(2), SEQUENCES),
        1,
    ),
    "a batch of names and flags": (
        lambda p, batch: jax.vmap(lambda x: graph(p, x))(batch["x"]) * batch["train"],
        ({"x": SEQUENCES, "y": np.arange(N), "train": True, "name": "a", "key": jax.random.key(0)},),
        1,
    ),
    "heads in front": (lambda p, x: head(p, jnp.stack([x, x * x])).sum(0), (X,), 1),
}


@pytest.mark.parametrize("case", READ)
def test_which_dimension_is_seen(case: str) -> None:
    apply, args, dim = READ[case]
    layers = discover(apply, params_of(""), *args, config=KFACConfig())
    assert [seen for _, seen in layers.covered["w"].examples] == [dim]


def test_only_models_in_doubt_are_traced_once_more() -> None:
    """Not those whose rows and outputs begin with a size that no other dimension has."""
    one, twin = MODELS["graph"]
    for apply, shape, traces in (
        (twin, (N, 3, P), 1),
        (twin, (N, N, P), 2),
        (head, (N, P), 1),
        (mapped(one), (N, 3, P), 2),
    ):
        count = 0

        def counted(p: Any, x: Array, apply: Apply = apply) -> Array:
            nonlocal count
            count += 1
            return apply(p, x)

        optimizer = KFAC(counted, lambda f, x: wavy(f), PARAMS, normal(0, *shape), exclude=["cell"])
        assert count == traces
        jax.eval_shape(optimizer.value_grad_and_statistics, PARAMS, normal(0, *shape))
        assert count == traces + 1


def test_with_aux_under_jit_and_shapes() -> None:
    one, _ = MODELS["graph"]
    params, shape = params_of("graph"), jax.ShapeDtypeStruct((N, N, P), jnp.float64)

    def apply(p: Any, x: Array) -> tuple[Array, Any]:
        return mapped(one)(p, x), {"mean": x.mean()}

    optimizer = KFAC(apply, lambda f, x: wavy(f), params, shape, has_aux=True, approximation="reduce")
    x = normal(3, N, N, P)
    step = jax.jit(lambda x: optimizer.value_grad_and_statistics(params, x)[2])
    got, want = step(x), KFAC(MODELS["graph"][1], lambda f, x: wavy(f), params, x, approximation="reduce")
    for name, one_layer in want.value_grad_and_statistics(params, x)[2].items():
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), got[name], one_layer)
        assert math.isclose(float(got[name].examples), N)
