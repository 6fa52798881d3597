"""Calls whose outputs have no part in the loss count in no factor, however many they are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algoperf_kfac.pytorch import KFAC, MissingStatisticsError, Positions
from algoperf_kfac.pytorch import recorder as recording
from tests.pytorch.toys import assert_same_factors, capture_once, factors_of, mlp, reasons, vectors


class Unrolled(nn.Module):
    """A cell written out, with an output at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.state, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, heads: Callable[[int], bool]) -> list[Tensor]:
        h, outputs = x.new_zeros(len(x), 8), []
        for t in range(x.shape[1]):
            h = torch.tanh(self.inputs(x[:, t]) + self.state(h))
            if heads(t):
                outputs.append(self.head(h))
        return outputs


def loss(x: Tensor, y: Tensor, heads: Callable[[int], bool], model: nn.Module) -> Tensor:
    return F.cross_entropy(model(x, heads)[-1], y)


def always(step: int) -> bool:
    return True


@pytest.mark.parametrize("approximation", ["expand", "reduce", "mixed"])
@pytest.mark.parametrize("examples", [2, 16])
@pytest.mark.parametrize("steps", [3, 6, 40])
def test_only_the_last_output_is_used(steps: int, examples: int, approximation: str) -> None:
    """Of few examples inputs are kept until it is known, of more their products."""
    model, x, y = Unrolled(), torch.randn(examples, steps, 4), torch.randint(3, (examples,))
    got = factors_of(model, partial(loss, x, y, always), approximation=approximation)
    want = factors_of(model, partial(loss, x, y, lambda t: t == steps - 1), approximation=approximation)
    assert_same_factors(got, want)


@pytest.mark.parametrize("readout", ["mean", "sum"])
@pytest.mark.parametrize("mask", [None, "gradient"])
def test_they_are_no_positions(readout: str, mask: str | None) -> None:
    model, x, y = Unrolled(), torch.randn(4, 6, 4), torch.randint(3, (4,))
    options = {"approximation": "reduce", "capture": {"positions": Positions(mask, readout=readout)}}
    got, want = (
        capture_once(copy.deepcopy(model), partial(loss, x, y, heads), **options).factors()
        for heads in (always, lambda t: t == 5)
    )
    assert_same_factors(got, want)


def test_of_a_sampled_fisher() -> None:
    model, x, y = Unrolled(), torch.randn(4, 9, 4), torch.randint(3, (4,))

    def sampled(heads: Callable[[int], bool]) -> KFAC:
        net = copy.deepcopy(model)
        optimizer = KFAC(net, fisher="mc", fisher_samples=2)
        with optimizer.capture() as capture:
            outputs = net(x, heads)[-1]
            capture.backward_fisher(outputs, "softmax_cross_entropy")
            F.cross_entropy(outputs, y).backward()
        optimizer.step()
        return optimizer

    assert_same_factors(sampled(always).factors(), sampled(lambda t: t == 8).factors())


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_pseudo_labels_in_every_micro_batch(approximation: str) -> None:
    """Micro-batches of one capture have examples of their own, whatever calls they leave unused."""
    model, (x, _) = mlp(5, 8, 3), vectors(12)
    views = [x + 0.1 * torch.randn_like(x) for _ in range(8)]

    def loss(unused: Callable[[], torch.no_grad], m: nn.Module, part: slice) -> Tensor:
        with unused():
            labels = sum((m(view[part]).softmax(1).detach() for view in views), torch.zeros(())) / len(views)
        return F.cross_entropy(m(x[part]), labels) / 2

    def factors(unused: Callable[[], torch.no_grad]) -> KFAC:
        net = copy.deepcopy(model)
        optimizer = KFAC(net, approximation=approximation)
        with optimizer.capture():
            for part in (slice(0, 6), slice(6, 12)):
                loss(unused, net, part).backward()
        optimizer.step()
        return optimizer

    assert_same_factors(factors(torch.enable_grad).factors(), factors(torch.no_grad).factors())


def test_an_input_that_is_written_to_afterwards() -> None:
    """Autograd may keep a narrower copy of what a layer reads, and let the model write to the original."""

    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor, *, copies: bool) -> Tensor:
            total = torch.zeros(())
            for _ in range(7):
                with torch.autocast("cpu", torch.bfloat16):
                    total = total + self.head(x.clone() if copies else x)
                x.mul_(-1.5)
            return total.float()

    model, x = Written(), torch.randn(2, 8)
    optimizer = KFAC(model, lr=0.0, factor_interval=1, factor_decay=0.0)
    factors = []
    for copies in (True, False):
        optimizer.zero_grad()
        with optimizer.capture():
            model(x.clone(), copies=copies).square().sum(-1).mean().backward()
        optimizer.step()
        factors.append(optimizer.factors())
    assert_same_factors(*factors)


def test_a_run_whose_sequences_grow() -> None:
    model, y = Unrolled(), torch.randint(3, (16,))
    optimizer = KFAC(model, factor_interval=1)
    for steps in (4, 4, 6, 9):
        optimizer.zero_grad()
        with optimizer.capture():
            loss(torch.randn(16, steps, 4), y, always, model).backward()
        optimizer.step()
    assert not reasons(optimizer)


def test_too_many_to_be_kept_apart_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "WAITING_BYTES", 0)
    model, x, y = Unrolled(), torch.randn(16, 9, 4), torch.randint(3, (16,))
    with pytest.raises(
        MissingStatisticsError,
        match=r"1 of 3 layers.*: head \(missed the output gradients of 5 of its 9 calls, too many to be kept apart "
        r"until it was known\)\. Run calls.*torch\.no_grad\(\).*reduce",
    ):
        capture_once(model, partial(loss, x, y, always))
    assert_same_factors(
        factors_of(model, partial(loss, x, y, always), approximation="reduce"),
        factors_of(model, partial(loss, x, y, lambda t: t == 8), approximation="reduce"),
    )
