"""What K-FAC covers, and the reasons for what it does not: the same words where the situation is the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from tests.contract.frameworks import EVERY_STEP, NAMES, start
from tests.contract.models import Layers, Model, convolutional, dense, graphs, linear, normal, perceptron, tied


def lookup() -> Model:
    """A table that is a lookup only, in front of a linear layer."""
    return Model(
        lambda: Layers(lambda m, x: m.head(m.table(x)), table=nn.Embedding(5, 3), head=nn.Linear(3, 2)),
        lambda p, x, *_: linear(p["head"], p["table"]["kernel"][x]),
        {"table": {"kernel": (5, 3)}, "head": dense(3, 2)},
        (np.arange(6) % 5,),
    )


def shared_bias() -> Model:
    """Two linear layers that add one and the same bias."""

    def module() -> nn.Module:
        layers = Layers(
            lambda m, x: m.second(torch.tanh(m.first(x))), first=nn.Linear(3, 3), second=nn.Linear(3, 3)
        )
        layers.second.bias = layers.first.bias
        return layers

    def apply(p: Any, x: Any, *_: Any) -> Any:
        bias = p["first"]["bias"]
        return jnp.tanh(x @ p["first"]["kernel"] + bias) @ p["second"]["kernel"] + bias

    return Model(module, apply, {"first": dense(3, 3), "second": dense(3, 3, bias=False)}, (normal(6, 3),))


def also_read() -> Model:
    """A linear layer whose weight is multiplied by another one, too, which has no rule."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.first(x) + x @ (m.head.weight @ m.first.weight).T

    def apply(p: Any, x: Any, *_: Any) -> Any:
        return x @ p["first"]["kernel"] + x @ (p["first"]["kernel"] @ p["head"]["kernel"])

    return Model(
        lambda: Layers(forward, first=nn.Linear(3, 3, bias=False), head=nn.Linear(3, 3, bias=False)),
        apply,
        {"first": dense(3, 3, bias=False), "head": dense(3, 3, bias=False)},
        (normal(6, 3),),
    )


def normalised() -> Model:
    def apply(p: Any, x: Any, *_: Any) -> Any:
        x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return linear(p["head"], x * p["norm"]["scale"] + p["norm"]["bias"])

    return Model(
        lambda: Layers(lambda m, x: m.head(m.norm(x)), norm=nn.LayerNorm(3), head=nn.Linear(3, 2)),
        apply,
        {"norm": {"scale": (3,), "bias": (3,)}, "head": dense(3, 2)},
        (normal(6, 3),),
    )


def reasons(framework: str, model: Model, **options: Any) -> dict[str, str]:
    """Why each parameter is not covered, weights as PyTorch names them; in PyTorch after a step, in JAX it is known
    before."""
    run = start(framework, model, **EVERY_STEP, **options)
    if framework == "pytorch":
        run.step()
    spelled = {".kernel": ".weight", ".scale": ".weight"}

    def name(path: str) -> str:
        path = path.replace("/", ".")
        for jax_name, torch_name in spelled.items():
            path = path.replace(jax_name, torch_name)
        return path

    return {name(f.name): name(f.reason) for f in run.coverage().fallbacks}


@pytest.mark.parametrize("framework", NAMES)
@pytest.mark.parametrize(
    ("model", "fraction", "layers"),
    [
        (lambda: perceptron((3, 4, 2)), 1.0, ["l0", "l1"]),
        (convolutional, 1.0, ["conv", "grouped", "depthwise", "up", "head"]),
        (tied, 1.0, ["hidden", "table"]),
        (lambda: graphs([0, 0, 1], [0, 1], 2), 1.0, ["edge", "head", "node"]),
        (lookup, 8 / 23, ["head"]),
        (normalised, 8 / 14, ["head"]),
        (shared_bias, 18 / 21, ["first", "second"]),
    ],
    ids=["perceptron", "convolutional", "tied", "graphs", "lookup", "normalised", "shared-bias"],
)
def test_what_is_covered(framework: str, model: Callable[[], Model], fraction: float, layers: list[str]) -> None:
    run = start(framework, model(), **EVERY_STEP)
    if model is tied and framework == "pytorch":  # there a table proves to be the output layer in use
        run.step()
    coverage = run.coverage()
    assert sorted(spec.name for spec in coverage.layers) == sorted(layers)
    assert coverage.fraction == pytest.approx(fraction, abs=1e-12)
    last = str(coverage).splitlines()[-1]
    assert last == (
        f"K-FAC covers {coverage.num_covered:,} of {coverage.num_parameters:,} parameters ({100 * fraction:.1f} %)"
    )


@pytest.mark.parametrize("framework", NAMES)
def test_a_lookup(framework: str) -> None:
    assert reasons(framework, lookup()) == {
        "table.weight": "embedding: its inputs are one-hot, A would be a diagonal of counts"
    }


@pytest.mark.parametrize("framework", NAMES)
@pytest.mark.parametrize("pattern", ["l0", "l[0]", "*0"])
def test_excluded(framework: str, pattern: str) -> None:
    found = reasons(framework, perceptron((3, 4, 2)), exclude=[pattern])
    assert found == dict.fromkeys(["l0.weight", "l0.bias"], "excluded by the user")


@pytest.mark.parametrize("framework", NAMES)
def test_too_large(framework: str) -> None:
    """Both factors would be the identity; that goes for weight and bias of the layer."""
    found = reasons(framework, perceptron((3, 4, 2)), max_factor_dim=2, large_factor="one_sided")
    assert found == dict.fromkeys(["l0.weight", "l0.bias"], "both factors above max_factor_dim=2")


@pytest.mark.parametrize("framework", NAMES)
def test_normalisation(framework: str) -> None:
    found = reasons(framework, normalised())
    assert found.keys() == {"norm.weight", "norm.bias"}
    assert all("normalisation" in reason for reason in found.values())


def test_a_shared_bias() -> None:
    """The layers are covered without it; why the bias is not, both say alike."""
    found = [reasons(framework, shared_bias()) for framework in NAMES]
    assert found[0].keys() == {"first.bias"}
    assert found[0] == found[1]


@pytest.mark.filterwarnings("ignore:K-FAC. the weight of")
def test_a_weight_that_something_without_a_rule_reads_too() -> None:
    """It is not 'tied', which is what K-FAC covers; and the same words, but for the operation's name."""
    texts = set()
    for framework, operation in zip(NAMES, ("matmul", "dot_general"), strict=True):
        reason = reasons(framework, also_read())["first.weight"]
        assert operation in reason
        texts.add(reason.replace(operation, "..."))
    assert len(texts) == 1
    assert "tied" not in texts.pop()
