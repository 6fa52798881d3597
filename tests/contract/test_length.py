"""The length of directions, `KFACConfig.length`: what it is, what stands in, and what is kept for it."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import algoperf_kfac.jax
from algoperf_kfac.jax.transform import find_state
from algoperf_kfac.layers import LayerSpec
from tests.contract.frameworks import EVERY_STEP, NAMES, Run, start
from tests.contract.models import convolutional, images, normal, perceptron

LENGTH = 0.3
RMS = {"length": "rms", "length_factor": LENGTH}
MODELS = {"perceptron": lambda: perceptron((5, 7, 3), normal(20, 5)), "convolutional": convolutional}
WHOLE = {"learning_rate": 1.0, "factor_interval": 1, "refresh_interval": 1}  # a step is the direction itself


def by_name(run: Any, framework: str) -> dict[str, np.ndarray]:
    """The parameters."""
    if framework == "pytorch":
        return {name: p.detach().numpy().copy() for name, p in run.module.named_parameters()}
    leaves = jax.tree_util.tree_flatten_with_path(run.params)[0]
    return {"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}


def moved(run: Run, framework: str, **how: Any) -> dict[str, np.ndarray]:
    """What a step takes off each parameter."""
    before = by_name(run, framework)
    run.step(**how)
    return {name: before[name] - after for name, after in by_name(run, framework).items()}


def entries(spec: LayerSpec, steps: dict[str, np.ndarray]) -> np.ndarray:
    """Those of a layer's weight and bias."""
    return np.concatenate([steps[name].ravel() for name in (spec.weight, spec.bias) if name is not None])


def root_mean_square(values: np.ndarray) -> float:
    return float(np.sqrt(np.square(values).mean()))


@pytest.mark.parametrize("framework", NAMES)
@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("perceptron", {}),
        ("perceptron", {"scaling": "polar"}),
        ("perceptron", {"preconditioner": "inverse"}),
        ("convolutional", {"scaling": "polar"}),
    ],
    ids=str,
)
def test_entries_have_the_root_mean_square(framework: str, model: str, options: dict[str, Any]) -> None:
    """Of weight and bias together, at every step, along the direction that there is without a rule."""
    run, free = (
        start(framework, MODELS[model](), **WHOLE, **options, **rule) for rule in (RMS, {"length": "none"})
    )
    for step in range(3):
        steps, directions = moved(run, framework), moved(free, framework)
        for spec in run.coverage().layers:
            ours, theirs = entries(spec, steps), entries(spec, directions)
            assert root_mean_square(ours) == pytest.approx(LENGTH, rel=1e-9)
            if not step:  # later on they are elsewhere
                np.testing.assert_allclose(ours, LENGTH / root_mean_square(theirs) * theirs, atol=1e-12)
    assert run.coverage().layers
    assert run.metrics()["stand_ins"] == 0


@pytest.mark.parametrize("framework", NAMES)
def test_without_a_gradient_nothing_moves(framework: str) -> None:
    run = start(framework, MODELS["perceptron"](), **WHOLE, **RMS, scaling="polar")
    for _ in range(2):
        assert not any(step.any() for step in moved(run, framework, weights=0.0).values())
    assert run.metrics()["stand_ins"] == 0
    steps = moved(run, framework)
    for spec in run.coverage().layers:
        assert root_mean_square(entries(spec, steps)) == pytest.approx(LENGTH)


def broken(framework: str, value: float) -> type:
    """A scaling whose directions vanish or overflow."""
    base = importlib.import_module(f"algoperf_kfac.{framework}.scalings").Scaling

    class Broken(base):  # type: ignore[misc]  # a class of either framework
        keeps_operators = False

        def operators(self, state: Any) -> Any:
            return [], []

        def precondition(self, state: Any, momentum: Any, *rest: Any) -> Any:
            direction = momentum * 0 + value
            return direction if framework == "pytorch" else (direction, state.kept)

    return Broken


@pytest.mark.parametrize("framework", NAMES)
@pytest.mark.parametrize("value", [0.0, np.inf, np.nan], ids=str)
def test_the_momentum_stands_in_at_that_length(framework: str, value: float) -> None:
    """As a matrix of weight and bias, like the direction in whose place it stands."""
    options = WHOLE | {"one_minus_beta1": 1.0}  # the momentum is the gradient
    run = start(framework, MODELS["perceptron"](), **options, **RMS, scaling=broken(framework, value))
    steps = moved(run, framework)
    assert run.metrics()["stand_ins"] == 2
    gradients = {}
    if framework == "pytorch":  # the gradient is at hand there; the next test compares both
        gradients = {name: p.grad.numpy() for name, p in run.module.named_parameters()}  # type: ignore[attr-defined]
    for layer in ("l0", "l1"):
        of_layer = [name for name in steps if name.startswith(layer)]
        assert len(of_layer) == 2
        assert root_mean_square(np.concatenate([steps[name].ravel() for name in of_layer])) == pytest.approx(LENGTH)
        if gradients:
            whole = root_mean_square(np.concatenate([gradients[name].ravel() for name in of_layer]))
            for name in of_layer:
                np.testing.assert_allclose(steps[name], LENGTH / whole * gradients[name], atol=1e-12)


def test_the_two_frameworks_stand_in_alike() -> None:
    """From the same weights: the steps are those of the gradient."""
    model = MODELS["perceptron"]()
    torch_run, jax_run = (start(name, model, **WHOLE, **RMS, scaling=broken(name, np.inf)) for name in NAMES)
    with torch.no_grad():
        for i in range(2):
            layer, values = getattr(torch_run.module, f"l{i}"), jax_run.params[f"l{i}"]
            layer.weight.copy_(torch.tensor(np.array(values["kernel"]).T))
            layer.bias.copy_(torch.tensor(np.array(values["bias"])))
    for _ in range(3):
        ours, theirs = moved(torch_run, "pytorch"), moved(jax_run, "jax")
        for i in range(2):
            np.testing.assert_allclose(ours[f"l{i}.weight"].T, theirs[f"l{i}/kernel"], atol=1e-10)
            np.testing.assert_allclose(ours[f"l{i}.bias"], theirs[f"l{i}/bias"], atol=1e-10)


@pytest.mark.parametrize("framework", NAMES)
def test_other_parameters_take_the_nadamw_update(framework: str) -> None:
    """Whatever the rule: of a layer that is left out."""
    options = {**WHOLE, "learning_rate": 1e-3, "exclude": ["l0"]}
    runs = [start(framework, MODELS["perceptron"](), **options, length=length) for length in ("graft", "rms")]
    steps = [moved(run, framework) for run in runs]
    for name in steps[0]:
        alike = np.array_equal(steps[0][name], steps[1][name])
        assert alike == name.startswith("l0")


def test_states_of_another_length_in_pytorch() -> None:
    """Second moments go where they are not needed, and begin with the momentum where they were not kept."""
    model = MODELS["perceptron"]()
    grafted, own = (start("pytorch", model, **EVERY_STEP, length=length) for length in ("graft", "rms"))
    for run in (grafted, own):
        for _ in range(3):
            run.step()
    moments = own.optimizer.state_dict()["state"].values()
    assert all("exp_avg" in m and "exp_avg_sq" not in m for m in moments)
    assert all("exp_avg_sq" in m for m in grafted.optimizer.state_dict()["state"].values())

    other = start("pytorch", model, **EVERY_STEP, length="rms")
    other.optimizer.load_state_dict(grafted.optimizer.state_dict())
    assert all("exp_avg_sq" not in m for m in other.optimizer.state_dict()["state"].values())
    other.step()

    other = start("pytorch", model, **EVERY_STEP, length="graft")
    other.module.load_state_dict(own.module.state_dict())
    other.optimizer.load_state_dict(copy.deepcopy(own.optimizer.state_dict()))
    lr = EVERY_STEP["learning_rate"]
    steps = moved(other, "pytorch")
    for spec in other.coverage().layers:
        # About Adam's length; from zero moments, corrected for three steps, it would be up to 5.7 times as long.
        assert 0.2 * lr < root_mean_square(entries(spec, steps)) < 1.2 * lr


@pytest.mark.parametrize("lengths", [("graft", "rms"), ("rms", "graft")], ids="-to-".join)
def test_states_of_another_length_are_refused_in_jax(lengths: tuple[str, str]) -> None:
    model = MODELS["perceptron"]()
    before, after = (start("jax", model, **EVERY_STEP, length=length) for length in lengths)
    after.state = before.state
    with pytest.raises(ValueError, match=r"state is of another length.*second moment of l0/bias"):
        after.step()


def test_what_jax_keeps() -> None:
    """A zero for every covered parameter, in its place, before and after steps."""
    run = start("jax", images(), **EVERY_STEP, length="rms")
    covered = {name for spec in run.coverage().layers for name in (spec.weight, spec.bias)}
    for _ in range(2):
        inner = find_state(run.state)
        assert jax.tree.structure(inner.nu) == jax.tree.structure(inner.mu)
        for path, moment in jax.tree_util.tree_flatten_with_path(inner.nu)[0]:
            name = "/".join(key.key for key in path)
            assert (moment.shape == ()) == (name in covered)
        run.step()


def test_the_polar_of_a_stack_of_layers() -> None:
    """Layers of one shape share a state in JAX; each has its own polar factor there, too."""

    def apply(params: Any, x: Any) -> Any:
        for layer in params.values():
            x = jnp.tanh(x @ layer["kernel"])
        return x

    params = {f"l{i}": {"kernel": jnp.asarray(normal(4, 4, seed=i))} for i in range(3)}
    x = jnp.asarray(normal(30, 4))
    config = algoperf_kfac.jax.KFACConfig(scaling="polar", polar_exponent=0.0, length="none", **EVERY_STEP)
    kfac = algoperf_kfac.jax.KFAC(apply, lambda f, x: (f**2).sum(1).mean(), params, x, config=config)
    _, gradient, statistics = jax.jit(kfac.value_grad_and_statistics)(params, x)
    updates, _ = jax.jit(kfac.update)(gradient, kfac.init(params), params, statistics=statistics)
    for layer in updates.values():
        values = np.linalg.svd(np.asarray(layer["kernel"]), compute_uv=False) / config.learning_rate
        assert values.max() < 1.21
        assert values.min() > 0.0
