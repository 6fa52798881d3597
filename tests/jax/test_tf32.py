"""Products within a refresh ask for full precision, whatever XLA's default is on the device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from algoperf_kfac.jax import KFAC, refresh
from algoperf_kfac.jax.scalings import power

HIGHEST = (lax.Precision.HIGHEST, lax.Precision.HIGHEST)


def precisions(function, *args):
    """Of every product that is not in a branch."""
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    return [eqn.params["precision"] for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]


@pytest.mark.parametrize("drift_tolerance", [0.0, 0.5])
def test_decompositions_eigenvalues_and_operators_are_exact(monkeypatch, drift_tolerance):
    """The products of every step, and of the model, are the user's."""
    seen: dict[str, set[str | None]] = {"eigh": set(), "rotated": set(), "operators": set(), "step": set()}

    def noting(key, function):
        def noted(*args, **kwargs):
            seen[key].add(jax.config.jax_default_matmul_precision)
            return function(*args, **kwargs)

        return noted

    monkeypatch.setattr(jnp.linalg, "eigh", noting("eigh", jnp.linalg.eigh))
    monkeypatch.setattr(refresh, "_rotated_diagonal", noting("rotated", refresh._rotated_diagonal))

    class Observed(power.Scaling):
        def operators(self, state):
            return noting("operators", super().operators)(state)

        def precondition(self, *args):
            return noting("step", super().precondition)(*args)

    def apply(params, x):
        return x @ params["w"]

    params, x = {"w": jnp.ones((3, 4))}, jnp.ones((5, 3))
    kfac = KFAC(
        apply,
        lambda out, *_: jnp.square(out).mean(),
        params,
        x,
        scaling=Observed,
        drift_tolerance=drift_tolerance,
    )

    def step(state, params):
        _, gradient, statistics = kfac.value_grad_and_statistics(params, x)
        return kfac.update(gradient, state, params, statistics=statistics)

    with jax.default_matmul_precision("tensorfloat32"):
        jax.make_jaxpr(step)(kfac.init(params), params)
        assert jax.config.jax_default_matmul_precision == "tensorfloat32"
    expected = {"eigh": {"highest"}, "operators": {"highest"}, "step": {"tensorfloat32"}}
    assert seen == expected | {"rotated": {"highest"} if drift_tolerance else set()}


def test_the_setting_reaches_the_products():
    def product(x):
        with jax.default_matmul_precision("highest"):
            return x @ x

    assert precisions(product, jnp.ones((2, 2))) == [HIGHEST]
