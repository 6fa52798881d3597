"""What is wrong is refused with the same words in both frameworks: what it was, what is allowed or to be done."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import pytest
import torch
from torch import nn

from tests.contract.frameworks import EVERY_STEP, NAMES, examples, module_of, start
from tests.contract.models import Layers, Model, dense, linear, normal, perceptron

MLP = perceptron((3, 4, 2))


def with_a_useless_layer() -> Model:
    """`unused` is called, and the loss does not depend on its output."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        m.unused(x)
        return m.head(x)

    def apply(p: Any, x: Any, *_: Any) -> Any:
        linear(p["unused"], x)
        return linear(p["head"], x)

    return Model(
        lambda: Layers(forward, unused=nn.Linear(3, 2), head=nn.Linear(3, 2)),
        apply,
        {"unused": dense(3, 2), "head": dense(3, 2)},
        (normal(6, 3),),
    )


def called_on_other_examples() -> Model:
    """One layer, on six rows and then on twelve."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.layer(torch.cat([m.layer(x), x]))

    def apply(p: Any, x: Any, *_: Any) -> Any:
        return linear(p["layer"], jnp.concatenate([linear(p["layer"], x), x]))

    return Model(lambda: Layers(forward, layer=nn.Linear(3, 3)), apply, {"layer": dense(3, 3)}, (normal(6, 3),))


@pytest.mark.parametrize("framework", NAMES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": -1.0}, r"^hyperparameter damping=-1\.0: allowed is a number > 0$"),
        ({"fisher": "true"}, r"^hyperparameter fisher='true': allowed is one of \('empirical', 'mc', 'exact'\)$"),
        (
            {"refresh_interval": 15},
            r"^hyperparameter refresh_interval=15: allowed is a multiple of factor_interval=10$",
        ),
        ({"approximation": {"dense": "reduce"}}, r"^hyperparameter approximation=\{'dense': .*\}: allowed is one"),
        ({"momentum": 0.9}, r"^unknown hyperparameter 'momentum': known are \["),
        ({"exclude": ["decoder.*"]}, r"^exclude: no .* matches 'decoder\.\*'$"),
    ],
)  # fmt: skip
def test_arguments(framework: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        start(framework, MLP, **options)


@pytest.mark.parametrize("framework", NAMES)
def test_factors_before_there_are_any(framework: str) -> None:
    run = start(framework, MLP)
    with pytest.raises(RuntimeError, match=r"^no layer has statistics yet: make a statistics step first$"):
        run.factors()
    with pytest.raises(ValueError, match=r"^reduction='max': allowed is 'sum' or 'mean'$"):
        run.factors("max")


@pytest.mark.parametrize("framework", NAMES)
def test_a_layer_that_does_not_reach_the_loss(framework: str) -> None:
    error = module_of(framework).MissingStatisticsError
    run = start(framework, with_a_useless_layer(), **EVERY_STEP)
    with pytest.raises(error, match=r"^1 of 2 layers missed .*output gradients.*exclude=\[\.\.\.\]") as caught:
        run.step()
    assert "unused" in str(caught.value)
    assert issubclass(error, RuntimeError)


@pytest.mark.parametrize("framework", ["pytorch"])  # in JAX they are different examples
def test_a_layer_called_on_other_examples(framework: str) -> None:
    """Other numbers of examples are other examples: all of them count."""
    run = start(framework, called_on_other_examples(), **EVERY_STEP)
    run.step()
    assert examples(run, "layer") == 6 + 12


def test_texts_of_a_missing_layer_are_the_same() -> None:
    """But for the remedy, which may name what only one of them has."""
    texts = []
    for framework in NAMES:
        run = start(framework, with_a_useless_layer(), **EVERY_STEP)
        with pytest.raises(RuntimeError) as caught:
            run.step()
        texts.append(str(caught.value).split(". ")[0])
    assert texts[0] == texts[1]
