"""Which positions count and whose they are: leading dimensions, masks, segments, the batch elsewhere."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from algoperf_kfac.pytorch import Positions
from tests.math import naive
from tests.math.support import assert_covariance, assert_equal, batched, empirical_factors, examples

APPROXIMATIONS = pytest.mark.parametrize("approximation", ["expand", "reduce"])


def net(bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3, bias=bias))


def loss(outputs: Tensor) -> Tensor:
    """Acts on every entry of the output alone, with a gradient that depends on its value."""
    return (outputs.sin() + 0.5 * outputs**2).sum()


def gradient(outputs: Tensor) -> Tensor:
    outputs = outputs.detach().requires_grad_()
    return torch.autograd.grad(loss(outputs), outputs)[0]


def by_loops(model: nn.Module, parts: list[Tensor], approximation: str, **options: str) -> tuple[Tensor, Tensor]:
    """Factors of the model's linear layer over examples of different length."""
    layer = model[0]
    inputs = [part.reshape(-1, 1, part.shape[-1]) for part in parts]
    grads = [gradient(layer(part)).reshape(-1, 1, layer.out_features) for part in parts]
    return naive.factors(inputs, grads, bias=layer.bias is not None, approximation=approximation, **options)


@APPROXIMATIONS
def test_any_number_of_leading_dimensions(approximation: str) -> None:
    @examples(40)
    @given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.booleans())
    def check(leading: list[int], bias: bool) -> None:
        model, x = net(bias), torch.randn(*leading, 4)
        pair = empirical_factors(model, x, loss, approximation)["0"]
        assert_equal(pair, by_loops(model, list(x), approximation))
        for m in batched(pair):
            assert_covariance(m)

    check()


@APPROXIMATIONS
def test_a_vector_is_one_example(approximation: str) -> None:
    model, x = net(), torch.randn(4)
    assert_equal(empirical_factors(model, x, loss, approximation)["0"], by_loops(model, [x], approximation))


@APPROXIMATIONS
@pytest.mark.parametrize("readout", ["mean", "sum"])
def test_masked_positions_do_not_count(approximation: str, readout: str) -> None:
    """Examples of different length, some of length zero, padded by garbage that has gradients too."""

    @examples(40)
    @given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(0, 3), st.booleans())
    def check(lengths: list[int], padding: int, bias: bool) -> None:
        lengths = [*lengths, 2]
        model, x = net(bias), 100 * torch.randn(len(lengths), max(lengths) + padding, 4)
        mask = torch.arange(x.shape[1]) < torch.tensor(lengths)[:, None]
        x[mask] /= 100
        positions = Positions(mask=mask, readout=readout)
        pair = empirical_factors(model, x, loss, approximation, positions=positions)["0"]
        parts = [x[n, :length] for n, length in enumerate(lengths)]
        assert_equal(pair, by_loops(model, parts, approximation, readout=readout))

    check()


@APPROXIMATIONS
def test_a_bare_tensor_is_a_mask_and_may_mask_whole_examples(approximation: str) -> None:
    model, x = net(), torch.randn(4, 3, 4)
    keep = torch.tensor([1, 0, 1, 1])
    pair = empirical_factors(model, x, loss, approximation, positions=keep)["0"]
    assert_equal(pair, by_loops(model, list(x[keep.bool()]), approximation))


@APPROXIMATIONS
@pytest.mark.parametrize("normalizer", [1.0, None], ids=["summed loss", "mean loss"])
def test_examples_without_positions_are_not_examples(approximation: str, normalizer: float | None) -> None:
    """Neither in the average over examples nor in the default scale of a mean loss."""
    model, x = net(), torch.randn(4, 3, 4)
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1], [1, 0, 0]])

    def mean_loss(outputs: Tensor) -> Tensor:
        return loss(outputs) / (1 if normalizer else 3)

    options = {"loss_normalizer": normalizer, "reduction": "mean"}
    pair = empirical_factors(model, x, mean_loss, approximation, positions=mask, **options)["0"]
    a, b = by_loops(model, [x[0, :2], x[2], x[3, :1]], approximation)
    assert_equal(pair, (a, b / 3))


@APPROXIMATIONS
def test_masked_positions_of_convolutions_do_not_count(approximation: str) -> None:
    layer, x = nn.Conv1d(2, 3, 3, stride=2, padding=1), torch.randn(3, 2, 8)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    pair = empirical_factors(nn.Sequential(layer), x, loss, approximation, positions=mask)["0"]
    y = layer(x)
    inputs, grads = naive.input_rows(layer, x, y.shape[2:]), naive.output_rows(layer, gradient(y))
    keep = mask.bool()
    expected = naive.factors(
        [inputs[n][keep[n]] for n in range(3)],
        [grads[n][keep[n]] for n in range(3)],
        bias=True,
        approximation=approximation,
    )
    assert_equal(pair, expected)


@APPROXIMATIONS
@pytest.mark.parametrize("readout", ["mean", "sum"])
def test_segments_equal_a_loop_over_examples(approximation: str, readout: str) -> None:
    """Rows of one example need not be adjacent, and rows may hold several positions, some of them masked."""

    @examples(40)
    @given(st.lists(st.integers(0, 3), min_size=1, max_size=9), st.booleans(), st.booleans())
    def check(ids: list[int], bias: bool, masked: bool) -> None:
        model, x = net(bias), torch.randn(len(ids), 2, 4)
        segment_ids = torch.tensor(ids)
        mask = torch.rand(len(ids), 2) < 0.7 if masked else torch.ones(len(ids), 2, dtype=torch.bool)
        mask[0] = True
        positions = Positions(
            mask=mask if masked else None, segment_ids=segment_ids, num_segments=4, readout=readout
        )
        pair = empirical_factors(model, x, loss, approximation, positions=positions)["0"]
        parts = [x[segment_ids == n][mask[segment_ids == n]] for n in range(4)]
        assert_equal(pair, by_loops(model, parts, approximation, readout=readout))

    check()


@APPROXIMATIONS
@pytest.mark.parametrize("masked", [False, True], ids=["all positions", "masked"])
def test_batch_dimension_elsewhere(approximation: str, masked: bool) -> None:
    model, x = net(), torch.randn(5, 3, 4)  # (length, batch, features)
    mask = torch.rand(5, 3) < 0.6 if masked else None
    first = None if mask is None else Positions(mask=mask.T)
    expected = empirical_factors(model, x.transpose(0, 1), loss, approximation, positions=first)["0"]
    positions = Positions(mask=mask, batch_dim=1)
    assert_equal(empirical_factors(model, x, loss, approximation, positions=positions)["0"], expected)


def test_positions_by_layer_name() -> None:
    """A mapping from patterns of names reaches only the layers that match."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(3, 5, 4)
    mask = torch.rand(3, 5) < 0.6
    everywhere = empirical_factors(model, x, loss, "reduce", positions=mask)
    nowhere = empirical_factors(model, x, loss, "reduce")
    second = empirical_factors(model, x, loss, "reduce", positions={"1": mask})
    assert_equal(second["0"], nowhere["0"])
    assert_equal(second["1"], everywhere["1"])
    assert not torch.allclose(nowhere["1"].A, everywhere["1"].A)
