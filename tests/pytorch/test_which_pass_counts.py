"""Several passes in one capture: the statistics are those of the gradients that the step finds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algoperf_kfac.pytorch import KFAC
from tests.pytorch.toys import assert_same_factors, assert_same_parameters, mlp

N, STEPS = 16, 3
APPROXIMATIONS = pytest.mark.parametrize("approximation", ["expand", "reduce"])
Batch = tuple[Tensor, Tensor]
Pass = Callable[[nn.Module, Batch], None]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def plain(model: nn.Module, batch: Batch) -> None:
    loss(model, batch).backward()


def gradient_noise_before(model: nn.Module, batch: Batch) -> None:
    torch.autograd.grad(model(batch[0])[:, 0].mean(), list(model.parameters()))
    plain(model, batch)


def gradient_noise_after(model: nn.Module, batch: Batch) -> None:
    plain(model, batch)
    torch.autograd.grad(model(batch[0])[:, 0].mean(), list(model.parameters()))


def trace_of_the_fisher(model: nn.Module, batch: Batch) -> None:
    for i in range(2):
        torch.autograd.grad(loss(model, (batch[0][i : i + 1], batch[1][i : i + 1])), list(model.parameters()))
    plain(model, batch)


def of_one_weight(model: nn.Module, batch: Batch) -> None:
    torch.autograd.grad(loss(model, batch), [model[2].weight])
    plain(model, batch)


def between_forward_and_backward(model: nn.Module, batch: Batch) -> None:
    value = loss(model, batch)
    torch.autograd.grad(model(batch[0][:4])[:, 0].mean(), list(model.parameters()))
    value.backward()


def adaptive_weights(model: nn.Module, batch: Batch) -> None:
    """Two losses of one forward pass, weighed by their gradients for the last layer (Esser et al. 2021)."""
    outputs, last = model(batch[0]), model[2].weight
    parts = F.cross_entropy(outputs, batch[1]), outputs.square().mean()
    norms = [torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in parts]
    (parts[0] + 0 * (norms[0] / norms[1]) * parts[1]).backward()


@APPROXIMATIONS
@pytest.mark.parametrize(
    "run",
    [
        gradient_noise_before,
        gradient_noise_after,
        trace_of_the_fisher,
        of_one_weight,
        between_forward_and_backward,
        adaptive_weights,
    ],
)
def test_gradients_to_look_at_leave_no_trace(run: Pass, approximation: str) -> None:
    trained(run, plain, approximation)


def taken_by_hand(model: nn.Module, batch: Batch) -> None:
    params = list(model.parameters())
    for p, grad in zip(params, torch.autograd.grad(loss(model, batch), params), strict=True):
        p.grad = grad


def taken_by_hand_and_graph_kept(model: nn.Module, batch: Batch) -> None:
    params = list(model.parameters())
    grads = torch.autograd.grad(loss(model, batch), params, retain_graph=True)
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad


@APPROXIMATIONS
@pytest.mark.parametrize("run", [taken_by_hand, taken_by_hand_and_graph_kept])
def test_gradients_that_are_all_there_is_count(run: Pass, approximation: str) -> None:
    trained(run, plain, approximation)


def test_two_gradients_of_one_forward_pass_are_refused_where_neither_is_the_step_s() -> None:
    model = mlp(6, 8, 3)
    optimizer = KFAC(model)

    def run() -> None:
        with optimizer.capture():
            outputs, params = model(torch.randn(N, 6)), list(model.parameters())
            for part in (outputs[:, 0].mean(), outputs[:, 1].mean()):
                torch.autograd.grad(part, params, retain_graph=True)

    with pytest.raises(RuntimeError, match="two gradients for one call"):
        run()


def two_passes(between: Callable[[nn.Module, Batch], object]) -> Pass:
    def run(model: nn.Module, batch: Batch) -> None:
        first, second = loss(model, batch), loss(model, (batch[0].flip(0) + 1, batch[1]))
        first.backward()
        between(model, batch)
        second.backward()

    return run


def evaluated(model: nn.Module, batch: Batch) -> None:
    with torch.no_grad():
        model(batch[0][:4])


@APPROXIMATIONS
def test_an_evaluation_between_two_backward_passes_changes_nothing(approximation: str) -> None:
    trained(two_passes(evaluated), two_passes(lambda model, batch: None), approximation)


@APPROXIMATIONS
def test_passes_in_a_capture_of_another_optimizer_count(approximation: str) -> None:
    """Two optimizers that share the layers below: the inner capture hears of the first backward pass alone."""
    torch.manual_seed(0)
    x, y = torch.randn(N, 6, dtype=torch.float64), torch.randint(3, (N,))
    factors = []
    for nested in (True, False):
        torch.manual_seed(0)
        body, head = mlp(6, 8, 8).double(), nn.Linear(8, 3).double()
        outer = KFAC(body, approximation=approximation, learning_rate=0.0)
        inner = KFAC(head, approximation=approximation, learning_rate=0.0)
        with outer.capture(loss_normalizer=N):
            if nested:
                with inner.capture():
                    F.cross_entropy(head(body(x)), y).backward()
            else:
                F.cross_entropy(head(body(x)), y).backward()
            F.cross_entropy(head(body(x + 1)), y).backward()
        outer.step()
        factors.append(outer.factors())
    assert_same_factors(*factors)


def trained(run: Pass, other: Pass, approximation: str) -> None:
    """Train with one and with the other: the factors, and what they come to, are the same."""
    found = []
    for how in (run, other):
        torch.manual_seed(0)
        model = mlp(6, 8, 3).double()
        optimizer = KFAC(model, approximation=approximation, learning_rate=1e-2, factor_interval=1)
        for _ in range(STEPS):
            batch = torch.randn(N, 6, dtype=torch.float64), torch.randint(3, (N,))
            optimizer.zero_grad()
            with optimizer.capture(loss_normalizer=N):
                how(model, batch)
            optimizer.step()
        assert optimizer.coverage().fraction == 1
        found.append((model, optimizer))
    (model, optimizer), (twin, its) = found
    assert_same_factors(optimizer.factors(), its.factors())
    assert_same_parameters(model, twin, rtol=1e-9, atol=1e-12)
