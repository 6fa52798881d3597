"""Captures that other implementations get wrong in silence: in-place operations, repeated calls, stray passes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from algoperf_kfac.pytorch import KFAC, MissingStatisticsError
from tests.pytorch.toys import (
    assert_finite,
    assert_same_factors,
    assert_same_parameters,
    capture_once,
    factors_of,
    mlp,
    vectors,
)

APPROXIMATIONS = ["expand", "reduce"]


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize(
    ("in_place", "out_of_place"),
    [
        (torch.relu_, torch.relu),
        (lambda h: F.dropout(h, 0.5, inplace=True), lambda h: F.dropout(h, 0.5)),
        (lambda h: h.mul_(2).add_(1), lambda h: h * 2 + 1),
    ],
    ids=["relu_", "dropout", "arithmetic"],
)
@pytest.mark.parametrize("shape", [(6, 4), (3, 2, 4), (3, 2, 2, 4)], ids=["2d", "3d", "4d"])
def test_in_place_operation_after_a_linear(
    in_place: Callable[[Tensor], Tensor],
    out_of_place: Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
    approximation: str,
) -> None:
    """The output of a Linear with three dimensions is a view: an in-place operation drops the hooks on it."""
    model, x = mlp(4, 5, 2), torch.randn(shape)

    def loss(act: Callable[[Tensor], Tensor]) -> Callable[[nn.Module], Tensor]:
        def run(m: nn.Module) -> Tensor:
            torch.manual_seed(1)  # the same dropout
            return m[2](act(m[0](x))).square().sum(-1).mean()

        return run

    got = factors_of(model, loss(in_place), approximation=approximation)
    want = factors_of(model, loss(out_of_place), approximation=approximation)
    assert_same_factors(got, want)
    assert want["0"].B.norm() > 0


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_capture_does_not_change_the_gradients(approximation: str) -> None:
    model, (x, y) = mlp(5, 4, 3, activation=lambda: nn.ReLU(inplace=True)), vectors()
    x = x.reshape(4, 4, 5)
    twin = copy.deepcopy(model)
    F.cross_entropy(twin(x).flatten(0, 1), y).backward()
    with KFAC(model, approximation=approximation).capture():
        F.cross_entropy(model(x).flatten(0, 1), y).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_no_leading_dimension_is_one_example(approximation: str) -> None:
    model, x = mlp(4, 2), torch.randn(4)
    got = factors_of(model, lambda m: m(x).square().sum(), approximation=approximation)
    want = factors_of(model, lambda m: m(x[None]).square().sum(), approximation=approximation)
    assert_same_factors(got, want)


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_several_leading_dimensions_are_positions(approximation: str) -> None:
    model, x = mlp(4, 2), torch.randn(3, 2, 5, 4)
    got = factors_of(model, lambda m: m(x).square().sum() / 3, approximation=approximation)
    want = factors_of(model, lambda m: m(x.flatten(1, 2)).square().sum() / 3, approximation=approximation)
    assert_same_factors(got, want)
    g = 2 * model(x).flatten(1, 2)
    b = g.flatten(0, 1) if approximation == "expand" else g.sum(1)
    torch.testing.assert_close(got["0"].B, (b.T @ b / 3).detach())


def test_a_linear_called_twice_sums_over_its_calls() -> None:
    """Calls are further positions: expand pools them, reduce averages inputs and sums gradients over them."""
    model, (x, z) = mlp(4, 2), torch.randn(2, 6, 4)

    def loss(m: nn.Module) -> Tensor:
        return (m(x) * m(z).exp()).sum() / 6

    def outputs() -> tuple[Tensor, Tensor]:
        return tuple(model(v).detach().requires_grad_() for v in (x, z))  # type: ignore[return-value]

    s, t = outputs()
    gs, gt = torch.autograd.grad((s * t.exp()).sum(), (s, t))
    xs, zs = (F.pad(v, (0, 1), value=1.0) for v in (x, z))

    expand = factors_of(model, loss, approximation="expand")["0"]
    torch.testing.assert_close(expand.A, (xs.T @ xs + zs.T @ zs) / 12)
    torch.testing.assert_close(expand.B, (gs.T @ gs + gt.T @ gt) / 6)
    reduce = factors_of(model, loss, approximation="reduce")["0"]
    mean, total = (xs + zs) / 2, gs + gt
    torch.testing.assert_close(reduce.A, mean.T @ mean / 6)
    torch.testing.assert_close(reduce.B, total.T @ total / 6)


def test_a_call_without_its_bias_is_not_silently_wrong() -> None:
    """A carries a one for the bias; a second call that leaves the bias out has none."""
    model, (x, z) = mlp(4, 2), torch.randn(2, 6, 4)
    with pytest.warns(UserWarning, match="bias"):
        optimizer = capture_once(model, lambda m: (m(x) * F.linear(z, m[0].weight)).mean())
    assert not optimizer.coverage().layers
    assert {f.name for f in optimizer.coverage().fallbacks} == {"0.weight", "0.bias"}


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_different_numbers_of_examples_are_different_examples(approximation: str) -> None:
    """A labelled and an unlabelled batch in one forward pass: nine examples, with the factors of one batch."""
    model, x = mlp(4, 2), torch.randn(9, 4)
    got = factors_of(model, lambda m: (m(x[:6]).sum() + m(x[6:]).sum()) / 9, approximation=approximation)
    want = factors_of(model, lambda m: m(x).sum() / 9, approximation=approximation)
    assert_same_factors(got, want)


@pytest.mark.parametrize("quiet", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_passes_without_gradients_are_ignored(quiet: Callable[[], torch.no_grad], when: str) -> None:
    """An evaluation, or a teacher, inside capture leaves no trace: not even with another number of examples."""
    model, (x, y) = mlp(5, 4, 3), vectors()

    def loss(m: nn.Module, stray: str | None) -> Tensor:
        def passing(now: str) -> None:
            if stray == now:
                with quiet():
                    m.eval()
                    m(torch.randn(7, 5))
                    m.train()

        passing("before")
        h = m[1](m[0](x))
        passing("between")
        value = F.cross_entropy(m[2](h), y)
        passing("after")
        return value

    assert_same_factors(factors_of(model, lambda m: loss(m, when)), factors_of(model, lambda m: loss(m, None)))


def test_an_exception_inside_capture_leaves_nothing_behind() -> None:
    model, (x, y) = mlp(5, 4, 3), vectors()
    twin = copy.deepcopy(model)
    optimizer, untouched = KFAC(model), KFAC(twin)

    def fails() -> None:
        with optimizer.capture():
            model(2 * x).sum().backward()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert not _get_current_function_mode_stack()
    for m, o in ((model, optimizer), (twin, untouched)):
        o.zero_grad()
        with o.capture():
            F.cross_entropy(m(x), y).backward()
        o.step()
    assert_same_factors(optimizer.factors(), untouched.factors())
    assert_same_parameters(model, twin)


def test_an_error_of_capture_itself_leaves_nothing_behind() -> None:
    model, (x, y) = mlp(5, 4, 3), vectors()
    optimizer = KFAC(model)
    with pytest.raises(MissingStatisticsError), optimizer.capture():
        model[2](model[0](x).detach()).sum().backward()  # the first layer's gradient does not come back
    assert not _get_current_function_mode_stack()
    optimizer.zero_grad()
    with optimizer.capture():
        F.cross_entropy(model(x), y).backward()
    want = factors_of(model, lambda m: F.cross_entropy(m(x), y))
    optimizer.step()
    assert_same_factors(optimizer.factors(reduction="mean"), want)


def test_step_without_capture_says_so() -> None:
    model, (x, y) = mlp(5, 4, 3), vectors()
    optimizer = KFAC(model)
    before = copy.deepcopy(model)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(MissingStatisticsError, match=r"step 0 is a statistics step.*optimizer\.capture\(\)"):
        optimizer.step()
    assert_same_parameters(model, before, rtol=0, atol=0)


def test_backward_outside_of_capture_names_the_layers() -> None:
    model, (x, y) = mlp(5, 4, 3), vectors()
    optimizer = KFAC(model)
    with optimizer.capture():
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    with pytest.raises(MissingStatisticsError, match=r"2 of 2 layers.*0 \(missed its output gradients\), 2 \("):
        optimizer.step()


def test_a_batch_given_up_before_its_backward_pass() -> None:
    """`if not isfinite(loss): continue`: no layer is lost, and nothing of the batch stays."""
    model, (x, y) = mlp(5, 4, 3), vectors()
    optimizer = KFAC(model)
    with optimizer.capture():
        F.cross_entropy(model(x * torch.nan), y)
    with optimizer.capture():
        F.cross_entropy(model(x), y).backward()
    want = factors_of(model, lambda m: F.cross_entropy(m(x), y))
    optimizer.step()
    assert_same_factors(optimizer.factors(reduction="mean"), want)
    assert optimizer.metrics()["dropped"] == 0
    assert optimizer.coverage().fraction == 1


def test_forward_outside_of_capture_names_the_layers() -> None:
    model, (x, y) = mlp(5, 4, 3), vectors()
    optimizer = KFAC(model)
    loss = F.cross_entropy(model(x), y)
    with (
        pytest.raises(MissingStatisticsError, match=r"2 of 2 layers.*0 \(missed its inputs\)"),
        optimizer.capture(),
    ):
        loss.backward()


def test_two_backward_passes_through_one_forward_pass_are_refused() -> None:
    model, (x, y) = mlp(5, 4, 3), vectors()
    optimizer = KFAC(model)
    with optimizer.capture():
        loss = F.cross_entropy(model(x), y)
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match=r"layer 2 received two gradients.*one backward"):
            loss.backward()


def test_two_forward_and_backward_passes_are_micro_batches() -> None:
    model, (x, y) = mlp(5, 4, 3), vectors()

    def halves(m: nn.Module) -> Tensor:
        (F.cross_entropy(m(x[:8]), y[:8]) / 2).backward()
        return F.cross_entropy(m(x[8:]), y[8:]) / 2

    for approximation in APPROXIMATIONS:
        got = factors_of(model, halves, approximation=approximation)
        want = factors_of(model, lambda m: F.cross_entropy(m(x), y), approximation=approximation)
        assert_same_factors(got, want)


def test_a_captured_model_can_be_copied_and_trained_on() -> None:
    """Nothing is attached to the model: no hooks, no wrappers, no changed forward."""
    model, (x, y) = mlp(5, 4, 3), vectors()
    optimizer = capture_once(model, lambda m: F.cross_entropy(m(x), y))
    assert all(not m._forward_hooks and not m._backward_hooks for m in model.modules())
    copy.deepcopy(model)(x).sum().backward()
    assert_finite(model, optimizer)


def test_a_step_inside_of_its_capture_says_so() -> None:
    """Statistics are made when the block is left; afterwards all goes on as if nothing had been."""
    model, (x, y) = mlp(5, 4, 3), vectors()
    optimizer = KFAC(model)

    def run(step: Callable[[], object]) -> None:
        optimizer.zero_grad()
        with optimizer.capture():
            F.cross_entropy(model(x), y).backward()
            step()

    for step in (optimizer.step, lambda: optimizer.step(lambda: F.cross_entropy(model(x), y))):
        with pytest.raises(RuntimeError, match=r"step\(\) inside capture\(\).*call step\(\) after it"):
            run(step)
    want = factors_of(model, lambda m: F.cross_entropy(m(x), y))
    optimizer.zero_grad()
    with optimizer.capture():
        F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert_same_factors(optimizer.factors(reduction="mean"), want)


def test_a_capture_inside_a_capture_of_the_same_optimizer_is_refused() -> None:
    """As of a closure that opens one itself: its batch would count twice."""
    model, (x, y) = mlp(5, 4, 3), vectors()
    optimizer, other = KFAC(model[0]), KFAC(model[2])

    def closure() -> Tensor:
        with optimizer.capture():
            loss = F.cross_entropy(model(x), y)
            loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=r"capture\(\) of the same optimizer would count the statistics twice"):
        optimizer.step(closure)
    with optimizer.capture(), other.capture():
        F.cross_entropy(model(x), y).backward()
    optimizer.step()
    other.step()
