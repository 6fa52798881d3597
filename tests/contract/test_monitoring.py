"""What the optimizers say of themselves: G^T A beside the gradient, worthless directions, classes elsewhere."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import algoperf_kfac.jax
import algoperf_kfac.pytorch
from algoperf_kfac import judging
from algoperf_kfac.jax import tapped_model
from algoperf_kfac.jax.transform import find_state
from tests.contract.frameworks import EVERY_STEP, NAMES, InJAX, InPyTorch, Run, start
from tests.contract.models import normal, perceptron

MLP = perceptron((3, 4, 4, 2), normal(6, 5, 3))


def checked(run: Run) -> dict[str, float]:
    """The relative errors of a run in which a step was made."""
    if isinstance(run, InJAX):
        run.optimizer.check(run.params, *run._inputs, jnp.ones(()), jnp.ones(()))
    return {name: error for name, error in run.metrics().items() if name.endswith("gradient_error")}


@pytest.mark.parametrize("framework", NAMES)
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_gradient_errors(framework: str, approximation: str) -> None:
    run = start(framework, MLP, approximation=approximation, **EVERY_STEP)
    run.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        errors = checked(run)
    assert errors.keys() == {f"l{i}/gradient_error" for i in range(3)}
    assert max(errors.values()) < 1e-12


def test_a_layer_that_falls_short_in_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named where steps are not compiled, at the first; and whenever it is asked."""
    run = start("jax", MLP, **EVERY_STEP)
    assert isinstance(run, InJAX)
    operation = tapped_model._Tapper.operation

    def half(self: Any, key: Any, call: Any, x: Any, out: Any) -> Any:
        return operation(self, key, call, x / 2 if call.view.source.name == "l1/kernel" else x, out)

    monkeypatch.setattr(tapped_model._Tapper, "operation", half)
    args = (run.params, *run._inputs, jnp.ones(()), jnp.ones(()))
    message = r"K-FAC: layer l1: its captured .* miss 50 % of its gradient: .*exclude=\['l1'\]; optimizer\.check"
    with pytest.warns(UserWarning, match=message) as said:
        run.optimizer.value_grad_and_statistics(*args)
    assert len(said) == 1
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.optimizer.value_grad_and_statistics(*args)
    with pytest.warns(UserWarning, match=message):
        errors = run.optimizer.check(*args)
    assert errors["l0"] < 1e-12
    assert errors["l1"] == pytest.approx(0.5)


def test_a_penalty_is_no_fault_in_jax() -> None:
    """The gradient of a weight that the model penalises is more than the layer's own: nothing can be said of it."""

    def apply(p: Any, x: Any) -> Any:
        return x @ p["w"] @ p["v"], jnp.square(p["w"]).sum()

    params = {"w": jnp.asarray(normal(3, 4)), "v": jnp.asarray(normal(4, 2))}
    x = jnp.asarray(normal(6, 3))
    optimizer = algoperf_kfac.jax.KFAC(apply, lambda f, x: jnp.square(f[0]).mean() + f[1], params, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert optimizer.check(params, x).keys() == {"v"}


def summary(run: Run, worst: int) -> str:
    if isinstance(run, InJAX):
        return run.optimizer.summary(run.state, worst)
    assert isinstance(run, InPyTorch)
    return run.optimizer.summary(worst)


@pytest.mark.parametrize("framework", NAMES)
def test_the_table_of_doubtful_layers(framework: str) -> None:
    run = start(framework, MLP, **EVERY_STEP)
    assert [line.split() for line in summary(run, 1).splitlines()][1:] == [
        ["l0", "-", "-", "-", "-", "0", "0", "-"],
        ["...", "and", "2", "more", "layers"],
    ]
    run.step()
    metrics = run.metrics()
    head, *rows = summary(run, 8).splitlines()
    assert all(column in head for column in judging.HEAD)
    cells = [row.replace(" %", "%").split() for row in rows]
    ratios = {f"l{i}": metrics[f"l{i}/graft_ratio"] for i in range(3)}
    assert [name for name, *_ in cells] == sorted(ratios, key=lambda name: ratios[name])
    for name, ratio, cosine, *shares, refreshes, idle, noise in cells:
        assert float(ratio) == pytest.approx(ratios[name], rel=0.05)
        assert float(cosine) == pytest.approx(metrics[f"{name}/cosine"], abs=0.005)
        assert all(0 < float(share.removesuffix("%")) <= 100 for share in shares)
        assert (refreshes, idle, noise) == ("1", "0", "0")


def test_the_share_of_eigenvalues_at_damping() -> None:
    """Half of the inputs are zero throughout: so are as many eigenvalues of A. Both frameworks count them alike."""
    x = normal(64, 8)
    x[:, 4:] = 0
    for framework in NAMES:
        run = start(framework, perceptron((8, 3), x, bias=False), damping=1e-6, **EVERY_STEP)
        run.step()
        assert summary(run, 1).splitlines()[1].split()[3:5] == ["50", "%"]


def test_directions_that_are_noise() -> None:
    text = judging.noise({"a": 1e-3, "b": 2e-3, "c": 0.5})
    assert text is not None
    assert text.startswith("in 2 of 3 layers K-FAC's direction is over 100 times")
    assert "a (1e-03), b (2e-03). Take" in text
    assert 'approximation="expand"' in text
    assert judging.noise({"a": 1e-3, "b": 0.5}) is None
    assert judging.noise({"a": 0.0, "b": 0.0}) is None  # without gradient
    assert judging.noise({}) is None


def test_directions_that_are_noise_are_said_once_in_jax() -> None:
    """Where the state is looked at, as a program cannot wait for the device; and not too early."""
    run = start("jax", MLP, **EVERY_STEP)
    assert isinstance(run, InJAX)
    run.step()
    inner = find_state(run.state)
    small = {key: dataclasses.replace(s, graft_ratio=s.graft_ratio * 0 + 1e-4) for key, s in inner.stacks.items()}

    def at(step: int) -> Any:
        noisy = inner._replace(stacks=inner.stacks | small, steps=jnp.int32(step))
        return tuple(noisy if part is inner else part for part in run.state)

    def looked_at() -> None:
        run.optimizer.metrics(at(19))
        run.optimizer.summary(at(20))
        run.optimizer.metrics(at(20))

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        looked_at()
    noise = [w for w in said if "all but singular" in str(w.message)]
    assert len(noise) == 1
    assert noise[0].filename == __file__


@pytest.mark.parametrize("framework", NAMES)
@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_classes_that_are_not_the_last_dimension(framework: str, fisher: str) -> None:
    """Logits (N, C, positions) have the Fisher of (N, positions, C), with the same draws."""
    x, weight = normal(4, 5, 3), normal(3, 2)
    of_layer = [factor(framework, fisher, x, weight, class_dim) for class_dim in (1, -1)]
    np.testing.assert_allclose(of_layer[0], of_layer[1], rtol=1e-10)
    assert np.abs(of_layer[0]).max() > 0


def factor(framework: str, fisher: str, x: np.ndarray, weight: np.ndarray, class_dim: int) -> np.ndarray:
    """B of a linear layer whose outputs have their classes in a dimension."""
    if framework == "jax":
        params = {"w": jnp.asarray(weight)}

        def apply(p: Any, x: Any) -> Any:
            return jnp.moveaxis(x @ p["w"], -1, class_dim)

        optimizer = algoperf_kfac.jax.KFAC(
            apply,
            lambda f, x: jnp.square(f).mean(),
            params,
            jnp.asarray(x),
            fisher=fisher,
            loss_type="softmax_cross_entropy",
            class_dim=class_dim,
        )
        compute = jax.jit(optimizer.value_grad_and_statistics)
        return np.asarray(compute(params, jnp.asarray(x), rng=jax.random.key(0))[2]["w"].b[0])
    model = nn.Linear(3, 2, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.as_tensor(weight.T))
    kfac = algoperf_kfac.pytorch.KFAC(model, fisher=fisher, seed=3)
    with kfac.capture() as watching:
        outputs = model(torch.as_tensor(x)).movedim(-1, class_dim)
        watching.backward_fisher(outputs, "softmax_cross_entropy", class_dim=class_dim)
        outputs.square().mean().backward()
    kfac.step()
    return np.asarray(next(iter(kfac.factors().values())).B)
