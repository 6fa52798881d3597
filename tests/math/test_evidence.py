"""The evidence against dense log determinants, densities of torch.distributions, automatic differentiation, the
exact Gauss-Newton matrix and the marginal likelihood of a linear model, which is known."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Laplace, MultivariateNormal, Normal
from torch.func import functional_call, jacrev

from algoperf_kfac.evidence import Fitted, evidence, per_layer
from algoperf_kfac.online import OnlineEvidence
from algoperf_kfac.pytorch import KFAC
from algoperf_kfac.pytorch.evidence import factors_of, fit_factors
from benchmarks.paper import ggn as oracle
from tests.math.support import fisher_factors

APPROXIMATIONS = ("expand", "reduce")
# By loss: the distribution of labels given outputs, its noise, and Fisher's matrix over that of the library's loss.
DISTRIBUTIONS = {
    "softmax_cross_entropy": (lambda f: Categorical(logits=f), 1.0, 1.0),
    "sigmoid_cross_entropy": (lambda f: Bernoulli(logits=f), 1.0, 1.0),
    "mean_squared_error": (lambda f: Normal(f, 0.7), 0.7, 1 / (2 * 0.7**2)),
    "mean_absolute_error": (lambda f: Laplace(f, 0.7), 0.7, 1 / 0.7**2),
}


class Mixed(nn.Module):
    """Grouped convolutions, a norm, a linear layer over positions, average pooling, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, groups=2)
        self.norm = nn.GroupNorm(2, 4)
        self.mix = nn.Linear(4, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).tanh().flatten(2).transpose(1, 2)
        return self.head(self.mix(x).tanh().mean(1))


def labels_for(loss: str, count: int, outputs: int = 3) -> Tensor:
    if loss == "softmax_cross_entropy":
        return torch.arange(count) % outputs
    y = torch.randn(count, outputs)
    return (y > 0).double() if loss == "sigmoid_cross_entropy" else y


def single(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Batches of one example, where the diagonal is exact."""
    return list(zip(x.split(1), y.split(1), strict=True))


def diagonal(model: nn.Module, x: Tensor, loss: str, name: str) -> Tensor:
    """The diagonal of the exact Gauss-Newton matrix of a parameter."""
    params = {k: p.detach() for k, p in model.named_parameters()}

    def outputs(p: Tensor, x: Tensor) -> Tensor:
        return functional_call(model, params | {name: p}, (x,))

    total = torch.zeros(params[name].numel())
    for one in x.split(1):
        j = jacrev(outputs)(params[name], one).flatten(1).reshape(-1, params[name].numel())
        f = outputs(params[name], one)
        h = torch.func.hessian(oracle.LOSSES[loss])(f).reshape(f.numel(), f.numel())
        total += torch.einsum("mp,mn,np->p", j, h, j)
    return total


def dense(
    model: nn.Module, blocks: dict[str, tuple[Tensor, Tensor]], log_likelihood: Tensor, deltas: dict[str, Tensor]
) -> Tensor:
    """The evidence with every 2 pi and a dense determinant.

    Args:
        model: the model.
        blocks: by name: its weights and its dense curvature.
        log_likelihood: of the data.
        deltas: of the same blocks.
    """
    total = log_likelihood
    for name, (weights, h) in blocks.items():
        prior = Normal(0.0, deltas[name] ** -0.5).log_prob(weights).sum()
        posterior = h + deltas[name] * torch.eye(len(h))
        total = total + prior + 0.5 * len(h) * math.log(2 * math.pi) - 0.5 * torch.linalg.slogdet(posterior)[1]
    return total


def joined(factor: Tensor | tuple[Tensor, ...]) -> Tensor:
    """(groups, P, P) of a factor from its diagonal blocks."""
    blocks = [m if m.dim() == 3 else m[None] for m in (factor if isinstance(factor, tuple) else (factor,))]
    return torch.stack([torch.block_diag(*of_group) for of_group in zip(*blocks, strict=True)])


def dense_blocks(
    model: nn.Module, x: Tensor, loss: str, scale: float, approximation: str, **config: Any
) -> dict[str, tuple[Tensor, Tensor]]:
    """Weights and curvature of a model: Kronecker products of its factors, and exact diagonals."""
    pairs = fisher_factors(model, x, loss, approximation, reduction="sum", **config)
    blocks = {}
    for name, pair in pairs.items():
        layer = model.get_submodule(name)
        own = oracle.rows(layer, layer.weight.detach(), layer.bias.detach()).flatten()
        a, b = map(joined, pair)
        blocks[name] = own, scale * torch.block_diag(*oracle.kfac_blocks(a, b))
    covered = {f"{name}.{kind}" for name in pairs for kind in ("weight", "bias")}
    for name, p in model.named_parameters():
        if name not in covered:
            blocks[name] = p.detach().flatten(), scale * torch.diag(diagonal(model, x, loss, name))
    return blocks


@pytest.mark.parametrize("loss", DISTRIBUTIONS)
@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_dense(loss: str, approximation: str) -> None:
    """Value to 1e-8, gradient to 1e-6; groups, a bias column, a norm's diagonal, each layer's own precision."""
    model, x, y = Mixed(), torch.randn(7, 2, 4, 4), labels_for(loss, 7)
    fitted = fit_factors(model, single(x, y), loss, approximation=approximation)
    deltas = per_layer(fitted)
    deltas = {key: 0.3 * 1.7**i for i, key in enumerate(deltas)}
    distribution, noise, scale = DISTRIBUTIONS[loss]
    found = evidence(fitted, deltas, noise=noise)

    blocks = dense_blocks(model, x, loss, scale, approximation)
    names = {name: name if name in deltas else f"{name}.weight" for name in blocks}
    logs = {name: torch.tensor(math.log(deltas[names[name]]), requires_grad=True) for name in blocks}
    log_likelihood = distribution(model(x).detach()).log_prob(y).sum()
    value = dense(model, blocks, log_likelihood, {name: log.exp() for name, log in logs.items()})
    value.backward()

    assert found.value == pytest.approx(value.item(), rel=1e-8)
    assert found.log_likelihood == pytest.approx(float(log_likelihood), rel=1e-12)
    assert found.gradient == pytest.approx({names[n]: float(log.grad) for n, log in logs.items()}, rel=1e-6)
    assert found.diagonal == ("norm.weight", "norm.bias")
    assert found.left_out == {}
    assert [part.kind for part in found.parts] == ["kronecker"] * 3 + ["diagonal"] * 2


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_blocks_of_large_factors(approximation: str) -> None:
    model, x, y = Mixed(), torch.randn(5, 2, 4, 4), labels_for("softmax_cross_entropy", 5)
    fitted = fit_factors(
        model, single(x, y), "softmax_cross_entropy", approximation=approximation, max_factor_dim=4
    )
    blocks = dense_blocks(model, x, "softmax_cross_entropy", 1.0, approximation, max_factor_dim=4)
    log_likelihood = Categorical(logits=model(x).detach()).log_prob(y).sum()
    value = dense(model, blocks, log_likelihood, dict.fromkeys(blocks, torch.tensor(0.2)))
    assert evidence(fitted, 0.2).value == pytest.approx(value.item(), rel=1e-8)


@pytest.mark.parametrize("noise", [0.3, 1.4])
def test_a_linear_model_has_its_marginal_likelihood(noise: float) -> None:
    """Laplace's approximation is exact, and so are A and B, at the most probable weights:
    y ~ N(0, X X^T / delta + s^2 I)."""
    delta, x, y = 0.8, torch.randn(9, 4), torch.randn(9, 2)
    model = nn.Linear(4, 2)
    ones = torch.cat([x, torch.ones(9, 1)], 1)
    best = torch.linalg.solve(ones.T @ ones + noise**2 * delta * torch.eye(5), ones.T @ y).T
    with torch.no_grad():
        model.weight.copy_(best[:, :4])
        model.bias.copy_(best[:, 4])
    fitted = fit_factors(model, [(x[:6], y[:6]), (x[6:], y[6:])], "mean_squared_error")
    found = evidence(fitted, delta, noise=noise)
    marginal = MultivariateNormal(torch.zeros(9), ones @ ones.T / delta + noise**2 * torch.eye(9))
    assert found.value == pytest.approx(float(marginal.log_prob(y.T).sum()), rel=1e-10)


@pytest.mark.parametrize("loss", DISTRIBUTIONS)
def test_one_example_without_positions_is_exact(loss: str) -> None:
    """N = 1 and R = 1: both approximations are the exact Gauss-Newton blocks."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    x, y = torch.randn(1, 3), labels_for(loss, 1)
    distribution, noise, scale = DISTRIBUTIONS[loss]
    blocks = {}
    for name in ("0", "2"):
        layer = model.get_submodule(name)
        own = oracle.rows(layer, layer.weight.detach(), layer.bias.detach()).flatten()
        blocks[name] = own, scale * oracle.ggn_blocks(model, x, loss, name)[0]
    log_likelihood = distribution(model(x).detach()).log_prob(y).sum()
    value = float(dense(model, blocks, log_likelihood, dict.fromkeys(blocks, torch.tensor(0.5))))
    for approximation in APPROXIMATIONS:
        fitted = fit_factors(model, [(x, y)], loss, approximation=approximation)
        assert evidence(fitted, 0.5, noise=noise).value == pytest.approx(value, rel=1e-8)


def test_without_positions_both_agree() -> None:
    """R = 1, any N; with positions they do not."""
    y = labels_for("softmax_cross_entropy", 8)

    def values(model: nn.Module, x: Tensor) -> list[float]:
        fits = [fit_factors(model, [(x, y)], "softmax_cross_entropy", approximation=a) for a in APPROXIMATIONS]
        return [evidence(fitted, 0.5).value for fitted in fits]

    expand, reduce = values(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(8, 3))
    assert expand == pytest.approx(reduce, rel=1e-12)
    expand, reduce = values(Mixed(), torch.randn(8, 2, 4, 4))
    assert abs(expand - reduce) > 0.1


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_ragged_and_padded_batches_weigh_what_they_have(approximation: str) -> None:
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))
    x, y = torch.randn(10, 2, 5), labels_for("softmax_cross_entropy", 10)
    padding = torch.cat([x[8:], torch.full((2, 2, 5), 7.0)]), torch.cat([y[8:], y[:2]]), torch.tensor([1, 1, 0, 0])

    def fit(loader: Any, **options: Any) -> Fitted:
        return fit_factors(model, loader, "softmax_cross_entropy", approximation=approximation, **options)

    whole = evidence(fit([(x, y)]), 0.4)
    ragged = evidence(fit([(x[:4], y[:4]), (x[4:8], y[4:8]), (x[8:], y[8:])]), 0.4)
    ones = torch.ones(4)
    padded = evidence(fit([(x[:4], y[:4], ones), (x[4:8], y[4:8], ones), padding]), 0.4)
    assert ragged.value == pytest.approx(whole.value, rel=1e-12)
    assert padded.value == pytest.approx(whole.value, rel=1e-12)
    assert ragged.num_examples == padded.num_examples == 10
    # Half of the data, told of the whole: twice the same.
    half = evidence(fit([(x[:5], y[:5])], num_examples=10), 0.4)
    twice = evidence(fit([(x[:5], y[:5])] * 2), 0.4)
    assert half.value == pytest.approx(twice.value, rel=1e-12)


def test_sampled_factors_are_the_exact_ones_in_the_mean() -> None:
    model, x, y = Mixed(), torch.randn(6, 2, 4, 4), labels_for("softmax_cross_entropy", 6)
    exact = fit_factors(model, single(x, y), "softmax_cross_entropy")
    sampled = fit_factors(model, [(x, y)], "softmax_cross_entropy", fisher="mc", fisher_samples=3000)
    one, other = evidence(exact, 0.5), evidence(sampled, 0.5)
    assert [p.effective for p in other.parts] == pytest.approx([p.effective for p in one.parts], rel=0.05)
    assert other.value == pytest.approx(one.value, abs=0.1)
    assert other.source == "K-FAC-expand, sampled Fisher, 3000 per example, 1 batches of the loader"


def test_diagonals_of_batches_are_without_bias() -> None:
    """Random signs: the mean over seeds of a batch's diagonal is the exact one."""
    model, x, y = Mixed(), torch.randn(6, 2, 4, 4), labels_for("mean_squared_error", 6)
    exact = diagonal(model, x, "mean_squared_error", "norm.weight")
    draws = [
        next(
            b for b in fit_factors(model, [(x, y)], "mean_squared_error", seed=seed).blocks if b.kind == "diagonal"
        )
        for seed in range(200)
    ]
    mean = torch.stack([block.spectrum.a[0] for block in draws]).mean(0)
    assert draws[0].name == "norm.weight"
    torch.testing.assert_close(mean, exact, rtol=0.15, atol=0.0)


@pytest.mark.parametrize("loss", DISTRIBUTIONS)
def test_gradients_are_differences_of_the_value(loss: str) -> None:
    fitted = fit_factors(Mixed(), [(torch.randn(6, 2, 4, 4), labels_for(loss, 6))], loss)
    step, noise = 1e-4, DISTRIBUTIONS[loss][1]

    def slope(of_delta: float, of_noise: float) -> float:
        up, down = (
            evidence(fitted, 0.6 * math.exp(s * of_delta), noise=noise * math.exp(s * of_noise)).value
            for s in (step, -step)
        )
        return (up - down) / (2 * step)

    found = evidence(fitted, 0.6, noise=noise)
    assert found.gradient["*"] == pytest.approx(slope(1, 0), rel=1e-6)
    if noise == 1:
        assert found.gradient_log_noise is None
    else:
        assert found.gradient_log_noise == pytest.approx(slope(0, 1), rel=1e-6)


def test_patterns_share_a_precision() -> None:
    """The gradient of a shared precision is the sum of those apart; "*" takes what is left."""
    model, x, y = Mixed(), torch.randn(6, 2, 4, 4), labels_for("softmax_cross_entropy", 6)
    fitted = fit_factors(model, [(x, y)], "softmax_cross_entropy")
    apart = evidence(fitted, per_layer(fitted, 0.5)).gradient
    shared = evidence(fitted, {"conv": 0.5, "norm.*": 0.5, "*": 0.5})
    assert shared.gradient["norm.*"] == pytest.approx(apart["norm.weight"] + apart["norm.bias"])
    assert shared.gradient["*"] == pytest.approx(apart["mix.weight"] + apart["head.weight"])
    assert sum(shared.gradient.values()) == pytest.approx(evidence(fitted, 0.5).gradient["*"])
    assert shared.value == pytest.approx(evidence(fitted, 0.5).value)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 3)
        self.mix = nn.Linear(3, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.mix(self.table(tokens)).tanh(), self.table.weight)


def test_a_tied_table_is_its_factor_for_every_token() -> None:
    model, tokens = Tied(), torch.randint(6, (4, 5))
    y = torch.randint(6, (4, 5))
    fitted = fit_factors(model, [(tokens, y)], "softmax_cross_entropy")
    table = next(part for part in evidence(fitted, 0.3).parts if part.name == "table")
    x = fisher_factors(model, tokens, "softmax_cross_entropy", "expand")["table"].A
    h = torch.kron(torch.eye(6), x)
    assert table.size == 18
    assert table.log_det == pytest.approx(float(torch.logdet(h + 0.3 * torch.eye(18))), rel=1e-10)


def test_factors_of_an_optimizer() -> None:
    """One step on all of the data: the same factors; what has none is left out, the source says whose they are."""
    model, x, y = Mixed(), torch.randn(6, 2, 4, 4), labels_for("softmax_cross_entropy", 6)
    optimizer = KFAC(model, fisher="exact", learning_rate=0.0)
    with optimizer.capture() as capture:
        outputs = model(x)
        capture.backward_fisher(outputs, "softmax_cross_entropy")
    optimizer.step()
    loss = float(F.cross_entropy(outputs, y, reduction="sum"))
    fitted = factors_of(optimizer, model, "softmax_cross_entropy", summed_loss=loss, num_examples=6)
    found = evidence(fitted, 0.5)
    whole = evidence(fit_factors(model, [(x, y)], "softmax_cross_entropy"), 0.5)
    assert [p.log_det for p in found.parts] == pytest.approx([p.log_det for p in whole.parts[:3]], rel=1e-12)
    assert found.log_likelihood == pytest.approx(whole.log_likelihood)
    assert set(found.left_out) == {"norm.weight", "norm.bias"}
    assert "moving averages of the optimizer, fisher='exact'" in str(found)


def test_a_fit_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3))
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    x, y = torch.randn(8, 3), labels_for("softmax_cross_entropy", 8)
    with torch.no_grad():
        first, second = (fit_factors(model, [(x, y)], "softmax_cross_entropy") for _ in range(2))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert evidence(first).value == evidence(second).value  # no dropout, and signs of the same seed


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize("loss", ["softmax_cross_entropy", "mean_squared_error"])
def test_laplace_torch(loss: str, approximation: str) -> None:
    """Value, gradient and the chosen precision beside those of laplace-torch, where it is installed.

    Without biases: it takes them as blocks of their own, here they are a column of their layer. With a last batch
    that is smaller.
    """
    laplace = pytest.importorskip("laplace", reason="laplace-torch is not installed")
    backend = importlib.import_module("laplace.curvature.curvlinops").CurvlinopsGGN
    model = nn.Sequential(
        *(nn.Conv2d(2, 4, 3, bias=False), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(4, 3, bias=False),
    )
    x, y = torch.randn(20, 2, 5, 5), labels_for(loss, 20)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
    kind, noise = ("classification", 1.0) if loss == "softmax_cross_entropy" else ("regression", 0.7)
    theirs = laplace.Laplace(
        *(model, kind, "all", "kron"), backend=backend, asdl_fisher_kwargs={"kfac_approx": approximation}
    )
    theirs.fit(data)
    options = {} if kind == "classification" else {"sigma_noise": torch.tensor(noise)}

    def of_theirs(log_delta: float) -> tuple[float, float]:
        log = torch.tensor([log_delta], requires_grad=True)
        value = theirs.log_marginal_likelihood(log.exp(), **options)
        value.backward()
        return value.item(), log.grad.item()

    fitted = fit_factors(model, data, loss, approximation=approximation)
    for log_delta in (-2.0, 0.0, 3.0):
        value, gradient = of_theirs(log_delta)
        found = evidence(fitted, math.exp(log_delta), noise=noise)
        assert found.value == pytest.approx(value, rel=1e-8)
        assert found.gradient["*"] == pytest.approx(gradient, rel=1e-6)
    online = OnlineEvidence(steps=1500, learning_rate=0.01, noise=noise)
    online.update(fitted)
    value, gradient = of_theirs(math.log(online.prior_precision))
    assert abs(gradient) < 1e-3
    assert value > max(of_theirs(math.log(online.prior_precision) + s)[0] for s in (-0.1, 0.1))
