"""Sums of outer products: the same whatever is copied, halved or left out on the way."""

from __future__ import annotations

import pytest
import torch

from algoperf_kfac.pytorch import factors
from algoperf_kfac.pytorch.geometry import ConvGeometry
from algoperf_kfac.pytorch.recorder import _is_seen_to_hold

FEATURES_FIRST = {"rows first": False, "features first": True}


def rows(groups, count, features, features_first):
    t = torch.randn(groups, count, features, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return t.transpose(1, 2).contiguous().transpose(1, 2) if features_first else t


@pytest.mark.parametrize("features", [6, 7, 1])
@pytest.mark.parametrize("features_first", FEATURES_FIRST.values(), ids=FEATURES_FIRST)
def test_half_of_a_symmetric_product_is_enough(monkeypatch, features, features_first):
    t = rows(2, 5, features, features_first)
    whole = factors.gram(t)
    monkeypatch.setattr(factors, "HALVED", 2)
    halved = factors.gram(t)
    torch.testing.assert_close(halved, whole, rtol=1e-14, atol=1e-14)
    assert torch.equal(halved, halved.transpose(1, 2))


@pytest.mark.parametrize("few", [0, 100])  # the homogeneous coordinate beside the product, and among its rows
@pytest.mark.parametrize("features_first", FEATURES_FIRST.values(), ids=FEATURES_FIRST)
def test_the_bias_is_the_last_feature(monkeypatch, few, features_first):
    monkeypatch.setattr(factors, "FEW_ROWS", few)
    t = rows(1, 5, 4, features_first)
    ones = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    with_bias = torch.cat([t[0], ones[:, None]], 1)
    expected = with_bias.T @ with_bias
    found = factors.outer_sums(t.transpose(0, 1), ones, [3, 2])
    torch.testing.assert_close(found[0][0], expected[:3, :3])
    torch.testing.assert_close(found[1][0], expected[3:, 3:])


@pytest.mark.parametrize("transposed", [False, True])
def test_patches_lie_with_their_positions_together(transposed):
    """Or each of them is copied a kernel's width at a time."""
    stride, out = ((2, 2), (13, 13)) if transposed else ((1, 1), (4, 4))
    geometry = ConvGeometry((3, 3), stride, (1, 1), (0, 0), (6, 6), out, transposed)
    patches = geometry.patches(geometry.padded(torch.randn(2, 4, 6, 6)), 2)
    positions = 169 if transposed else 16
    assert patches.shape == (2, positions, 2, 18)
    assert patches.stride()[1] == 1
    assert patches.reshape(-1, 2, 18).data_ptr() == patches.data_ptr()


def test_only_what_is_there_is_looked_at():
    true = torch.ones(3, dtype=torch.bool)
    assert _is_seen_to_hold(true)
    assert not _is_seen_to_hold(torch.tensor([True, False]))
    assert not _is_seen_to_hold(torch.ones(3, dtype=torch.bool, device="meta"))
