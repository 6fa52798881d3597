"""Convolutions of every kind against loops, and reduce without unfolding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from algoperf_kfac.positions import Positions, Rows
from algoperf_kfac.pytorch import KFAC
from algoperf_kfac.pytorch import factors as library
from algoperf_kfac.pytorch.factors import MaskedLayout
from algoperf_kfac.pytorch.geometry import ConvGeometry
from benchmarks.paper import ggn as oracle
from tests.math import naive
from tests.math.strategies import convolutions
from tests.math.support import Operations, assert_covariance, assert_equal, batched, empirical_factors, examples

KINDS = pytest.mark.parametrize("transposed", [False, True], ids=["conv", "conv_transpose"])
APPROXIMATIONS = pytest.mark.parametrize("approximation", ["expand", "reduce"])


def loss(outputs: Tensor) -> Tensor:
    """Not symmetric between examples, channels or positions."""
    weights = torch.linspace(-1, 2, outputs.numel()).reshape(outputs.shape)
    return (weights * outputs + 0.3 * outputs**2).sum()


def gradient(outputs: Tensor) -> Tensor:
    outputs = outputs.detach().requires_grad_()
    return torch.autograd.grad(loss(outputs), outputs)[0]


@KINDS
def test_the_loops_are_the_layer(transposed: bool) -> None:
    """Guards the oracle: its rows times its weight matrix are the layer's outputs."""

    @examples(100)
    @given(convolutions(transposed))
    def check(case: tuple[nn.Module, Tensor]) -> None:
        layer, x = case
        y = layer(x)
        rows = naive.input_rows(layer, x, y.shape[2:])
        if layer.bias is not None:
            rows = torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], -1)
        matrix = oracle.rows(layer, layer.weight, layer.bias)
        expected = torch.einsum("nrgp,gop->nrgo", rows, matrix)
        torch.testing.assert_close(naive.output_rows(layer, y), expected, rtol=1e-12, atol=1e-12)

    check()


@KINDS
@APPROXIMATIONS
def test_factors_equal_loops(transposed: bool, approximation: str) -> None:
    @examples(100)
    @given(convolutions(transposed))
    def check(case: tuple[nn.Module, Tensor]) -> None:
        layer, x = case
        y = layer(x)
        pair = empirical_factors(nn.Sequential(layer), x, loss, approximation)["0"]
        expected = naive.factors(
            naive.input_rows(layer, x, y.shape[2:]).unbind(),
            naive.output_rows(layer, gradient(y)).unbind(),
            bias=layer.bias is not None,
            approximation=approximation,
        )
        assert_equal(pair, expected)
        for m in batched(pair):
            assert_covariance(m)

    check()


@KINDS
def test_captured_pairs_rebuild_the_gradient(transposed: bool) -> None:
    """sum_r g a^T = dL/dW, with the matrix order of the parameters that the optimizer uses."""

    @examples(100)
    @given(convolutions(transposed))
    def check(case: tuple[nn.Module, Tensor]) -> None:
        layer, x = case
        spec = KFAC(nn.Sequential(layer)).coverage().layers[0]
        with Operations() as operations:
            y = layer(x)
        [(operation, output)] = operations.seen
        loss(y).backward()
        conv = operation.geometry(output)
        g = library.output_rows(gradient(y), layer.groups, conv)
        a = torch.cat([rows for _, rows in library.input_chunks(operation.input, layer.groups, conv)])
        if layer.bias is not None:
            a = torch.cat([a, a.new_ones(*a.shape[:-1], 1)], -1)
        bias_grad = None if layer.bias is None else layer.bias.grad
        expected = library.to_matrix(layer.weight.grad, bias_grad, spec)
        torch.testing.assert_close(torch.einsum("nrgo,nrgi->goi", g, a), expected, rtol=1e-10, atol=1e-10)
        weight, bias = library.from_matrix(expected, spec)
        assert torch.equal(weight, layer.weight.grad)
        assert bias is None or torch.equal(bias, layer.bias.grad)

    check()


@KINDS
def test_window_sums_equal_sums_of_patches(transposed: bool) -> None:
    @examples(100)
    @given(convolutions(transposed), st.booleans())
    def check(case: tuple[nn.Module, Tensor], masked: bool) -> None:
        layer, x = case
        with Operations() as operations:
            layer(x)
        [(operation, output)] = operations.seen
        conv = operation.geometry(output)
        leading = (len(x), *output.shape[2:])
        positions = Positions(mask=torch.rand(leading) > 0.4) if masked else None
        layout = MaskedLayout.fitted(positions, Rows(leading, batch_first=True), "layer", x.dtype)
        rows = torch.cat([rows for _, rows in library.input_chunks(operation.input, layer.groups, conv)])
        sums = library.input_sums(operation.input, layer.groups, conv, layout)
        expected = rows.sum(1) if layout.mask is None else torch.einsum("nrgp,nr->ngp", rows, layout.mask)
        torch.testing.assert_close(sums, expected, rtol=1e-12, atol=1e-12)

    check()


@pytest.mark.parametrize("masked", [False, True], ids=["all positions", "masked"])
@KINDS
def test_reduce_never_unfolds(transposed: bool, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def unfold(*args: object) -> None:
        raise AssertionError("a patch matrix was built")

    monkeypatch.setattr(ConvGeometry, "patches", unfold)
    layer = nn.ConvTranspose2d(2, 4, 3, stride=2) if transposed else nn.Conv2d(2, 4, 3, padding=1, groups=2)
    x = torch.randn(2, 2, 5, 5)
    positions = torch.rand(2, *layer(x).shape[2:]) > 0.5 if masked else None
    empirical_factors(nn.Sequential(layer), x, loss, "reduce", positions=positions)
    with pytest.raises(AssertionError, match="patch matrix"):
        empirical_factors(nn.Sequential(layer), x, loss, "expand", positions=positions)


def test_chunks_of_examples_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """expand bounds its memory by taking few examples at a time."""
    layer, x = nn.Conv2d(2, 3, 3, padding=1), torch.randn(5, 2, 4, 4)
    mask = torch.rand(5, 4, 4) > 0.3
    whole = empirical_factors(nn.Sequential(layer), x, loss, "expand", positions=mask)["0"]
    monkeypatch.setattr(library, "MAX_PATCH_ELEMENTS", 2 * 2 * 9 * 16)
    assert len(list(library.input_chunks(x, 1, _geometry(layer, x)))) == 3
    assert_equal(empirical_factors(nn.Sequential(layer), x, loss, "expand", positions=mask)["0"], whole)


def _geometry(layer: nn.Module, x: Tensor) -> ConvGeometry | None:
    with Operations() as operations:
        layer(x)
    [(operation, output)] = operations.seen
    return operation.geometry(output)


def test_an_input_without_batch_dimension_is_one_example() -> None:
    layer, x = nn.Conv1d(2, 3, 3), torch.randn(2, 6)
    for approximation in ("expand", "reduce"):
        alone = empirical_factors(nn.Sequential(layer), x, loss, approximation)["0"]
        assert_equal(alone, empirical_factors(nn.Sequential(layer), x[None], loss, approximation)["0"])
