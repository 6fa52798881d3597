"""Penalties beside a use that is not recorded: the check of gradients tells them apart."""

from __future__ import annotations

import copy
import cProfile
import pstats
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from algoperf_kfac.pytorch import KFAC
from tests.pytorch.toys import assert_same_factors, capture_once, covered, reasons

D = 6
ONES = torch.ones(D, D)
PENALTIES: dict[str, Callable[[Tensor], Tensor]] = {
    "ridge": lambda w: w.square().sum(),
    "of a view": lambda w: w.t()[1:].flatten().pow(2).sum(),
    "orthogonality": lambda w: (w.t() @ w - torch.eye(D)).square().mean(),
    "orthogonality of a view": lambda w: (lambda m: m @ m.t() - torch.eye(D))(w.view(D, -1)).abs().sum(),
    "norms": lambda w: torch.stack(torch._foreach_norm([w, w.t()])).sum(),
    "distance": lambda w: F.mse_loss(w, ONES.to(w)) + torch.dist(w, ONES.to(w)),
    "nuclear norm": lambda w: torch.linalg.matrix_norm(w, "nuc"),
    "spectral norm": lambda w: torch.dot(ONES[0].to(w), w @ ONES[1].to(w)),
    "twice": lambda w: (w * w).sum() + (w / (1 + w.abs())).sum(),
    "strong": lambda w: 1e3 * w.square().sum(),
}


class Hidden(torch.autograd.Function):
    """A product that no function of torch shows, as those of fused kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, w = ctx.saved_tensors
        return grad @ w, grad.t() @ x


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))


@pytest.mark.parametrize("name", PENALTIES)
def test_a_use_that_nobody_sees_shows_beside_a_penalty(name: str) -> None:
    """And a layer without one is covered, with an error of rounding and the factors that it has without penalty."""
    model, x = network(), torch.randn(16, D)

    def loss(m: nn.Module) -> Tensor:
        fit = m(x).square().sum(1).mean()
        hidden = Hidden.apply(torch.tanh(x), m[2].weight)
        penalty = sum(PENALTIES[name](m[k].weight) for k in (0, 2))
        return fit + hidden.square().mean() + 1e-2 * penalty

    plain = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="layer 2 takes the fallback .* miss .* % of its gradient"):
        optimizer = capture_once(model, loss, learning_rate=0.0)
    assert covered(optimizer) == {"0"}
    assert optimizer.metrics()["0/gradient_error"] < 1e-6
    alone = capture_once(plain, lambda m: m(x).square().sum(1).mean(), learning_rate=0.0)
    assert_same_factors({"0": optimizer.factors()["0"]}, {"0": alone.factors()["0"]})


def test_a_view_that_the_layer_reads_too() -> None:
    """The gradient that comes to the view is the layer's and the penalty's; the latter alone is left out."""
    weight = nn.Parameter(torch.randn(D, D))

    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: Tensor) -> Tensor:
            turned = self.weight.t()
            return (x @ turned).square().sum(1).mean() + 0.1 * turned.square().sum()

    optimizer = capture_once(Viewed(), lambda m: m(torch.randn(9, D)))
    assert optimizer.coverage().fraction == 1
    assert optimizer.metrics()["weight/gradient_error"] < 1e-6


@pytest.mark.parametrize("loss", ["by hand", "mse_loss", "cross_entropy"])
def test_a_call_on_data_without_the_bias_is_no_penalty(loss: str) -> None:
    x, more, wanted = torch.randn(3, 8, D).unbind()
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        "by hand": lambda y: (y - wanted).square().mean(),
        "mse_loss": lambda y: F.mse_loss(y, wanted),
        "cross_entropy": lambda y: F.cross_entropy(y, torch.zeros(8, dtype=torch.long)),
    }
    model = nn.Sequential(nn.Linear(D, D))
    with pytest.warns(UserWarning, match="a call without its bias"):
        optimizer = capture_once(
            model, lambda m: F.mse_loss(m(x), wanted) + losses[loss](F.linear(more, m[0].weight))
        )
    assert not covered(optimizer)


L2: Callable[[nn.Module], Tensor] = lambda m: 1e-3 * sum(p.square().sum() for p in m.parameters())  # noqa: E731


def doubled(view: Tensor) -> Tensor:
    view.register_hook(lambda grad: 2 * grad)
    return view


# Where it is not seen what a penalty adds, weights are not compared, and layers stay.
UNSEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda w: torch.stack([row.norm() for row in w]).sum(),
    "some rows": lambda w: w.unbind()[1].square().sum() + w.chunk(3)[0].abs().sum() + w.split(2)[2].square().sum(),
    "a copy in place": lambda w: w.clone().sub_(1.0).pow_(2).sum(),
    "a product in place": lambda w: (w * 2).add_(w).square().sum(),
    "a hook on a view": lambda w: doubled(w.view(-1)).square().sum(),
    "a flat copy in place": lambda w: w.clone().view(-1).mul_(2).square().sum(),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_a_penalty_whose_gradient_is_not_seen(name: str) -> None:
    model, x = network(), torch.randn(16, D)
    optimizer = capture_once(
        model, lambda m: m(x).square().sum(1).mean() + sum(UNSEEN[name](m[k].weight) for k in (0, 2))
    )
    assert covered(optimizer) == {"0", "2"}


class Language(nn.Module):
    """A tied table, whose layer is found at the end of the first capture."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body = nn.Embedding(7, D), nn.Linear(D, D)
        self.head = nn.Linear(D, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.table(ids))))


def test_a_penalty_on_a_tied_table() -> None:
    ids = torch.randint(7, (5, 4))
    optimizer = capture_once(Language(), lambda m: F.cross_entropy(m(ids).flatten(0, 1), ids.flatten()) + L2(m))
    assert optimizer.coverage().fraction == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_penalty_beside_checkpoints(reentrant: bool) -> None:
    """Where these run their layers again after the penalty's gradient has come."""
    model, x = network(), torch.randn(8, D, requires_grad=True)
    optimizer = capture_once(
        model, lambda m: checkpoint(m, x, use_reentrant=reentrant).square().sum(1).mean() + L2(m)
    )
    assert covered(optimizer) == {"0", "2"}
    assert optimizer.metrics()["0/gradient_error"] < 1e-5


def test_a_penalty_that_goes_backward_first() -> None:
    model, x = network(), torch.randn(8, D)
    optimizer = KFAC(model)
    with optimizer.capture():
        L2(model).backward()
        model(x).square().sum(1).mean().backward()
    optimizer.step()
    assert covered(optimizer) == {"0", "2"}
    assert optimizer.metrics()["2/gradient_error"] < 1e-5


class Tied(nn.Module):
    """A decoder that reads its encoder's kernel as another matrix."""

    def __init__(self, encoder: nn.Module, decode: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.encoder, self.decode = encoder, decode

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(torch.tanh(self.encoder(x)), self.encoder.weight)


TIED: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor, Tensor], Tensor]]] = {
    "conv_transpose": (lambda: nn.Conv2d(4, 4, 3, padding=1), lambda h, w: F.conv_transpose2d(h, w, padding=1)),
    "conv": (lambda: nn.ConvTranspose2d(4, 4, 3, padding=1), lambda h, w: F.conv2d(h, w, padding=1)),
    "other groups": (
        lambda: nn.Conv2d(4, 2, 1, groups=2),
        lambda h, w: F.conv2d(torch.cat([h, h], 1)[:, :2], w),
    ),
}


@pytest.mark.parametrize("name", TIED)
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_one_weight_as_two_matrices(name: str, approximation: str) -> None:
    """Also where the shapes would fit, with a penalty besides."""
    encoder, decode = TIED[name]
    model = Tied(encoder(), decode)
    x = torch.randn(5, 4, 6, 6)

    def loss(m: nn.Module) -> Tensor:
        return m(x).square().mean() + 1e-4 * sum(p.square().sum() for p in m.parameters())

    with pytest.warns(UserWarning, match="encoder takes the fallback .* also read by conv"):
        optimizer = capture_once(model, loss, approximation=approximation)
    assert "also read by conv" in reasons(optimizer)["encoder.weight"]


def test_a_raw_weight_in_two_shapes() -> None:
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, D))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight).sum(1) + F.linear(x[:, :4], self.weight.view(D, 4)).sum(1)

    with pytest.warns(UserWarning, match="also read by linear"):
        optimizer = capture_once(Raw(), lambda m: m(torch.randn(7, D)).square().mean())
    assert not covered(optimizer)


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_work_grows_with_the_calls_and_no_faster(approximation: str) -> None:
    """A cell called many times in one pass: functions of Python called, which no machine's speed changes."""
    cell = nn.Linear(3, 3)
    counts = []
    for calls in (100, 400):
        optimizer = KFAC(cell, approximation=approximation, factor_interval=1)
        h = torch.randn(2, 3)
        profile = cProfile.Profile()
        with optimizer.capture():
            profile.enable()
            for _ in range(calls):
                h = torch.tanh(cell(h))
            h.square().sum(1).mean().backward()
            profile.disable()
        counts.append(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]
    assert counts[1] < 4.4 * counts[0]
