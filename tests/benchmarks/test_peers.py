"""`python -m benchmarks.paper peers`: what is timed is the same factor, and who is absent is a dash."""

from __future__ import annotations

import pytest
import torch

from algoperf_kfac.pytorch import KFAC
from benchmarks.paper import peers
from benchmarks.paper.complexity.layers import Layer
from benchmarks.paper.complexity.pytorch_layer import build

SMALL = (
    Layer("conv", 3, 6, 4, 2, dims=2, kernel=3),
    Layer("conv", 3, 7, 4, 2, dims=1, kernel=5, stride=2),
    Layer("conv", 3, 4, 4, 4, dims=2, kernel=3, groups=2),
)


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("layer", SMALL, ids=["2-d", "1-d strided", "grouped"])
def test_einconv_forms_the_same_a(layer, approximation):
    """Its kfc is summed over positions and averaged over examples, and it has no bias."""
    pytest.importorskip("einconv")
    x, module = torch.randn(layer.input_shape), build(layer)
    kfac = KFAC(module, approximation=approximation)
    with kfac.capture(force=True):
        module(x).square().sum().backward()
    kfac.step()
    mine = next(iter(kfac.factors().values())).A
    theirs = peers.einconv_of(layer, x, approximation)()
    if approximation == "expand":
        theirs = theirs / layer.positions
    mine = mine.reshape(layer.groups, *mine.shape[-2:])[:, :-1, :-1]
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_who_is_absent_is_a_dash(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(peers, "_is_here", lambda name: False)
    monkeypatch.setattr(peers, "LAYERS", SMALL[:1])
    peers.run(None, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "no peer installed" in text
    rows = [row for row in text.splitlines() if row.startswith("| conv 3 x 6x6")]
    assert len(rows) == 2
    assert all(row.count("| - ") == 4 for row in rows)
