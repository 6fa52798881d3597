"""Activation checkpointing runs layers again in the backward pass: each call still counts once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from algoperf_kfac.pytorch import KFAC
from tests.pytorch.toys import assert_same_factors, covered, factors_of, reasons

REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
APPROXIMATION = pytest.mark.parametrize("approximation", ["expand", "reduce"])


class Net(nn.Module):
    """Blocks, the middle ones optionally checkpointed, `shared` called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.block = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 6))
        self.shared = nn.Linear(6, 6)
        self.raw = nn.Parameter(0.3 * torch.randn(6, 6))
        self.head = nn.Linear(6, 2)

    def project(self, h: Tensor) -> Tensor:
        return nn.functional.linear(h, self.raw)

    def forward(self, x: Tensor, reentrant: bool | None) -> Tensor:
        run = (lambda f, h: f(h)) if reentrant is None else partial(checkpoint, use_reentrant=reentrant)
        h = self.stem(x)
        h = run(self.block, h)
        h = run(self.shared, h).tanh()
        h = run(self.project, h).tanh()
        h = run(self.shared, h).tanh()
        return self.head(h)


def loss(x: Tensor, reentrant: bool | None, m: nn.Module) -> Tensor:
    return m(x, reentrant).square().sum(-1).mean()


@REENTRANT
@APPROXIMATION
def test_same_factors_as_without(reentrant: bool, approximation: str) -> None:
    model, x = Net(), torch.randn(5, 3, 4)
    got = factors_of(model, partial(loss, x, reentrant), approximation=approximation)
    want = factors_of(model, partial(loss, x, None), approximation=approximation)
    assert set(want) == {"stem", "block.0", "block.2", "shared", "head", "raw"}
    assert_same_factors(got, want)


@REENTRANT
@APPROXIMATION
def test_after_a_pass_without_gradients(reentrant: bool, approximation: str) -> None:
    """A pass under no_grad and the first run of a checkpoint look alike; only one of them comes back."""
    model, x = Net(), torch.randn(5, 3, 4)

    def stray(m: nn.Module) -> Tensor:
        with torch.no_grad():
            m(x[:2], None)
        return loss(x, reentrant, m)

    got = factors_of(model, stray, approximation=approximation)
    assert_same_factors(got, factors_of(model, partial(loss, x, None), approximation=approximation))


@REENTRANT
@APPROXIMATION
def test_micro_batches_in_one_capture(reentrant: bool, approximation: str) -> None:
    model, x = Net(), torch.randn(6, 3, 4)

    def halves(m: nn.Module) -> Tensor:
        (loss(x[:3], reentrant, m) / 2).backward()
        return loss(x[3:], reentrant, m) / 2

    got = factors_of(model, halves, approximation=approximation)
    assert_same_factors(got, factors_of(model, partial(loss, x, None), approximation=approximation))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # only the outer first run
@REENTRANT
@APPROXIMATION
def test_nested_checkpoints(reentrant: bool, approximation: str) -> None:
    model, x = Net(), torch.randn(5, 3, 4)

    def nested(m: nn.Module) -> Tensor:
        h = checkpoint(partial(m, reentrant=reentrant), x.clone().requires_grad_(), use_reentrant=reentrant)
        return h.square().sum(-1).mean()

    got = factors_of(model, nested, approximation=approximation)
    assert_same_factors(got, factors_of(model, partial(loss, x, None), approximation=approximation))


@APPROXIMATION
def test_sampled_fisher_through_a_checkpoint(approximation: str) -> None:
    """Each backward pass of a sample recomputes the block again."""
    model, x, y = Net(), torch.randn(5, 4), torch.randint(2, (5,))
    factors = []
    for reentrant in (False, None):
        optimizer = KFAC(model, fisher="mc", fisher_samples=3, approximation=approximation, learning_rate=0.0)
        with optimizer.capture() as capture:
            outputs = model(x, reentrant)
            capture.backward_fisher(outputs, "softmax_cross_entropy")
            nn.functional.cross_entropy(outputs, y).backward()
        optimizer.step()
        factors.append(optimizer.factors())
    assert_same_factors(*factors)


@REENTRANT
def test_a_layer_in_a_checkpoint_that_is_not_used_is_still_named(reentrant: bool) -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Linear(4, 4)
            self.spare = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            def run(h: Tensor) -> Tensor:
                self.spare(h)
                return self.used(h).tanh()

            return checkpoint(run, x.clone().requires_grad_(), use_reentrant=reentrant)

    model = Unused()
    optimizer = KFAC(model, allow_partial_coverage=True)
    with (
        pytest.warns(UserWarning, match="layer spare takes the fallback.*: missed its output gradients"),
        optimizer.capture(),
    ):
        model(torch.randn(3, 4)).sum().backward()
    assert covered(optimizer) == {"used"}
    assert reasons(optimizer).keys() == {"spare.weight", "spare.bias"}


class Attention(nn.Module):
    """Products of matrices in the model, beside those of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8, bias=False) for _ in range(4))
        self.head = nn.Linear(8, 3, bias=False)

    def attend(self, x: Tensor) -> Tensor:
        weights = (self.query(x) @ self.key(x).transpose(1, 2)).softmax(-1)
        return x + self.out(weights @ self.value(x))

    def forward(self, x: Tensor, context: Callable[[], object] | None) -> Tensor:
        if context is None:
            return self.head(self.attend(x))
        return self.head(checkpoint(self.attend, x, use_reentrant=False, context_fn=context))


ATEN = torch.ops.aten


@APPROXIMATION
@pytest.mark.parametrize(
    "kept",
    [
        [ATEN.mm.default, ATEN.bmm.default, ATEN.addmm.default],
        [ATEN.bmm.default],
        [ATEN.view.default, ATEN.clone.default],
    ],
    ids=["products", "bmm", "views"],
)
@pytest.mark.parametrize("shape", [(4, 5, 8), (1, 8, 8)], ids=str)
def test_selective_checkpoints_keep_what_the_model_computes_alone(
    shape: tuple[int, ...], kept: list[object], approximation: str
) -> None:
    """Their policy is asked of operations; it hands out what it kept in the order in which they were kept."""
    model, x = Attention(), torch.randn(shape)
    context = partial(create_selective_checkpoint_contexts, kept)
    gradients, factors = [], []
    for how in (context, None):
        model.zero_grad()
        optimizer = KFAC(model, approximation=approximation, learning_rate=0.0)
        with optimizer.capture():
            model(x, how).square().sum(-1).mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        optimizer.step()
        factors.append(optimizer.factors())
    assert len(gradients[0]) == 5
    torch.testing.assert_close(*gradients)
    assert_same_factors(*factors)
