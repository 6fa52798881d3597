"""What the evidence refuses, with one clear line, in both frameworks alike; and its arithmetic on numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import algoperf_kfac.jax.evidence as in_jax
import algoperf_kfac.pytorch.evidence as in_pytorch
from algoperf_kfac.evidence import Block, Fitted, Likelihood, evidence
from algoperf_kfac.fitting import split_batch
from algoperf_kfac.losses import LossType
from tests.contract.frameworks import NAMES

X, Y = np.random.default_rng(0).standard_normal((6, 3)).astype("float32"), np.arange(6) % 2


def fit(framework: str, loader: Any, loss: str = "softmax_cross_entropy", **options: Any) -> Fitted:
    """Of a linear layer behind a scale, on batches of numpy arrays; `weights` in place of its own."""
    weights = options.pop("weights", np.full((2, 3), 0.5, "float32"))
    if framework == "pytorch":

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scale = nn.Parameter(torch.ones(3))
                self.out = nn.Linear(3, 2)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.out(self.scale * x)

        model = Model()
        with torch.no_grad():
            model.out.weight.copy_(torch.tensor(weights))
            model.out.bias.zero_()
        batches = jax.tree.map(torch.as_tensor, loader)
        return in_pytorch.fit_factors(model, batches, loss, **options)
    params = {
        "scale": jnp.ones(3, "float32"),
        "out": {"kernel": jnp.asarray(weights.T), "bias": jnp.zeros(2, "float32")},
    }
    apply_fn = lambda p, x: (p["scale"] * x) @ p["out"]["kernel"] + p["out"]["bias"]  # noqa: E731
    return in_jax.fit_factors(apply_fn, params, loader, loss, **options)


def mapping(**arrays: Any) -> dict[str, Any]:
    return {"inputs": X, "targets": Y, **arrays}


REFUSED: dict[str, tuple[Callable[[str], Any], str]] = {
    "no batch": (lambda f: fit(f, []), r"the loader has no batch"),
    "other keys": (
        lambda f: fit(f, [mapping(), mapping(weights=np.ones(6, "float32"))]),
        r"batch 1 of the loader has keys \['inputs', 'targets', 'weights'\], the first has \['inputs', 'targets'\]",
    ),
    "other parts": (
        lambda f: fit(f, [(X, Y), (X, Y, np.ones(6, "float32"))]),
        r"batch 1 of the loader has parts 3, the first has 2",
    ),
    "keys of one's own": (lambda f: fit(f, [{"image": X, "label": Y}]), r"keys \['image', 'label'\]: give split="),
    "a bare array": (lambda f: fit(f, [X]), r"a batch of the loader has a .*: give split="),
    "CTC": (lambda f: fit(f, [(X, Y)], "ctc_loss"), r"loss_type 'ctc_loss' has no likelihood"),
    "an unknown loss": (lambda f: fit(f, [(X, Y)], "hinge"), r"loss_type 'hinge': known are"),
    "the empirical Fisher": (
        lambda f: fit(f, [(X, Y)], fisher="empirical"),
        r"fisher='empirical': the evidence needs the curvature of the likelihood, allowed is one of",
    ),
    "an unknown hyperparameter": (lambda f: fit(f, [(X, Y)], dropout=0.1), r"unknown hyperparameter 'dropout'"),
    "no factors": (lambda f: fit(f, [(X, Y)], exclude=["out"]), r"the model has no layer with factors"),
    "a factor without scale": (
        lambda f: fit(f, [(X, Y)], max_factor_dim=2, large_factor="one_sided"),
        r"layer out: its A is taken as the identity, which has no scale: take large_factor='block'",
    ),
    "data that are not finite": (
        lambda f: fit(f, [(X, Y), (np.where(X[0, 0] == X, np.nan, X), Y)]),
        r"the curvature of out is not finite",
    ),
    "weights that are not finite": (
        lambda f: fit(f, [(X, Y)], weights=np.full((2, 3), np.inf, "float32")),
        r"the curvature of out is not finite",
    ),
    "nothing that counts": (
        lambda f: fit(f, [(X, Y, np.zeros(6, "float32"))]),
        r"the loader's batches have no example that counts",
    ),
    "labels of another shape": (
        lambda f: fit(f, [(X, Y)], "mean_squared_error"),
        r"targets of shape \(6,\) do not fit outputs of shape \(6, 2\) for mean_squared_error",
    ),
    "delta = 0": (
        lambda f: evidence(fit(f, [(X, Y)]), 0.0),
        r"prior_precision=0.0: allowed is a finite number > 0",
    ),
    "delta < 0": (lambda f: evidence(fit(f, [(X, Y)]), {"*": -1.0}), r"prior_precision=-1.0: allowed"),
    "delta of one layer": (
        lambda f: evidence(fit(f, [(X, Y)]), {"out": math.nan, "*": 1.0}),
        r"prior_precision=nan of 'out'",
    ),
    "a layer without delta": (lambda f: evidence(fit(f, [(X, Y)]), {"out": 1.0}), r"no pattern matches scale"),
    "a pattern of nothing": (
        lambda f: evidence(fit(f, [(X, Y)]), {"*": 1.0, "encoder.*": 2.0}),
        r"prior_precision: no layer or parameter that is left matches 'encoder\.\*'",
    ),
    "noise = 0": (lambda f: evidence(fit(f, [(X, X[:, :2])], "mean_squared_error"), noise=0.0), r"noise=0.0"),
    "noise where there is none": (
        lambda f: evidence(fit(f, [(X, Y)]), noise=0.5),
        r"noise=0.5: softmax_cross_entropy has none, leave it out",
    ),
}


@pytest.mark.parametrize("framework", NAMES)
@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_one_line(case: str, framework: str) -> None:
    call, text = REFUSED[case]
    with pytest.raises(ValueError, match=text) as caught:
        call(framework)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("framework", NAMES)
def test_what_is_named(framework: str) -> None:
    """What got the diagonal and what the factors come from, in the result and in its table."""
    found = evidence(fit(framework, [(X[:4], Y[:4]), (X[4:], Y[4:])]), 0.5)
    assert found.diagonal == ("scale",)
    assert found.source == "K-FAC-expand, exact Fisher, 2 batches of the loader"
    lines = str(found).splitlines()
    assert [line.split()[:2] for line in lines[1:3]] == [["out", "kronecker"], ["scale", "diagonal"]]
    assert lines[-1].startswith(f"log evidence {found.value:.1f} (")
    assert found.effective == pytest.approx(sum(part.effective for part in found.parts))


class Ones:
    """The eigenvalues 1, 1 and 2."""

    def log_det(self, scale: float, delta: float) -> tuple[float, float]:
        h = [scale, scale, 2 * scale]
        return sum(math.log(x + delta) for x in h), sum(x / (x + delta) for x in h)


def test_by_hand() -> None:
    block = Block("layer", "kronecker", ("layer.weight",), 3, 5.0, Ones())
    fitted = Fitted(LossType.SOFTMAX_CROSS_ENTROPY, (block,), 7.0, 4, 4, {}, "by hand")
    found = evidence(fitted, 2.0)
    assert found.value == pytest.approx(-7 + 0.5 * (3 * math.log(2) - 2 * 5 - math.log(3 * 3 * 4)))
    assert found.gradient["*"] == pytest.approx(0.5 * (1 / 3 + 1 / 3 + 1 / 2 - 10))


def test_noise_of_two_likelihoods() -> None:
    """Of sum (f - y)^2 and sum |f - y|: densities that integrate to 1."""
    gaussian, laplace = (
        Likelihood(kind, 0.4) for kind in (LossType.MEAN_SQUARED_ERROR, LossType.MEAN_ABSOLUTE_ERROR)
    )
    grid = np.linspace(-10, 10, 200001)
    for likelihood, losses in ((gaussian, grid**2), (laplace, np.abs(grid))):
        density = [math.exp(likelihood.log_likelihood(loss, 1)) for loss in losses[::100]]
        assert sum(density) * (grid[100] - grid[0]) == pytest.approx(1, rel=1e-3)
    assert gaussian.curvature == pytest.approx(1 / (2 * 0.16))
    assert laplace.curvature == pytest.approx(1 / 0.16)


def test_batches_as_they_usually_come() -> None:
    assert split_batch((1, 2)) == ((1,), 2, None)
    assert split_batch([(1, 2), 3, 4]) == ((1, 2), 3, 4)
    assert split_batch({"inputs": 1, "targets": 2, "more": 3}) == ((1,), 2, None)
    assert split_batch({"inputs": 1, "targets": 2, "weights": 3}) == ((1,), 2, 3)


@pytest.mark.parametrize("framework", NAMES)
def test_a_split_of_ones_own(framework: str) -> None:
    usual = evidence(fit(framework, [(X, Y)])).value
    own = fit(framework, [{"image": X, "label": Y}], split=lambda batch: ((batch["image"],), batch["label"]))
    assert evidence(own).value == pytest.approx(usual)
    spread = fit(framework, [(X, np.eye(2, dtype="float32")[Y])])  # probabilities in place of numbers
    assert evidence(spread).value == pytest.approx(usual)
