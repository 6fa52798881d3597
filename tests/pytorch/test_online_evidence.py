"""Prior precisions that learn: Adam on log delta, and what delta is as a weight decay, on quadratics."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from algoperf_kfac.evidence import Fitted, evidence
from algoperf_kfac.online import OnlineEvidence
from algoperf_kfac.pytorch import KFAC
from algoperf_kfac.pytorch.decay import add_prior_gradient, set_weight_decay
from algoperf_kfac.pytorch.evidence import fit_factors


@pytest.fixture(autouse=True)
def float64() -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def regression() -> tuple[Tensor, Tensor, Tensor]:
    """Inputs with a condition number of about 100, targets, and the least squares solution."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 3, generator=generator) * torch.tensor([1.0, 0.5, 0.1])
    y = x @ torch.tensor([[0.6], [-0.4], [0.3]]) + 0.1 * torch.randn(60, 1, generator=generator)
    return x, y, torch.linalg.lstsq(x, y).solution.T


def squares(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The mean over examples, as the library's squared error has it."""
    return (model(x) - y).square().sum(1).mean()


def trained(decays: Any, *, coupled: bool, steps: int = 2000, **options: Any) -> Tensor:
    """The weights after training with a learning rate that falls to zero."""
    x, y, _ = regression()
    model = nn.Linear(3, 1, bias=False)
    optimizer = KFAC(model, **options)
    if not coupled:
        set_weight_decay(optimizer, model, decays)
    rate = optimizer.param_groups[0]["lr"]
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        with optimizer.capture():
            squares(model, x, y).backward()
        if coupled:
            add_prior_gradient(model, decays)
        optimizer.step()
    return model.weight.detach()


# K-FAC as it is in theory, a step of the inverse's own length; and the default, of NadamW's length.
NEWTON = {"preconditioner": "inverse", "damping": 1e-1, "grafting": False, "lr": 0.05}
GRAFTED = {"lr": 0.01, "factor_interval": 100, "refresh_interval": 100}


@pytest.mark.parametrize("options", [NEWTON, GRAFTED], ids=["newton", "grafted"])
def test_a_coupled_decay_is_the_prior(options: dict[str, Any]) -> None:
    """2 s^2 delta / N beside the mean of squares leads to the most probable weights, whatever scales the step."""
    x, y, _ = regression()
    delta, noise = 40.0, 0.5
    online = OnlineEvidence(delta, noise=noise, steps=1)
    online.update(fit_factors(nn.Linear(3, 1, bias=False), [(x, y)], "mean_squared_error"))
    online.prior_precision = delta  # not what it has learned
    decays = online.weight_decays()
    assert decays == {("weight",): pytest.approx(2 * noise**2 * delta / 60)}
    probable = torch.linalg.solve(x.T @ x / noise**2 + delta * torch.eye(3), x.T @ y / noise**2).T
    torch.testing.assert_close(trained(decays, coupled=True, **options), probable, rtol=0, atol=2e-4)


def test_a_decoupled_decay_shrinks_all_directions_alike() -> None:
    """With the inverse of the loss' own curvature, hardly damped: theta* / (1 + w)."""
    x, y, best = regression()
    model, w = nn.Linear(3, 1, bias=False), 0.25
    optimizer = KFAC(model, **NEWTON | {"damping": 1e-9, "fisher": "exact"})
    set_weight_decay(optimizer, model, {("weight",): w})
    for _ in range(400):
        optimizer.zero_grad()
        with optimizer.capture() as capture:
            outputs = model(x)
            capture.backward_fisher(outputs, "mean_squared_error")
            (outputs - y).square().sum(1).mean().backward()
        optimizer.step()
    torch.testing.assert_close(model.weight.detach(), best / (1 + w), rtol=0, atol=1e-5)


def test_a_grafted_decoupled_decay_is_no_prior() -> None:
    """Weights whose root mean square is below 1 / w rest at the minimum of the loss, not of the posterior."""
    x, y, best = regression()
    w = 2 * 0.5**2 * 40.0 / 60
    found = trained({("weight",): w}, coupled=False, **GRAFTED)
    probable = torch.linalg.solve(x.T @ x / 60 + w / 2 * torch.eye(3), x.T @ y / 60).T
    assert best.square().mean().sqrt() < 1 / w
    assert (found - best).norm() < 0.1 * (probable - best).norm()


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)).tanh())


def fitted() -> Fitted:
    return fit_factors(Line(), [(torch.randn(30, 3), torch.randn(30, 2))], "mean_squared_error")


@pytest.mark.parametrize("by", ["model", "layer"])
def test_an_update_raises_the_evidence_to_its_maximum(by: str) -> None:
    own = fitted()
    online = OnlineEvidence(by=by, steps=2000, learning_rate=0.02, learn_noise=True)
    before = evidence(own, 1.0).value
    found = online.update(own)
    assert found.value > before
    assert max(map(abs, found.gradient.values())) < 0.05
    assert abs(found.gradient_log_noise) < 0.05
    # MacKay's fixed point: delta |theta|^2 = gamma.
    if by == "model":
        norm = sum(block.squared_norm for block in own.blocks)
        assert online.prior_precision * norm == pytest.approx(found.effective, rel=0.01)


def test_the_first_step_is_adams() -> None:
    own, online = fitted(), OnlineEvidence(0.7, steps=1, learning_rate=0.3)
    up = evidence(own, 0.7).gradient["*"] > 0
    online.update(own)
    assert online.prior_precision == pytest.approx(0.7 * math.exp(0.3 if up else -0.3), rel=1e-4)


def test_when_an_update_is_due() -> None:
    online = OnlineEvidence(every=3, burn_in=2)
    assert [epoch for epoch in range(12) if online.is_due(epoch)] == [4, 7, 10]


def test_decays_go_to_their_layers_and_groups_stay() -> None:
    model = Line()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.3)
    decays = {("first.weight", "first.bias"): 0.1, ("norm.weight",): 0.2}
    set_weight_decay(optimizer, model, decays)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    expected = {"first.weight": 0.1, "first.bias": 0.1, "norm.weight": 0.2}
    assert found == dict.fromkeys(found, 0.3) | expected
    groups = list(optimizer.param_groups)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    set_weight_decay(optimizer, model, {names: 2 * decay for names, decay in decays.items()})
    assert [a is b for a, b in zip(groups, optimizer.param_groups, strict=True)] == [True] * 3
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.05] * 3


def test_kfac_goes_on_with_split_groups() -> None:
    """Splitting changes no number: the same decay in one group or in several."""

    def weights(split: bool) -> list[Tensor]:
        torch.manual_seed(1)
        model, x = Line(), torch.randn(8, 3)
        optimizer = KFAC(model, weight_decay=0.1, lr=0.01)
        for step in range(4):
            if split and step == 2:
                set_weight_decay(optimizer, model, {("first.weight", "first.bias"): 0.1, ("norm.bias",): 0.1})
            optimizer.zero_grad()
            with optimizer.capture():
                model(x).square().sum(1).mean().backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    for one, several in zip(weights(False), weights(True), strict=True):
        torch.testing.assert_close(one, several, rtol=1e-12, atol=1e-14)


def test_resumes_bit_for_bit() -> None:
    own, online = fitted(), OnlineEvidence(by="layer", steps=5, learn_noise=True)
    online.update(own)
    other = OnlineEvidence(by="layer", steps=5, learn_noise=True)
    other.load_state_dict(json.loads(json.dumps(online.state_dict())))
    assert other.weight_decays() == online.weight_decays()
    online.update(copy.copy(own))
    other.update(own)
    assert (other.prior_precision, other.noise) == (online.prior_precision, online.noise)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"prior_precision": 0.0}, r"prior_precision=0.0: allowed is a finite number > 0"),
        ({"prior_precision": {"a": -1.0}}, r"prior_precision=-1.0 of 'a'"),
        ({"every": 0}, r"every=0: allowed is a whole number of at least 1"),
        ({"steps": 1.5}, r"steps=1.5"),
        ({"burn_in": -1}, r"burn_in=-1"),
        ({"learning_rate": 0.0}, r"learning_rate=0.0"),
        ({"by": "group"}, r"by='group': allowed is one of \('model', 'layer'\)"),
        ({"by": "layer", "prior_precision": {"*": 1.0}}, r"by='layer' begins with one number"),
    ],
)
def test_bad_arguments(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        OnlineEvidence(**options)


def test_misuse() -> None:
    with pytest.raises(RuntimeError, match=r"no update yet: call update\(fit_factors"):
        OnlineEvidence().weight_decays()
    own = fit_factors(Line(), [(torch.randn(4, 3), torch.arange(4) % 2)], "softmax_cross_entropy")
    with pytest.raises(ValueError, match="learn_noise: softmax_cross_entropy has none"):
        OnlineEvidence(learn_noise=True).update(own)
    model = Line()
    for function in (
        lambda d: set_weight_decay(torch.optim.SGD(model.parameters()), model, d),
        lambda d: add_prior_gradient(model, d),
    ):
        with pytest.raises(ValueError, match=r"decays: 'third.weight' is no parameter of the model"):
            function({("third.weight",): 0.1})
