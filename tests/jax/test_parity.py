"""PyTorch and JAX: the same weights and batches give the same factors, directions and training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as fnn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from algoperf_kfac import jax as kfac_jax
from algoperf_kfac import pytorch as kfac_torch
from algoperf_kfac.config import POLAR_STEPS as STEPS_OF_POLAR
from algoperf_kfac.polar import COEFFICIENTS
from tests.jax.support import applier, initialise, normal

STEPS = 20


@dataclasses.dataclass
class Pair:
    """One model in both frameworks.

    Attributes:
        apply: in JAX, a function of (params, x).
        params: in JAX.
        module: in PyTorch.
        names: path of each JAX parameter -> PyTorch name and conversion, see `converted`.
        x: the inputs, as JAX takes them.
        y: the labels.
        to_torch: from the inputs to those of the PyTorch module.
        positions: for JAX; `torch_positions` for PyTorch.
        mask: 1 where a label counts; the loss is averaged over them.
    """

    apply: Callable[..., Any]
    params: Any
    module: nn.Module
    names: dict[str, tuple[str, str]]
    x: Any
    y: Any
    to_torch: Callable[[torch.Tensor], torch.Tensor] = lambda x: x
    positions: Any = None
    torch_positions: Any = None
    mask: Any = None


def converted(value: Any, kind: str) -> np.ndarray:
    """A JAX parameter in PyTorch's layout; flax does not flip the kernels of transposed convolutions."""
    value = np.asarray(value)
    if kind == "linear":
        return value.T
    if kind == "conv":
        return value.transpose(3, 2, 0, 1)
    if kind == "conv_transpose":
        return value[::-1, ::-1].transpose(2, 3, 0, 1).copy()
    if kind == "heads":  # (P_in, heads, features) -> (heads features, P_in)
        return value.reshape(value.shape[0], -1).T
    if kind == "merge":  # (heads, features, P_out) -> (P_out, heads features)
        return value.reshape(-1, value.shape[-1]).T
    return value.reshape(-1) if kind == "flat" else value


def flat(params: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {"/".join(str(k.key) for k in path): leaf for path, leaf in leaves}


def layer(jax_name: str, torch_name: str, kind: str, bias: str | None = "same") -> dict[str, tuple[str, str]]:
    names = {f"{jax_name}/kernel": (f"{torch_name}.weight", kind)}
    return names if bias is None else names | {f"{jax_name}/bias": (f"{torch_name}.bias", bias)}


class MLP(fnn.Module):
    @fnn.compact
    def __call__(self, x: Any) -> Any:
        for size in (6, 5):
            x = jnp.tanh(fnn.Dense(size)(x))
        return fnn.Dense(3, use_bias=False)(x)


def mlp() -> Pair:
    module = nn.Sequential(
        nn.Linear(4, 6),
        nn.Tanh(),
        nn.Linear(6, 5),
        nn.Tanh(),
        nn.Linear(5, 3, bias=False),
    )
    names: dict[str, tuple[str, str]] = {}
    for i in range(3):
        names |= layer(f"Dense_{i}", str(2 * i), "linear", None if i == 2 else "same")
    x = normal(1, 64, 4)
    return Pair(applier(MLP()), initialise(MLP(), x), module, names, x, np.arange(64) % 3)


class CNN(fnn.Module):
    @fnn.compact
    def __call__(self, x: Any) -> Any:
        x = jnp.tanh(fnn.Conv(4, (3, 3), padding=1, strides=2, name="c0")(x))
        x = jnp.tanh(fnn.Conv(4, (3, 3), padding=1, feature_group_count=2, name="c1")(x))
        x = jnp.tanh(fnn.ConvTranspose(3, (3, 2), strides=(2, 2), padding="VALID", name="c2")(x))
        x = fnn.Conv(3, (2, 2), padding="CIRCULAR", kernel_dilation=1, use_bias=False, name="c3")(x)
        return fnn.Dense(3, name="d")(x.mean((1, 2)))


class TorchCNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c0 = nn.Conv2d(2, 4, 3, 2, 1)
        self.c1 = nn.Conv2d(4, 4, 3, 1, 1, groups=2)
        self.c2 = nn.ConvTranspose2d(4, 3, (3, 2), 2)
        self.c3 = nn.Conv2d(3, 3, 2, bias=False)
        self.d = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.c1(torch.tanh(self.c0(x))))
        x = F.pad(torch.tanh(self.c2(x)), (0, 1, 0, 1), mode="circular")
        return self.d(self.c3(x).mean((2, 3)))


def cnn() -> Pair:
    names = layer("c0", "c0", "conv") | layer("c1", "c1", "conv") | layer("c2", "c2", "conv_transpose")
    names |= layer("c3", "c3", "conv", None) | layer("d", "d", "linear")
    x = normal(1, 64, 6, 6, 2)
    return Pair(
        applier(CNN()), initialise(CNN(), x), TorchCNN(), names, x, np.arange(64) % 3,
        lambda x: x.permute(0, 3, 1, 2),
    )  # fmt: skip


class Attention(fnn.Module):
    @fnn.compact
    def __call__(self, x: Any) -> Any:
        query, key, value = (fnn.DenseGeneral((2, 3), name=name)(x) for name in ("query", "key", "value"))
        # Capped scores: plain ones would not change with a key's bias, and B of reduce would be rounding noise.
        weights = jax.nn.softmax(jnp.tanh(jnp.einsum("nqhd,nkhd->nhqk", query, key)))
        x = fnn.DenseGeneral(4, axis=(-2, -1), name="out")(jnp.einsum("nhqk,nkhd->nqhd", weights, value))
        x = fnn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name="norm")(x)
        return fnn.Dense(3, name="head")(x.mean(1))


class TorchAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(4, 6) for _ in range(3))
        self.out, self.norm, self.head = nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (m(x).unflatten(-1, (2, 3)) for m in (self.query, self.key, self.value))
        weights = torch.einsum("nqhd,nkhd->nhqk", query, key).tanh().softmax(-1)
        x = self.out(torch.einsum("nhqk,nkhd->nqhd", weights, value).flatten(2))
        return self.head(self.norm(x).mean(1))


def attention() -> Pair:
    names: dict[str, tuple[str, str]] = {}
    for name in ("query", "key", "value"):
        names |= layer(name, name, "heads", "flat")
    names |= layer("out", "out", "merge") | layer("head", "head", "linear")
    names |= {"norm/scale": ("norm.weight", "same"), "norm/bias": ("norm.bias", "same")}
    x = normal(1, 48, 5, 4)
    return Pair(applier(Attention()), initialise(Attention(), x), TorchAttention(), names, x, np.arange(48) % 3)


IDS = np.repeat(np.arange(24), 1 + np.arange(24) % 3)


def graph() -> Pair:
    """A read-out over graphs of varying size."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.n0, self.n1, self.head = nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.tanh(self.n1(torch.tanh(self.n0(x))))
            return self.head(x.new_zeros(24, 4).index_add(0, torch.tensor(IDS), x))

    class FlaxNet(fnn.Module):
        @fnn.compact
        def __call__(self, x: Any) -> Any:
            x = jnp.tanh(fnn.Dense(4, name="n1")(jnp.tanh(fnn.Dense(5, name="n0")(x))))
            return fnn.Dense(3, name="head")(jax.ops.segment_sum(x, jnp.asarray(IDS), 24))

    names = layer("n0", "n0", "linear") | layer("n1", "n1", "linear") | layer("head", "head", "linear")
    x = normal(1, len(IDS), 4)
    positions = kfac_jax.Positions(segment_ids=jnp.asarray(IDS), num_segments=24, readout="sum")
    torch_positions = kfac_torch.Positions(segment_ids=torch.tensor(IDS), num_segments=24, readout="sum")
    return Pair(
        applier(FlaxNet()), initialise(FlaxNet(), x), Net(), names, x, np.arange(24) % 3,
        positions=positions, torch_positions=torch_positions,
    )  # fmt: skip


class LM(fnn.Module):
    @fnn.compact
    def __call__(self, tokens: Any) -> Any:
        x = fnn.Embed(7, 5, name="embed")(tokens)
        query, key, value = (fnn.Dense(5, name=name)(x) for name in ("query", "key", "value"))
        scores = jnp.where(np.tri(tokens.shape[1], dtype=bool), jnp.tanh(query @ key.swapaxes(1, 2)), -1e9)
        return fnn.Dense(7, name="head")(x + jnp.tanh(jax.nn.softmax(scores) @ value))


class TorchLM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.query, self.key, self.value = (nn.Linear(5, 5) for _ in range(3))
        self.head = nn.Linear(5, 7)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        scores = torch.tanh(self.query(x) @ self.key(x).transpose(1, 2))
        scores = scores.masked_fill(~torch.ones(scores.shape[1:]).tril().bool(), -1e9)
        return self.head(x + torch.tanh(scores.softmax(-1) @ self.value(x)))


def language_model() -> Pair:
    rng = np.random.default_rng(0)
    tokens, labels = rng.integers(0, 7, (2, 32, 6))
    mask = (np.arange(6) < rng.integers(1, 7, 32)[:, None]).astype(float)
    names = {"embed/embedding": ("embed.weight", "same")}
    for name in ("query", "key", "value", "head"):
        names |= layer(name, name, "linear")
    return Pair(
        applier(LM()), initialise(LM(), jnp.asarray(tokens)), TorchLM(), names, jnp.asarray(tokens), labels,
        positions=jnp.asarray(mask), torch_positions=torch.tensor(mask), mask=mask,
    )  # fmt: skip


def run(pair: Pair, options: dict[str, Any], tolerance: float) -> None:
    """Train both for `STEPS` steps, comparing factors and directions along the way."""
    dtype = torch.get_default_dtype()
    params = jax.tree.map(lambda t: jnp.asarray(t, jnp.result_type(float)), pair.params)
    module, state_dict = pair.module, pair.module.state_dict()
    state_dict |= {n: torch.tensor(converted(flat(params)[k], c)) for k, (n, c) in pair.names.items()}
    module.load_state_dict(state_dict)
    x, y = pair.x, jnp.asarray(pair.y)
    torch_x, torch_y = pair.to_torch(torch.tensor(np.asarray(x))), torch.tensor(pair.y)
    torch_x = torch_x.to(dtype) if torch_x.is_floating_point() else torch_x
    mask = np.ones(pair.y.shape) if pair.mask is None else pair.mask
    count = float(mask.sum())

    def loss_fn(f: Any, x: Any) -> Any:
        return (optax.softmax_cross_entropy_with_integer_labels(f, y) * mask.astype(f.dtype)).sum() / count

    ours = kfac_jax.KFAC(pair.apply, loss_fn, params, x, **options)
    theirs = kfac_torch.KFAC(module, **options)
    extra = {"positions": pair.positions, "loss_normalizer": count}

    @jax.jit
    def plain(params: Any, state: Any) -> Any:
        gradient = jax.grad(lambda p: loss_fn(pair.apply(p, x), x))(params)
        updates, state = ours.update(gradient, state, params)
        return updates, state

    @jax.jit
    def with_statistics(params: Any, state: Any) -> Any:
        _, gradient, statistics = ours.value_grad_and_statistics(params, x, **extra)
        return ours.update(gradient, state, params, statistics=statistics)

    state = ours.init(params)
    parameters = dict(module.named_parameters())
    scale = max(float(p.abs().max()) for p in module.parameters())
    for step in range(STEPS):
        theirs.zero_grad()
        with theirs.capture(pair.torch_positions, count):
            losses = F.cross_entropy(module(torch_x).flatten(0, -2), torch_y.flatten(), reduction="none")
            ((losses * torch.tensor(mask, dtype=dtype).flatten()).sum() / count).backward()
        before = {n: p.detach().clone() for n, p in parameters.items()}
        theirs.step()
        taken = (with_statistics if ours.is_statistics_step(step) else plain)(params, state)
        updates, state = taken
        params = optax.apply_updates(params, updates)
        assert params.keys() == pair.params.keys()
        for key, (name, kind) in pair.names.items():
            moved = (parameters[name] - before[name]).detach().numpy()
            update = converted(flat(updates)[key], kind)
            # Relative to the step's own length, except for what rounding of the parameters hides.
            floor = 4 * np.finfo(update.dtype).eps * scale
            np.testing.assert_allclose(update, moved, rtol=0, atol=tolerance * np.abs(moved).max() + floor)
            got = converted(flat(params)[key], kind)
            np.testing.assert_allclose(got, parameters[name].detach(), rtol=0, atol=tolerance * scale)
        if step in (0, 7):
            compare(ours.factors(state), theirs.factors(), pair, tolerance)


def compare(ours: Any, theirs: Any, pair: Pair, tolerance: float) -> None:
    names = {k.rpartition("/")[0]: (n.rpartition(".")[0], c) for k, (n, c) in pair.names.items() if "kernel" in k}
    assert {names[name][0] for name in ours} == theirs.keys()
    for name, (a, b) in ours.items():
        torch_name, kind = names[name]
        if kind == "conv_transpose":
            a = np.asarray(a)
            # Kernel positions count the other way round; the bias stays last.
            order = [*np.arange(a.shape[-1] - 1).reshape(-1, 6)[:, ::-1].reshape(-1), a.shape[-1] - 1]
            a = a[np.ix_(order, order)]
        for got, want in zip(jax.tree.leaves((a, b)), jax.tree.leaves(tuple(theirs[torch_name])), strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * float(want.abs().max()))


INTERVALS = {
    "learning_rate": 1e-2, "weight_decay": 0.01,
    "factor_interval": 2, "refresh_interval": 4, "initial_statistics": 3,
}  # fmt: skip
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "eigen": {"damping": 1e-2},
    "inverse": {"preconditioner": "inverse", "grafting": False, "damping": 1e-2, "damping_mode": "absolute"},
    "root": {"scaling": "root", "drift_tolerance": 0.2, "damping": 1e-2, "refresh_interval": 6},
    "second-moment": {"scaling": "second_moment", "damping": 1e-2},
    "polar": {"scaling": "polar", "damping": 1e-2, "max_factor_dim": 4},
    "polar-rms": {
        "scaling": "polar",
        "polar_exponent": 0.25,
        "damping": 1e-2,
        "length": "rms",
        "drift_tolerance": 0.2,
    },
    "following": {"decomposition": "qr", "damping": 1e-2, "max_factor_dim": 4},
    "floor": {"damping": 1e-8, "noise_floor": 1e9, "max_factor_dim": 4},  # 0.02 of the largest eigenvalue
    "blocks": {"max_factor_dim": 4, "damping_mode": "absolute", "scaling": "inverse", "damping": 1e-2},
}
MODELS = {"mlp": mlp, "cnn": cnn, "attention": attention, "graph": graph, "language-model": language_model}


@pytest.mark.parametrize(
    ("model", "configuration", "approximation"), [("graph", "polar", "reduce"), ("cnn", "polar-rms", "expand")]
)
def test_the_polar(model: str, configuration: str, approximation: str) -> None:
    """Gradients of logits sum to zero over classes but for rounding, which is lifted as all that is small."""
    lift = COEFFICIENTS[0] ** STEPS_OF_POLAR
    run(MODELS[model](), INTERVALS | CONFIGURATIONS[configuration] | {"approximation": approximation}, 1e-10 * lift)


# Each model with both approximations and both configurations, and each of these with each other, but not every
# three: an approximation makes the factors, a configuration what is made of them, and neither looks at the other.
MODELS_IN_PAIRS = [
    (model, configuration, approximation)
    for i, model in enumerate(MODELS)
    for configuration, approximation in zip(
        ("eigen", "inverse"), ("expand", "reduce") if i % 2 else ("reduce", "expand"), strict=True
    )
]


@pytest.mark.parametrize(("model", "configuration", "approximation"), MODELS_IN_PAIRS)
def test_models(model: str, configuration: str, approximation: str) -> None:
    run(MODELS[model](), INTERVALS | CONFIGURATIONS[configuration] | {"approximation": approximation}, 1e-10)


@pytest.mark.parametrize(
    ("model", "configuration", "approximation"),
    [
        ("graph", "root", "expand"),
        ("graph", "floor", "expand"),
        ("graph", "following", "expand"),
        ("language-model", "second-moment", "expand"),
        ("attention", "blocks", "expand"),
        ("graph", "blocks", "reduce"),
    ],
)
def test_other_configurations(model: str, configuration: str, approximation: str) -> None:
    run(MODELS[model](), INTERVALS | CONFIGURATIONS[configuration] | {"approximation": approximation}, 1e-10)


# A model of each kind of rows (vectors, images, tokens with a mask), both configurations, both approximations: what
# is computed is in test_models, and a precision is one of the parameters, whichever layers they are of.
@pytest.mark.single
@pytest.mark.parametrize(
    ("model", "configuration", "approximation"),
    [("mlp", "inverse", "expand"), ("cnn", "eigen", "expand"), ("language-model", "eigen", "reduce")],
)
def test_single_precision(model: str, configuration: str, approximation: str) -> None:
    # Strong damping: rounding of the factors must not be amplified beyond the tolerance.
    preconditioner = CONFIGURATIONS[configuration].get("preconditioner", "eigen")
    options = INTERVALS | {"approximation": approximation, "damping": 1.0, "preconditioner": preconditioner}
    run(MODELS[model](), options, 1e-5)
