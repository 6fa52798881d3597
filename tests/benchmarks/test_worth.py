"""`python -m benchmarks.paper worth`: what is measured of factors, by hand where that is possible."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kept import Book
from benchmarks.paper.__main__ import main
from benchmarks.paper.worth import measure, page
from benchmarks.paper.worth.measure import Start, preconditioned, spectra


def positive(size, seed):
    root = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T


def test_the_direction_solves_the_damped_system():
    a, b = positive(4, 1), positive(3, 2)
    gradient = torch.randn(3, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = preconditioned({"x": gradient}, {"x": (a, b)}, 0.1)["x"]
    delta = 0.1 * a.trace() / 4 * b.trace() / 3
    torch.testing.assert_close(b @ found @ a + delta * found, gradient, rtol=1e-9, atol=1e-9)


def test_spectra_of_diagonal_factors_by_hand():
    """Two positions of a kernel of one channel: the flat direction is the second, where reduce sees 1e-4."""
    gradient = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    b = torch.eye(1, dtype=torch.float64)
    expand, reduce = torch.tensor([1.0, 1.0]).double().diag(), torch.tensor([1.0, 1e-4]).double().diag()
    found = spectra(gradient, (expand, b), (reduce, b), kernel=2)
    assert found["gradient"] == pytest.approx(16 / 25)
    assert found["trace"] == pytest.approx(0.5)
    assert found["expand"]["rank"] == pytest.approx(1.0)
    assert found["expand"]["flat"] == pytest.approx(16 / 25)
    assert found["reduce"]["eigenvalues"] == pytest.approx([1, 1e-4])
    damping = 1e-3 * (1 + 1e-4) / 2
    first, second = 3 / (1 + damping), 4 / (1e-4 + damping)
    assert found["reduce"]["flat"] == pytest.approx(second**2 / (first**2 + second**2), rel=1e-3)


def test_a_network_is_measured_and_left_as_it_was(monkeypatch):
    monkeypatch.setattr(measure, "DAMPINGS", (1.0,))
    monkeypatch.setattr(measure, "LENGTHS", (0.25, 1.0))
    monkeypatch.setattr(measure, "OTHER_BATCHES", 1)
    found = measure.measure(Start("mnist_vit", 2, 1))
    assert set(found["worth"]) == {"gradient", "expand", "reduce", "mixed"}
    assert all(one["decrease"] > 0 for one in found["worth"].values())
    assert list(found["layers"]) == ["patches"]
    layer = torch.nn.Linear(3, 2)
    kept = [parameter.clone() for parameter in layer.parameters()]
    model = torch.nn.Sequential(layer)
    with measure._moved(model, {"0": torch.ones(2, 4)}, -0.5):
        assert torch.equal(layer.weight, kept[0] - 0.5)
        assert torch.equal(layer.bias, kept[1] - 0.5)
    assert all(torch.equal(new, old) for new, old in zip(layer.parameters(), kept, strict=True))


def test_the_page_and_the_figure_from_what_is_kept(tmp_path, capsys):
    kept = tmp_path / "kept.jsonl"
    book = Book(Start, kept)
    for number, start in enumerate(page.STARTS):
        side = {"eigenvalues": [1.0, 0.5], "rank": 0.5, "flat": 0.9}
        layer = {"gradient": 0.6, "trace": 0.4, "expand": side, "reduce": {**side, "flat": 0.99}}
        worth = {
            name: {"decrease": (number % 3 + 1) * size}
            for name, size in (("gradient", 1.0), ("expand", 4.0), ("reduce", 2.0), ("mixed", 3.0))
        }
        book.add(start, {"worth": worth, "layers": {"blocks.1.conv2": layer}, "version": "0"})
    output = tmp_path / "generated" / "worth.md"  # in a folder that is made
    assert main(["worth", f"--results={kept}", f"--output={output}"]) == 0
    assert "==> 0 networks" in capsys.readouterr().out
    text = output.read_text()
    assert "| mnist_resnet | 4.0 (4.0 to 4.0) | 2.0 (2.0 to 2.0) | 3.0 (3.0 to 3.0) |" in text
    assert "| mnist_vit | `blocks.1.conv2` | 0.5 | 0.5 | 0.6 | 0.9 | 0.99 | 0.4 |" in text
    assert (tmp_path / "figures" / "worth.png").read_bytes()[:4] == b"\x89PNG"
