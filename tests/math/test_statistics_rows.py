"""Statistics from a part of the batch: those of the chosen rows, and in expectation those of all."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from algoperf_kfac.pytorch import KFAC, Positions
from algoperf_kfac.subset import Subset
from tests.math import naive
from tests.math.support import assert_equal, batched, empirical_factors

APPROXIMATIONS = pytest.mark.parametrize("approximation", ["expand", "reduce", "mixed"])
N, POSITIONS = 12, 5


def loss(outputs: Tensor) -> Tensor:
    return (outputs.sin() + 0.5 * outputs**2).sum()


def linear() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(4, 3)), torch.randn(N, POSITIONS, 4)


def conv() -> tuple[nn.Module, Tensor]:
    layer = nn.Conv2d(4, 6, 3, padding=1, groups=2, padding_mode="circular")
    return nn.Sequential(layer), torch.randn(N, 4, 3, 3)


class Twice(nn.Module):
    """A layer that is called on the same examples twice, with more positions the second time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).repeat(1, 2, 1))


MODELS = {"linear": linear, "conv": conv, "twice": lambda: (Twice(), torch.randn(N, POSITIONS, 4))}


def rows_for(every: int, x: Tensor, approximation: str, model: str) -> int:
    """The limit at which every n-th example is chosen, for A and for B of all calls alike."""
    each = 1 if approximation == "reduce" or (approximation == "mixed" and model != "conv") else x[0].numel() // 4
    return N * each // every


def pair_of(model: nn.Module, x: Tensor, approximation: str, rows: int | None = None, **options: Any) -> Any:
    options = {"reduction": "mean", "initial_statistics": 1} | options
    return empirical_factors(model, x, loss, approximation, statistics_rows=rows, **options)


@pytest.mark.parametrize("name", ["linear", "conv"])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("every", [2, 3, 5])
def test_they_are_those_of_every_nth_example(name: str, approximation: str, every: int) -> None:
    model, x = MODELS[name]()
    rows = rows_for(every, x, approximation, name)
    chosen = x[:: Subset.of(rows, N, 1 if approximation == "reduce" else x[0].numel() // 4).every]
    assert len(chosen) < N
    assert_equal(pair_of(model, x, approximation, rows)["0"], pair_of(model, chosen, approximation)["0"])


@pytest.mark.parametrize("name", MODELS)
@APPROXIMATIONS
def test_in_expectation_they_are_those_of_all(name: str, approximation: str) -> None:
    """Over the rotations of the batch, and of positions where some are left out, by which the factors of all do not
    change; in the paper's scale, too: B sums over all examples."""
    model, x = MODELS[name]()
    along = (2, 3) if name == "conv" else (1,)
    shifts = [range(x.shape[dim]) for dim in along] if approximation != "reduce" else [(0,)] * len(along)
    for reduction in ("mean", "sum"):
        rotated = [
            next(
                iter(pair_of(model, x.roll((*by, -i), (*along, 0)), approximation, 4, reduction=reduction).values())
            )
            for by in itertools.product(*shifts)
            for i in range(12)
        ]
        mean = [torch.stack([pair[i] for pair in rotated]).mean(0) for i in (0, 1)]
        whole = next(iter(pair_of(model, x, approximation, reduction=reduction).values()))
        assert_equal(tuple(mean), whole)
        assert not any(torch.allclose(rotated[0][i], rotated[1][i]) for i in (0, 1))


def test_mixed_takes_as_many_rows_as_each_factor_needs() -> None:
    """A one per position, B one per example."""
    model, x = conv()
    found, chosen = pair_of(model, x, "mixed", 4 * 9)["0"], x[::3]
    assert_equal(found, (pair_of(model, chosen, "expand")["0"].A, pair_of(model, x, "reduce")["0"].B))


@pytest.mark.parametrize("readout", ["mean", "sum"])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("by_gradient", [False, True])
def test_masks_go_with_their_examples(approximation: str, readout: str, by_gradient: bool) -> None:
    """Examples without positions among the chosen and the others: they count in the scale of B exactly."""
    model, x = linear()
    mask = torch.ones(N, POSITIONS)
    mask[1], mask[4], mask[0, 3:] = 0, 0, 0
    rows, every = (4, 3) if approximation == "reduce" else (4 * POSITIONS, 3)

    def of(x: Tensor, mask: Tensor, rows: int | None) -> Any:
        positions = Positions("gradient" if by_gradient else mask, readout=readout)
        options = {"positions": positions, "reduction": "sum", "statistics_rows": rows}
        return empirical_factors(model, x, lambda out: loss(out * mask[..., None]), approximation, **options)["0"]

    chosen = of(x[::every], mask[::every], None)
    found = of(x, mask, rows)
    assert_equal(found, (chosen.A, every * chosen.B))


def test_micro_batches_and_passes_add_up() -> None:
    """Two captures of one step, of different sizes and so with different shares of examples."""
    model, x = linear()
    optimizer = KFAC(model, statistics_rows=4 * POSITIONS, learning_rate=0.0)
    for part in (x[:8], x[8:]):  # every second, all
        with optimizer.capture(loss_normalizer=1.0):
            loss(model(part)).backward()
    optimizer.step()
    parts = [pair_of(model, part, "expand", reduction="sum")["0"] for part in (x[:8:2], x[8:])]
    a = (8 * parts[0].A + 4 * parts[1].A) / 12
    assert_equal(optimizer.factors()["0"], (a, 2 * parts[0].B + parts[1].B))


@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_passes_of_a_fisher_see_the_same_examples(fisher: str) -> None:
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(N, 4)

    def of(x: Tensor, rows: int | None) -> Any:
        optimizer = KFAC(model, fisher=fisher, fisher_samples=40, statistics_rows=rows)
        with optimizer.capture() as capture:
            capture.backward_fisher(model(x), "mean_squared_error")
        optimizer.step()
        return optimizer.factors(reduction="mean")["0"]

    found, chosen = of(x, N // 3), of(x[::3], None)
    torch.testing.assert_close(found.A, chosen.A)
    if fisher == "exact":
        torch.testing.assert_close(found.B, chosen.B)


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_rows_of_segments_are_all_taken(approximation: str) -> None:
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(N, 4)
    positions = Positions(segment_ids=torch.arange(N) % 3, num_segments=3)
    options = {"positions": positions}
    assert_equal(
        pair_of(model, x, approximation, 1, **options)["0"], pair_of(model, x, approximation, **options)["0"]
    )


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_a_tied_table(approximation: str) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.table(tokens).tanh() @ self.table.weight.T

    model, tokens = Tied(), torch.randint(7, (N, POSITIONS))
    rows = N // 3 if approximation == "reduce" else N * POSITIONS // 3
    found = pair_of(model, tokens, approximation, rows, reduction="sum")["table"]
    chosen = pair_of(model, tokens[::3], approximation, reduction="sum")["table"]
    torch.testing.assert_close(found.A, 3 * chosen.A)


def test_how_many_are_chosen() -> None:
    assert Subset.of(None, 12, 100) == Subset(12, 1, 100)
    assert Subset.of(1, 12, 100, thins=False) == Subset(12, 3, 100)  # of four examples at least
    assert Subset.of(1, 1, 100, thins=False) == Subset(1, 1, 100)
    assert Subset.of(500, 12, 100) == Subset(12, 2, 100)  # 600 rows; a third would be too few
    assert Subset.of(5000, 12, 100) == Subset(12, 1, 100)
    assert Subset(12, 5).size == 3
    assert Subset.of(3, 12, 1) == Subset(12, 3)
    assert Subset.of(3, 12, 0) == Subset(12, 1, 0)


def test_how_many_positions_are_chosen() -> None:
    """As few as bring the rows, by a step that has no divisor in common with the number of positions."""
    assert Subset.of(1, 12, 100) == Subset(12, 3, 100, 99)
    assert Subset.of(80, 12, 100) == Subset(12, 3, 100, 3)  # not 5, nor 4
    assert Subset.of(1000, 8, 64 * 64) == Subset(8, 2, 64 * 64, 15)
    assert Subset.of(1, 3, 7) == Subset(3, 1, 7, 6)
    assert Subset(12, 3, 100, 3).rows == 34
    assert Subset(12, 3, 100, 3).weight == pytest.approx(1200 / (4 * 34))


@pytest.mark.parametrize("masked", [False, True, "gradient"])
@pytest.mark.parametrize("name", ["linear", "conv", "strided", "conv_transpose"])
def test_of_few_examples_some_positions_are_taken(name: str, masked: bool | str) -> None:
    """By hand: the same rows of inputs, of output gradients and of the mask."""
    layer = {
        "linear": nn.Linear(4, 3),
        "conv": nn.Conv2d(4, 6, 3, padding=1, groups=2),
        "strided": nn.Conv2d(4, 6, (3, 2), stride=(1, 2), dilation=(2, 1), padding=(2, 1)),
        "conv_transpose": nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2),
    }[name]
    x = torch.randn(N, 35, 4) if name == "linear" else torch.randn(N, 4, 5, 7)
    out = layer(x)
    inputs = naive.input_rows(layer, x, out.shape[2:])
    positions = inputs.shape[1]
    mask = torch.ones(N, positions)
    if masked:
        mask = (torch.rand(N, positions) < 0.7).to(x.dtype)
    chosen = Subset.of(20, N, positions)
    assert chosen.thinning > 1

    def masked_loss(out: Tensor) -> Tensor:
        kept = mask if name == "linear" else mask.reshape(N, *out.shape[2:])
        return loss(out * kept.unsqueeze(2 if name == "linear" else 1))

    gradients = naive.output_rows(layer, torch.autograd.grad(masked_loss(y := out.detach().requires_grad_()), y)[0])
    some = (slice(None, None, chosen.every), slice(None, None, chosen.thinning))
    inputs, gradients, kept = inputs[some], gradients[some], mask[some]
    inputs = torch.cat([inputs, torch.ones_like(inputs[..., :1])], -1)
    a = torch.einsum("nrgp,nrgq,nr->gpq", inputs, inputs, kept) / kept.sum()
    b = chosen.weight * torch.einsum("nrgp,nrgq->gpq", gradients, gradients)
    given = (
        "gradient"
        if masked == "gradient"
        else mask.reshape(N, *out.shape[1:-1] if name == "linear" else out.shape[2:])
    )
    how = {"positions": Positions(given)} if masked else {}
    found = empirical_factors(
        nn.Sequential(layer),
        x,
        masked_loss,
        "expand",
        statistics_rows=20,
        reduction="sum",
        initial_statistics=1,
        **how,
    )["0"]
    for mine, want in zip(batched(found), (a, b), strict=True):
        torch.testing.assert_close(mine, want)


@pytest.mark.parametrize(("most", "every"), [(100, 2), (2, 3)])
def test_no_fewer_rows_than_a_block_has_sides(most: int, every: int) -> None:
    """A is 5 x 5 with the bias, or has blocks of at most 2: four of twelve examples would do for that."""
    model, x = linear()
    options = {"statistics_rows_by_side": True, "max_factor_dim": most}
    found = pair_of(model, x, "reduce", 1, **options)["0"]
    torch.testing.assert_close(tuple(found), tuple(pair_of(model, x[::every], "reduce", **options)["0"]))


@pytest.mark.parametrize("value", [0, -1, 2.5, "many", True])
def test_other_values_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="hyperparameter statistics_rows="):
        KFAC(nn.Linear(2, 2), statistics_rows=value)
