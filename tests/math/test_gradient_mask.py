"""Positions that the loss does not depend on, found from output gradients: as by a mask, where a mask is right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from algoperf_kfac.pytorch import KFAC, FactorPair, Positions
from tests.math import naive
from tests.math.support import assert_equal, examples, fisher_factors

APPROXIMATIONS = pytest.mark.parametrize("approximation", ["expand", "reduce"])
READOUTS = pytest.mark.parametrize("readout", ["mean", "sum"])
LENGTHS = torch.tensor([3, 5, 1, 4])
MASK = torch.arange(6) < LENGTHS[:, None]  # a last position that is padding everywhere


def factors(
    model: nn.Module, run: Callable[[nn.Module], Tensor], approximation: str, positions, **config
) -> dict[str, FactorPair]:
    optimizer = KFAC(model, approximation=approximation, learning_rate=0.0, **config)
    with optimizer.capture(positions, loss_normalizer=1.0):
        run(model).backward()
    optimizer.step()
    return optimizer.factors(reduction="mean")


def loss(outputs: Tensor) -> Tensor:
    return (outputs.sin() + outputs**2).sum()


class Attention(nn.Module):
    """Queries attend to the positions of a memory; a mask keeps them from its padding."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(memory).mT
        # No softmax: it makes the keys' gradients sum to zero, and those of a single position vanish.
        return self.out(scores.sigmoid().masked_fill(~mask.unsqueeze(1), 0) @ self.value(memory))


@APPROXIMATIONS
@READOUTS
def test_padded_attention_batch(approximation: str, readout: str) -> None:
    model, x = Attention(), torch.randn(4, 6, 4)
    x[~MASK] *= 100

    def run(m: nn.Module) -> Tensor:
        return loss(m(x, x, MASK)[MASK])

    want = factors(model, run, approximation, Positions(mask=MASK, readout=readout))
    got = factors(model, run, approximation, Positions(mask="gradient", readout=readout))
    for name in want:
        assert_equal(got[name], want[name])
    if readout == "mean":
        for name, pair in factors(model, run, approximation, "gradient").items():
            assert_equal(pair, want[name])
    without = factors(model, run, approximation, None)
    assert not torch.allclose(got["value"].A, without["value"].A)


@APPROXIMATIONS
def test_source_and_target_of_one_shape_with_masks_of_their_own(approximation: str) -> None:
    """A mask for the whole model cannot tell them apart; the gradients can, layer by layer."""
    model, x, memory = Attention(), torch.randn(4, 6, 4), torch.randn(4, 6, 4)
    target = torch.arange(6) < torch.tensor([6, 2, 4, 3])[:, None]

    def run(m: nn.Module) -> Tensor:
        return loss(m(x, memory, MASK)[target])

    by_name = {"query": target, "out": target, "key": MASK, "value": MASK}
    want, got = (factors(model, run, approximation, positions) for positions in (by_name, "gradient"))
    for name in want:
        assert_equal(got[name], want[name])


@APPROXIMATIONS
def test_whole_examples_without_loss_are_no_examples(approximation: str) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 3, 4)
    keep = torch.tensor([1.0, 0, 1, 1, 0])
    want, got = (
        factors(model, lambda m: loss(m(x)[keep.bool()]), approximation, positions)
        for positions in (keep, "gradient")
    )
    for name in want:
        assert_equal(got[name], want[name])


@APPROXIMATIONS
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
@pytest.mark.parametrize("stride", [1, 2])
def test_masked_positions_of_convolutions(approximation: str, groups: int, transposed: bool, stride: int) -> None:
    make = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = make(2, 4, (3, 2), stride=stride, padding=1, dilation=(1, 2), groups=groups)
    x = torch.randn(3, 2, 7, 6)
    shape = layer(x).shape
    keep = torch.rand(3, *shape[2:]) < 0.4
    keep[1] = False

    def run(m: nn.Module) -> Tensor:
        return loss(m(x).movedim(1, -1)[keep])

    y = layer(x).detach().requires_grad_()
    (grad,) = torch.autograd.grad(loss(y.movedim(1, -1)[keep]), y)
    inputs, grads = naive.input_rows(layer, x, shape[2:]), naive.output_rows(layer, grad)
    rows = keep.flatten(1)
    a, b = naive.factors(
        [inputs[n][rows[n]] for n in range(3)],
        [grads[n][rows[n]] for n in range(3)],
        bias=True,
        approximation=approximation,
    )
    got = factors(nn.Sequential(layer), run, approximation, "gradient")["0"]
    assert_equal(got, (a.squeeze(0), b.squeeze(0) / 2))


@APPROXIMATIONS
def test_any_pattern_of_segments_and_positions(approximation: str) -> None:
    @examples(30)
    @given(st.lists(st.integers(0, 3), min_size=1, max_size=9))
    def check(ids: list[int]) -> None:
        model, x, segments = nn.Sequential(nn.Linear(4, 3)), torch.randn(len(ids), 2, 4), torch.tensor(ids)
        keep = torch.rand(len(ids), 2) < 0.6
        keep[0] = True
        want, got = (
            factors(model, lambda m: loss(m(x)[keep]), approximation, Positions(mask, segments, 4, readout="sum"))
            for mask in (keep, "gradient")
        )
        assert_equal(got["0"], want["0"])

    check()


@APPROXIMATIONS
@READOUTS
@pytest.mark.parametrize("fisher", ["exact", "mc"])
def test_several_backward_passes_take_the_union(approximation: str, readout: str, fisher: str) -> None:
    """A pass of the exact Fisher reaches one output alone; a position counts if any of them reaches it."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(4, 6, 4)

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) * MASK.unsqueeze(-1)

    want, got = (
        fisher_factors(
            Masked(),
            x,
            "mean_squared_error",
            approximation,
            fisher=fisher,
            positions=Positions(mask=mask, readout=readout),
        )
        for mask in (MASK, "gradient")
    )
    for name in want:
        assert_equal(got[name], want[name])


@APPROXIMATIONS
def test_micro_batches_in_one_capture(approximation: str) -> None:
    model, x = Attention(), torch.randn(4, 6, 4)

    def run(m: nn.Module, rows: slice) -> Tensor:
        return loss(m(x[rows], x[rows], MASK[rows])[MASK[rows]])

    want = factors(model, lambda m: run(m, slice(None)), approximation, "gradient")
    optimizer = KFAC(model, approximation=approximation, learning_rate=0.0)
    with optimizer.capture("gradient", loss_normalizer=1.0):
        for rows in (slice(0, 1), slice(1, 4)):
            run(model, rows).backward()
    optimizer.step()
    for name, pair in optimizer.factors(reduction="mean").items():
        assert_equal(pair, want[name])


def test_a_step_on_which_nothing_counts_is_left_out() -> None:
    """In front of weights that are zero at first, as heads often are: nothing to learn, and no failure."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(5, 4)
    nn.init.zeros_(model[1].weight)
    optimizer = KFAC(model, learning_rate=0.1, factor_interval=1, refresh_interval=1)
    for step in range(3):
        optimizer.zero_grad()
        with optimizer.capture("gradient"):
            (model(x) - 1).square().sum(-1).mean().backward()
        optimizer.step()
        assert float(optimizer._layers.states["0"].weight > 0) == (step > 0)
    assert optimizer.metrics()["dropped"] == optimizer.metrics()["failures"] == 0
    assert all(p.isfinite().all() for p in model.parameters())


def test_unknown_masks_are_refused() -> None:
    with pytest.raises(ValueError, match="mask='gradients': allowed is an array, None or 'gradient'"):
        KFAC(nn.Linear(2, 2)).capture("gradients")
