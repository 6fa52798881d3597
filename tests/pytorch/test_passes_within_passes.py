"""Backward passes that run others, and several in one capture of which not all count."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algoperf_kfac.pytorch import KFAC
from tests.pytorch.toys import assert_same_factors, covered, factors_of, mlp, vectors

APPROXIMATIONS = ["expand", "reduce"]
N, ITERATIONS = 12, 60


class Equilibrium(nn.Module):
    """z = tanh(W z + U x): found without gradients, one call with them, and a hook that solves for the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.cell, self.head = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        nn.init.normal_(self.cell.weight, std=0.1)

    def once(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.cell(z) + x)

    def solve(self, x: Tensor) -> Tensor:
        z = torch.zeros(len(x), 5, dtype=x.dtype)
        for _ in range(ITERATIONS):
            z = self.once(z, x)
        return z

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        with torch.no_grad():
            z = self.solve(x)
        z = self.once(z, x)
        at = z.detach().requires_grad_()
        again = self.once(at, x)

        def solved(grad: Tensor) -> Tensor:
            total = grad
            for _ in range(ITERATIONS):
                total = torch.autograd.grad(again, at, total, retain_graph=True)[0] + grad
            return total

        z.register_hook(solved)
        return self.head(z)


@pytest.mark.parametrize("attacked", [False, True], ids=["", "attacked"])
def test_an_equilibrium_has_the_factors_of_its_implicit_gradient(attacked: bool) -> None:
    """One call counts; not the one that the hook differentiates by its input, nor an attack through both."""
    model, (x, y) = Equilibrium().double(), vectors(N, 6)
    x = x.double()
    optimizer = KFAC(model, learning_rate=0.0)
    with optimizer.capture():
        if attacked:
            inputs = x.clone().requires_grad_()
            torch.autograd.grad(F.cross_entropy(model(inputs), y), inputs)
        F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert covered(optimizer) == {"enter", "cell", "head"}
    with torch.no_grad():
        z = model.solve(model.enter(x))
        error = model.head(z).softmax(-1) - F.one_hot(y, 3)
        slope = 1 - z**2
        # dz = (1 - D W)^-1 D d(W z + U x), D = diag(slope), of each example
        inverse = torch.linalg.inv(torch.eye(5) - slope[:, :, None] * model.cell.weight)
        grads = torch.einsum("no,oi,nij,nj->nj", error, model.head.weight, inverse, slope)
        ones = torch.cat([z, torch.ones(N, 1)], 1)
    torch.testing.assert_close(model.cell.weight.grad, grads.T @ z / N, rtol=1e-8, atol=1e-12)
    pair = optimizer.factors()["cell"]
    torch.testing.assert_close(pair.A, ones.T @ ones / N, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(pair.B, grads.T @ grads, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_an_attack_that_shares_the_forward_pass(approximation: str) -> None:
    """The gradient by the inputs first, and that of the loss through the same calls, or through more of them."""
    model, (x, y) = mlp(6, 8, 3).double(), vectors(N, 6)
    x = x.double().requires_grad_()

    def loss(m: nn.Module, attack: bool) -> Tensor:
        outputs, others = m(x), m(2 * x.detach())
        if attack:
            torch.autograd.grad(F.cross_entropy(outputs, y), x, retain_graph=True)
        return F.cross_entropy(outputs, y) + F.cross_entropy(others, y)

    got = factors_of(model, lambda m: loss(m, True), approximation=approximation)
    assert_same_factors(got, factors_of(model, lambda m: loss(m, False), approximation=approximation))


class Reversible(torch.autograd.Function):
    """y = (a + f(b), b + g(a + f(b))): keeps its outputs, and runs f and g again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: nn.Module, g: nn.Module, *_: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        first = a + f(b)
        second = b + g(first)
        ctx.f, ctx.g = f, g
        ctx.save_for_backward(first, second)
        return torch.cat([first, second], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        first, second = ctx.saved_tensors
        of_first, of_second = grad.chunk(2, -1)
        more, from_g, through_g = _again(ctx.g, first, of_second)
        of_first = of_first + more
        more, from_f, _ = _again(ctx.f, second - through_g, of_first)
        return torch.cat([of_first, of_second + more], -1), None, None, *from_f, *from_g


def _again(module: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = module(x)
        of_x, *of_weights = torch.autograd.grad(y, [x, *module.parameters()], grad)
    return of_x, of_weights, y.detach()


class Halves(nn.Module):
    def __init__(self, *, forgets: bool) -> None:
        super().__init__()
        self.forgets = forgets
        self.enter, self.f, self.g, self.head = nn.Linear(6, 8), mlp(4, 5, 4), mlp(4, 5, 4), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for _ in range(2):
            if self.forgets:
                x = Reversible.apply(x, self.f, self.g, *self.f.parameters(), *self.g.parameters())
            else:
                a, b = x.chunk(2, -1)
                first = a + self.f(b)
                x = torch.cat([first, b + self.g(first)], -1)
        return self.head(x)


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_a_reversible_network_has_the_factors_of_the_plain_one(
    approximation: str, recwarn: pytest.WarningsRecorder
) -> None:
    """Its functions take gradients of weights themselves and return them: these are not the weights' twice."""
    torch.manual_seed(0)
    forgets = Halves(forgets=True).double()
    plain = copy.deepcopy(forgets)
    plain.forgets = False
    x, y = torch.randn(N, 5, 6).double(), torch.randint(3, (N,))
    loss = lambda m: F.cross_entropy(m(x).mean(1), y)  # noqa: E731
    want = factors_of(plain, loss, approximation=approximation)
    assert_same_factors(factors_of(forgets, loss, approximation=approximation), want)
    assert not [w for w in recwarn if "K-FAC" in str(w.message)]


@pytest.mark.parametrize(
    "clear",
    [
        lambda model, optimizer: optimizer.zero_grad(),
        lambda model, optimizer: model.zero_grad(set_to_none=False),
    ],
    ids=["to None", "to zero"],
)
@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_gradients_that_are_cleared_within_a_capture(
    approximation: str, clear: Callable[[nn.Module, KFAC], None]
) -> None:
    """Sharpness-aware minimisation: the first pass says where to look, the second one is what counts."""
    model, (x, y) = mlp(6, 8, 3).double(), vectors(N, 6)
    x = x.double()
    factors = []
    for passes in (2, 1):
        optimizer = KFAC(model, learning_rate=0.0, approximation=approximation)
        optimizer.zero_grad()
        with optimizer.capture():
            if passes == 2:
                F.cross_entropy(model(3 * x), y).backward()
                clear(model, optimizer)
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
        factors.append(optimizer.factors())
    assert_same_factors(*factors)
    assert max(optimizer.metrics()[f"{name}/gradient_error"] for name in factors[0]) < 1e-12
