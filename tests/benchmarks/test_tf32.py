"""The emulation of TF32: ten bits, of the products of the phases that are asked for and of no others."""

from __future__ import annotations

import pytest
import torch

from benchmarks import tf32
from tests.workloads.helpers import shrink


def test_rounding_leaves_ten_bits() -> None:
    step = 2.0**-10
    x = torch.tensor([1.0, 1 + step, 1 + 0.5 * step, 1 + 0.49 * step, -(1 + 1.5 * step), 3e-30, 0.0])
    expected = [1.0, 1 + step, 1 + step, 1.0, -(1 + 2 * step)]
    assert tf32.rounded(x)[:5].tolist() == expected
    assert tf32.rounded(x)[5] == pytest.approx(3e-30, rel=step / 2)
    assert tf32.rounded(x)[6] == 0
    many = torch.randn(1000)
    assert ((tf32.rounded(many) - many).abs() <= many.abs() * step / 2 * (1 + 1e-6)).all()
    assert (tf32.rounded(many).view(torch.int32) & 0x1FFF == 0).all()
    assert tf32.rounded(many.double()).equal(many.double())
    assert tf32.rounded(many.view(20, 50).T).equal(tf32.rounded(many).view(20, 50).T)


def test_products_of_a_phase_alone_are_rounded() -> None:
    a, b = torch.randn(2, 30, 30)
    emulation = tf32.Emulation()
    product = emulation.within("refresh", torch.matmul)
    with emulation:
        emulation.variant = tf32.Variant(frozenset({"refresh"}))
        inside, outside = product(a, b), a @ b
        batched = product(a[None], b[None])[0]
    assert emulation.count == 2
    assert outside.equal(a @ b)
    assert inside.equal(tf32.rounded(a) @ tf32.rounded(b))
    assert batched.allclose(inside)
    assert 0 < (inside - outside).norm() / outside.norm() < 2.0**-10


def test_what_is_decomposed() -> None:
    matrix = torch.randn(6, 6)
    matrix = matrix @ matrix.T
    emulation = tf32.Emulation()
    with emulation:
        emulation.variant = tf32.Variant(frozenset(), eigh=True)
        values = torch.linalg.eigh(matrix)[0]
    assert values.equal(torch.linalg.eigh(tf32.rounded(matrix))[0])
    assert not values.equal(torch.linalg.eigh(matrix)[0])


def test_nothing_rounded_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shadows follow the run in float32 bit for bit, so that what is measured is rounding alone."""
    shrink(monkeypatch.setattr)
    variants = {"nothing": tf32.Variant(frozenset()), "directions": tf32.Variant(frozenset({"K-FAC directions"}))}
    variants |= {"statistics": tf32.Variant(frozenset({"statistics"}))}
    for point in tf32.POINTS:
        found = tf32.measure("bible_lm", point, 4, variants)
        assert set(found["nothing"]) == {0.0}
        assert max(found["directions"]) > 1e-5
        assert max(found["statistics"]) > 1e-5


def test_losses_of_runs_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch.setattr)
    losses = {
        name: tf32.loss_of("bible_lm", "kfac_reduce", 4, variant, 1) for name, variant in tf32.TRAINED.items()
    }
    assert list(losses.values()).count(losses["nothing"]) == 1
    assert tf32.loss_of("bible_lm", "kfac_reduce", 4, None, 1) == losses["nothing"]
    assert tf32.loss_of("bible_lm", "kfac_reduce", 4, None, 2) != losses["nothing"]
