"""The check of captured pairs in JAX finds them right where they are, and wrong where they are not.

Needs no AlgoPerf.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
from jax import lax  # noqa: E402
from jax import numpy as jnp  # noqa: E402

from algoperf_kfac.jax import KFAC, capture, tapped_model  # noqa: E402
from benchmarks.official import gradient_check_jax  # noqa: E402

NAMES = {"conv", "stack", "transposed", "table"}
TOKENS = np.random.default_rng(1).integers(0, 11, (3, 5))
TARGETS = np.random.default_rng(2).integers(0, 11, (3, 5))


def model(params: Any, tokens: Any, targets: Any) -> Any:
    """A tied table, a grouped convolution, layers stacked by a loop, and a weight that is read transposed."""
    x = params["table"][tokens]
    numbers = ("NWC", "WIO", "NWC")
    x = lax.conv_general_dilated(
        x, params["conv"]["w"], (1,), "SAME", dimension_numbers=numbers, feature_group_count=2
    )
    x = x + params["conv"]["b"]
    x, _ = lax.scan(lambda x, layer: (jnp.tanh(x @ layer["w"] + layer["b"]), None), x, params["stack"])
    return x @ params["transposed"].T @ params["table"].T


def loss(logits: Any, tokens: Any, targets: Any) -> Any:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1).mean()


def make_params() -> Any:
    shapes = {
        "table": (11, 4),
        "conv": {"w": (3, 2, 4), "b": (4,)},
        "stack": {"w": (2, 4, 4), "b": (2, 4)},
        "transposed": (4, 4),
    }
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32),
        shapes,
        is_leaf=lambda s: isinstance(s, tuple),
    )


def check(approximation: str) -> tuple[dict[str, float], dict[str, float]]:
    params = make_params()
    arguments = (jnp.asarray(TOKENS), jnp.asarray(TARGETS))
    kfac = KFAC(model, loss, params, *arguments, approximation=approximation)
    assert set(kfac.layers.covered) == NAMES, kfac.coverage()
    assert kfac.layers.covered["stack"].slices == 2
    assert kfac.layers.covered["conv"].spec.groups == 2
    assert kfac.layers.covered["table"].spec.kind == "embedding"
    with gradient_check_jax.listening() as products:
        _, gradient, _ = kfac.value_grad_and_statistics(params, *arguments)
    return gradient_check_jax.compare(kfac.layers, gradient, products)


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_pairs_of_every_kind_of_layer_give_its_gradient(approximation):
    errors, bounds = check(approximation)
    assert set(errors) == NAMES
    assert all(error <= 1e-5 for error in errors.values()), errors
    assert all(0 < bound < 1e-5 for bound in bounds.values()), bounds


def test_a_use_of_a_weight_that_is_missed_shows(monkeypatch):
    monkeypatch.setattr(tapped_model._Tapper, "lookup", lambda self, key, lookup, rows, out: out)
    errors, _ = check("expand")
    assert errors.pop("table") > 1e-2
    assert all(error <= 1e-5 for error in errors.values()), errors


def test_inputs_of_another_layer_show(monkeypatch):
    operation = tapped_model._Tapper.operation

    def swapped(self: Any, key: Any, call: Any, x: Any, out: Any) -> Any:
        return operation(self, key, call, x[::-1] if call.view.source.name == "transposed" else x, out)

    monkeypatch.setattr(tapped_model._Tapper, "operation", swapped)
    errors, _ = check("reduce")
    assert errors.pop("transposed") > 1e-2
    assert all(error <= 1e-5 for error in errors.values()), errors


def test_nothing_stays_behind():
    before = capture.kind_of
    with gradient_check_jax.listening():
        assert capture.kind_of is not before
    assert capture.kind_of is before
