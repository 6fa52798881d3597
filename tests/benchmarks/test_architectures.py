"""`python -m benchmarks.paper architectures`: R = 1 makes one of both, and what is kept and shown."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kept import Book
from benchmarks.paper.architectures import cases, command, hybrid, page
from benchmarks.paper.architectures.hybrid import Training
from benchmarks.paper.exactness_cases import pairs


@pytest.fixture
def float64():
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(dtype)


def approximate(what, approximation):
    torch.manual_seed(0)
    return {layer: both[0] for layer, both in pairs(cases.CASES[what](), approximation).items()}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("what", cases.UNSHARED)
def test_where_nothing_is_shared_expand_and_reduce_are_one(what):
    expand, reduce = (approximate(what, approximation) for approximation in ("expand", "reduce"))
    for layer, block in expand.items():
        distance = float((block - reduce[layer]).norm() / block.norm())
        if layer in cases.UNSHARED[what]:
            assert distance < 1e-12, layer
        else:
            assert distance > 0.05, layer


@pytest.mark.usefixtures("float64")
def test_a_linear_recurrence_is_in_neither_setting():
    found = cases.fits(cases.CASES["linear recurrence, squared error at every step"])
    assert found["expand"]["head"].error < 1e-12
    assert found["expand"]["head"].cosine == pytest.approx(1)
    for approximation in ("expand", "reduce"):
        for layer in ("input", "recurrent"):
            assert 0.2 < found[approximation][layer].error < 2
            assert found[approximation][layer].cosine < 0.95


def test_the_trained_hybrid_is_covered_and_goes_on(tmp_path, capsys):
    from algoperf_kfac.pytorch import KFAC

    coverage = KFAC(hybrid.Hybrid()).coverage()
    assert len(coverage.layers) == 2 + 6 * hybrid.BLOCKS + 1
    book, ran = Book(Training, tmp_path / "kept.jsonl"), []

    def train(case):
        if len(ran) == 5:
            raise KeyboardInterrupt
        ran.append(case)
        return {"loss": case.rate, "accuracy": 0.5, "version": "0"}

    wanted = command.trainings(page.SEEDS)
    with pytest.raises(KeyboardInterrupt):
        command.measure(wanted, book, train=train)
    assert Book(Training, book.path).missing(wanted) == wanted[5:]
    command.measure(wanted[:5], Book(Training, book.path), train=train)
    assert "==> 0 runs" in capsys.readouterr().out


def test_the_best_rate_and_paired_differences_by_hand(tmp_path):
    book = Book(Training, tmp_path / "kept.jsonl")
    losses = {"expand": {0.5: 1.0, 1.0: 0.4, 2.0: float("nan")}, "reduce": {0.5: 0.7, 1.0: 0.9, 2.0: 0.8}}
    for optimizer, by_rate in losses.items():
        for rate, loss in by_rate.items():
            for number, seed in enumerate(page.SEEDS):
                measured = {"loss": loss + 0.1 * number, "accuracy": 0.5, "version": "0"}
                book.add(Training(optimizer, rate, seed), measured)
    lines = list(page._trained(book))
    assert "| expand | 1 times | 0.500 (0.400 to 0.600) | 0.500 |  |" in lines
    assert "| reduce | 0.5 times | 0.800 (0.700 to 0.900) | 0.500 | +0.300 (+0.300 to +0.300) |" in lines
    assert "| mixed | - | - | - | - |" in lines
