"""The evidence in JAX against a dense determinant under automatic differentiation, and beside PyTorch's."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from algoperf_kfac.evidence import Evidence, evidence, per_layer
from algoperf_kfac.jax import KFAC, kfac
from algoperf_kfac.jax.decay import DecayState, decay_by_parameter, prior_gradient, set_weight_decay
from algoperf_kfac.jax.evidence import factors_of, fit_factors
from algoperf_kfac.online import OnlineEvidence
from algoperf_kfac.pytorch import evidence as in_pytorch
from tests.jax import test_parity
from tests.jax.support import LOSSES, applier, initialise, normal, observe

APPROXIMATIONS = ("expand", "reduce")


class Mixed(nn.Module):
    """Grouped convolution, a norm, a linear layer over positions, average pooling, a head."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Conv(4, (3, 3), feature_group_count=2, name="conv")(x)
        x = nn.GroupNorm(2, name="norm")(x)
        x = jnp.tanh(nn.Dense(5, name="mix")(jnp.tanh(x).reshape(x.shape[0], -1, 4)))
        return nn.Dense(3, name="head")(x.mean(1))


def mixed(count: int = 6) -> tuple[Any, Any, Any, Any]:
    """A function of parameters, these, inputs and labels."""
    x = normal(1, count, 4, 4, 2)
    return applier(Mixed()), initialise(Mixed(), x), x, np.arange(count) % 3


def single(x: Any, y: Any) -> list[tuple[Any, Any]]:
    """Batches of one example, where the diagonal is exact."""
    return [(x[i : i + 1], y[i : i + 1]) for i in range(len(x))]


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_dense(approximation: str) -> None:
    """Value to 1e-8, gradient to 1e-6: every 2 pi, dense Kronecker products and the exact diagonal of the norm."""
    apply_fn, params, x, y = mixed()
    fitted = fit_factors(
        apply_fn, params, single(x, y), "softmax_cross_entropy", approximation=approximation, max_factor_dim=6
    )
    deltas = {key: 0.3 * 1.7**i for i, key in enumerate(per_layer(fitted))}
    found = evidence(fitted, deltas)

    loss_fn = lambda f, x: LOSSES["softmax_cross_entropy"](f)  # noqa: E731
    options = {"fisher": "exact", "loss_type": "softmax_cross_entropy", "max_factor_dim": 6}
    optimizer = KFAC(apply_fn, loss_fn, params, x, approximation=approximation, **options)
    _, pairs = observe(optimizer, params, x)
    blocks: dict[str, tuple[Any, Any]] = {}
    for name, pair in pairs.items():
        layer = optimizer.layers.covered[name]
        own = params[name]
        dense = [_joined(m) for m in pair]
        h = [np.kron(b, a) for a, b in zip(*dense, strict=True)]
        blocks[f"{name}/kernel"] = (
            layer.matrix(own["kernel"], own["bias"]).reshape(-1),
            jax.scipy.linalg.block_diag(*h),
        )
    for part in ("bias", "scale"):
        blocks[f"norm/{part}"] = params["norm"][part], jnp.diag(_diagonal(apply_fn, params, x, part))

    def value(logs: dict[str, Any]) -> Any:
        outputs = apply_fn(params, x)
        total = -optax.softmax_cross_entropy_with_integer_labels(outputs, y).sum()
        for key, (weights, h) in blocks.items():
            delta = jnp.exp(logs[key])
            total += jax.scipy.stats.norm.logpdf(weights, 0.0, delta**-0.5).sum()
            determinant = jnp.linalg.slogdet(h + delta * jnp.eye(len(h)))[1]
            total += 0.5 * len(h) * math.log(2 * math.pi) - 0.5 * determinant
        return total

    logs = {key: math.log(delta) for key, delta in deltas.items()}
    expected, gradient = jax.jit(jax.value_and_grad(value))(logs)
    assert found.value == pytest.approx(float(expected), rel=1e-8)
    assert found.gradient == pytest.approx({key: float(slope) for key, slope in gradient.items()}, rel=1e-6)
    assert found.diagonal == ("norm/bias", "norm/scale")


def _joined(factor: Any) -> list[Any]:
    """(P, P) of each group from a factor's diagonal blocks."""
    blocks = [m if m.ndim == 3 else m[None] for m in (factor if isinstance(factor, tuple) else (factor,))]
    return [jax.scipy.linalg.block_diag(*of_group) for of_group in zip(*blocks, strict=True)]


def _diagonal(apply_fn: Any, params: Any, x: Any, part: str) -> Any:
    """The diagonal of the exact Gauss-Newton matrix of a parameter of the norm."""

    def outputs(p: Any) -> Any:
        return apply_fn({**params, "norm": {**params["norm"], part: p}}, x)

    @jax.jit
    def diagonal(params: Any) -> Any:
        j = jax.jacobian(outputs)(params["norm"][part])
        h = jax.vmap(jax.hessian(LOSSES["softmax_cross_entropy"]))(apply_fn(params, x))
        return jnp.einsum("ncp,ncd,ndp->p", j, h, j)

    return diagonal(params)


@pytest.mark.parametrize(("model", "approximation"), [("mlp", "expand"), ("cnn", "expand"), ("cnn", "reduce")])
def test_as_in_pytorch(model: str, approximation: str) -> None:
    """The same weights and batches, the last one smaller and another padded: value, parts and gradient to 1e-9."""
    pair = getattr(test_parity, model)()
    state = {
        torch_name: torch.tensor(test_parity.converted(test_parity.flat(pair.params)[name], kind))
        for name, (torch_name, kind) in pair.names.items()
    }
    pair.module.load_state_dict(state)
    x, y = np.asarray(pair.x)[:9], np.asarray(pair.y)[:9] % 3
    masks = np.ones(4), np.array([1, 1, 1, 0.0]), np.ones(1)
    parts = [slice(0, 4), slice(4, 8), slice(8, 9)]
    batches = [{"inputs": x[p], "targets": y[p], "weights": m} for p, m in zip(parts, masks, strict=True)]
    options = {"approximation": approximation, "num_examples": 20}
    ours = fit_factors(pair.apply, pair.params, batches, "softmax_cross_entropy", **options)
    theirs = in_pytorch.fit_factors(
        pair.module,
        [
            {
                "inputs": pair.to_torch(torch.tensor(b["inputs"])),
                **{key: torch.tensor(b[key]) for key in ("targets", "weights")},
            }
            for b in batches
        ],
        "softmax_cross_entropy",
        **options,
    )
    one, other = (evidence(fitted, per_layer(fitted, 0.4)) for fitted in (ours, theirs))
    assert (ours.num_examples, ours.num_labels) == (20, 20)
    assert one.value == pytest.approx(other.value, rel=1e-9)
    names = {jax_name: torch_name for jax_name, (torch_name, _) in pair.names.items()}
    assert {names[key]: slope for key, slope in one.gradient.items()} == pytest.approx(
        dict(other.gradient), rel=1e-8
    )
    for key in ("log_det", "effective", "prior"):
        assert _sorted(one, key) == pytest.approx(_sorted(other, key), rel=1e-9)


def _sorted(found: Evidence, key: str) -> list[float]:
    return sorted(getattr(part, key) for part in found.parts)


def test_precision_of_jax_is_enough() -> None:
    """In float32, as JAX is by default, eigenvalues and determinants are computed in float64."""
    apply_fn, params, x, y = mixed()
    wide = evidence(fit_factors(apply_fn, params, [(x, y)], "softmax_cross_entropy"), 0.4).value
    single = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    narrow = fit_factors(apply_fn, single, [(x.astype(jnp.float32), y)], "softmax_cross_entropy")
    assert evidence(narrow, 0.4).value == pytest.approx(wide, rel=1e-4)


class Scanned(nn.Module):
    """Two layers in one parameter."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        def body(layer: Any, x: Any, _: Any) -> Any:
            return jnp.tanh(layer(x)), None

        scan = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return nn.Dense(3, name="head")(scan(nn.Dense(4, name="inner"), x, None)[0])


def test_layers_in_one_parameter_count_apart() -> None:
    """A scanned parameter has a block for each of its layers: the same as two layers."""
    x = normal(2, 7, 4)
    params = initialise(Scanned(), x)

    def two(params: Any, x: Any) -> Any:
        for name in ("first", "second"):
            x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"])
        return x @ params["head"]["kernel"] + params["head"]["bias"]

    apart = {name: jax.tree.map(lambda p, i=i: p[i], params["inner"]) for i, name in enumerate(("first", "second"))}
    apart["head"] = params["head"]
    batch = [(x, np.arange(7) % 3)]
    one = evidence(fit_factors(applier(Scanned()), params, batch, "softmax_cross_entropy"), 0.4)
    other = evidence(fit_factors(two, apart, batch, "softmax_cross_entropy"), 0.4)
    assert one.value == pytest.approx(other.value, rel=1e-10)


def test_factors_of_an_optimizer_and_decays_in_its_state() -> None:
    """Factors of the averages are those of a pass; decays change in the state, and nothing is compiled anew."""
    apply_fn, params, x, y = mixed()
    loss_fn = lambda f, x: optax.softmax_cross_entropy_with_integer_labels(f, y).mean()  # noqa: E731
    optimizer = KFAC(
        apply_fn, loss_fn, params, x, fisher="exact", loss_type="softmax_cross_entropy", learning_rate=0.5
    )
    transformation = kfac(optimizer.layers, optimizer.config, decay=decay_by_parameter(0.1))
    compiled = []

    @jax.jit
    def step(params: Any, state: Any, x: Any) -> Any:
        compiled.append(1)
        loss, gradient, statistics = optimizer.value_grad_and_statistics(params, x)
        updates, state = transformation.update(gradient, state, params, statistics=statistics)
        return updates, state, loss

    first = transformation.init(params)
    updates, state, loss = step(params, first, x)
    fitted = factors_of(
        optimizer, state, params, "softmax_cross_entropy", summed_loss=6 * float(loss), num_examples=6
    )
    whole = evidence(fit_factors(apply_fn, params, [(x, y)], "softmax_cross_entropy"), 0.5)
    found = evidence(fitted, 0.5)
    log_dets = {part.name: part.log_det for part in whole.parts}
    assert {part.name: part.log_det for part in found.parts} == pytest.approx(
        {part.name: log_dets[part.name] for part in found.parts}
    )
    assert found.log_likelihood == pytest.approx(whole.log_likelihood)
    assert set(found.left_out) == {"norm/bias", "norm/scale"}

    online = OnlineEvidence(by="layer", steps=3)
    online.update(fitted)
    decays = online.weight_decays()
    other, _, _ = step(params, set_weight_decay(first, decays), x)
    assert len(compiled) == 1
    rate = decays["mix/kernel", "mix/bias"]
    assert rate == pytest.approx(online.prior_precision["mix/kernel"] / 6)
    difference = jax.tree.map(lambda a, b: a - b, other, updates)
    np.testing.assert_allclose(
        difference["mix"]["kernel"], -0.5 * (rate - 0.1) * params["mix"]["kernel"], rtol=1e-5, atol=1e-9
    )
    np.testing.assert_allclose(difference["norm"]["scale"], 0)  # left out: what it had
    gradient = prior_gradient(params, decays)
    np.testing.assert_allclose(gradient["mix"]["bias"], rate * params["mix"]["bias"])
    np.testing.assert_allclose(gradient["norm"]["scale"], 0)


def test_a_coupled_decay_is_the_prior() -> None:
    """On a quadratic: w theta in the gradient leads to the most probable weights, with grafting, too."""
    x = normal(3, 60, 3) * jnp.array([1.0, 0.5, 0.1])
    y = x @ jnp.array([[0.6], [-0.4], [0.3]]) + 0.1 * normal(4, 60, 1)
    apply_fn = lambda params, x: x @ params["w"]  # noqa: E731
    loss_fn = lambda f, x: jnp.square(f - y).sum(1).mean()  # noqa: E731
    params = {"w": jnp.zeros((3, 1))}
    steps, decays = 1500, {("w",): 0.3}
    schedule = optax.linear_schedule(0.01, 0.0, steps)
    optimizer = KFAC(apply_fn, loss_fn, params, x, learning_rate=schedule)
    state = optimizer.init(params)
    _, _, statistics = jax.jit(optimizer.value_grad_and_statistics)(params, x)

    @jax.jit
    def step(carry: Any, number: Any) -> Any:
        params, state = carry
        gradient = jax.grad(lambda p: loss_fn(apply_fn(p, x), x))(params)
        gradient = jax.tree.map(jnp.add, gradient, prior_gradient(params, decays))
        updates, state = optimizer.update(gradient, state, params, statistics=statistics)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, state), None, length=steps)
    probable = jnp.linalg.solve(x.T @ x / 60 + 0.15 * jnp.eye(3), x.T @ y / 60)
    np.testing.assert_allclose(params["w"], probable, atol=2e-4)


def test_decays_without_a_place() -> None:
    params = {"w": jnp.zeros(2)}
    with pytest.raises(ValueError, match=r"holds 0 states of decay_by_parameter, not one"):
        set_weight_decay(optax.adam(0.1).init(params), {("w",): 0.1})
    with pytest.raises(ValueError, match=r"decays: 'v' is no parameter"):
        set_weight_decay(DecayState({"w": jnp.zeros(())}), {("v",): 0.1})
    with pytest.raises(ValueError, match=r"decays: 'v' is no parameter"):
        prior_gradient(params, {("v",): 0.1})


# Loaders as they come.


def test_a_loader_of_torch() -> None:
    apply_fn, params, x, y = mixed()
    data = torch.utils.data.TensorDataset(torch.tensor(np.asarray(x)), torch.tensor(y))
    values = [
        evidence(fit_factors(apply_fn, params, loader, "softmax_cross_entropy"), 1.0).value
        for loader in (torch.utils.data.DataLoader(data, 4), [(x[:4], y[:4]), (x[4:], y[4:])])
    ]
    assert values[0] == values[1]


def test_numbers_of_classes_that_are_no_integers() -> None:
    apply_fn, params, x, y = mixed()
    with pytest.raises(ValueError, match=r"targets of shape \(6,\) are float64: .*outputs' shape \(6, 3\)"):
        fit_factors(apply_fn, params, [(x, y.astype(float))], "softmax_cross_entropy")


def test_tensors_that_numpy_does_not_take() -> None:
    """In bfloat16, and of which a gradient is wanted."""
    apply_fn, params, x, y = mixed()
    coarse = jnp.asarray(x, jnp.bfloat16)
    tensor = torch.tensor(np.asarray(coarse, np.float32))
    pairs = {
        "coarse": ((coarse, y), (tensor.bfloat16(), torch.tensor(y))),
        "wanted": ((jnp.asarray(coarse, jnp.float32), y), (tensor.requires_grad_(), torch.tensor(y))),
    }
    for batches in pairs.values():
        ours, theirs = (fit_factors(apply_fn, params, [b], "softmax_cross_entropy") for b in batches)
        assert evidence(ours, 1.0).value == evidence(theirs, 1.0).value


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "has None for targets"),
        (np.array(list("abcabc")), "has a leaf of str"),
        (np.array([0, 1, 2] * 2, object), "has a leaf of object"),
        ("abcabc", "has a leaf of str"),
        (np.array([0, 1, -100] * 2), r"labels outside of the classes \(such as -100"),
    ],
)
def test_labels_that_are_none(labels: object, message: str) -> None:
    apply_fn, params, x, _ = mixed()
    with pytest.raises(ValueError, match=message):
        fit_factors(apply_fn, params, [(x, labels)], "softmax_cross_entropy")
