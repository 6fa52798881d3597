"""Gradient accumulation: micro-batches give the factors and the trajectory of the one big batch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from algoperf_kfac.pytorch import KFAC, FactorPair
from tests.pytorch.toys import SCALE_SENSITIVE, Patches, assert_same_factors, assert_same_parameters, images


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("preconditioner", ["eigen", "inverse"])
@pytest.mark.parametrize("sizes", [(4, 4), (5, 2, 1)], ids=["even", "uneven"])
def test_trajectory_of_micro_batches(approximation: str, preconditioner: str, sizes: tuple[int, ...]) -> None:
    """Each micro-batch adds its share of the mean over the step's examples, whose number is the normalizer."""
    model = Patches().double()
    twin = copy.deepcopy(model)
    intervals = {"factor_interval": 2, "refresh_interval": 4, "initial_statistics": 1}
    options = {**SCALE_SENSITIVE, "approximation": approximation, "preconditioner": preconditioner}
    whole, parts = (KFAC(m, **intervals, **options) for m in (model, twin))
    for x, y in [images() for _ in range(6)]:
        x = x.double()
        whole.zero_grad()
        with whole.capture():
            F.cross_entropy(model(x), y).backward()
        whole.step()
        parts.zero_grad()
        for xs, ys in zip(x.split(sizes), y.split(sizes), strict=True):
            with parts.capture(loss_normalizer=len(x)):
                (F.cross_entropy(twin(xs), ys, reduction="sum") / len(x)).backward()
        parts.step()
        assert_same_parameters(twin, model)
    assert_same_factors(parts.factors(), whole.factors())


@pytest.mark.parametrize("normalizer", [None, 4])
def test_the_default_normalizer_is_wrong_for_a_share_of_a_mean(normalizer: int | None) -> None:
    """Why the test above passes one: else each half of a mean passes for a mean, and B is a quarter of itself."""
    model, (x, y) = Patches(), images()

    def factors(normalizer: int | None) -> dict[str, FactorPair]:
        twin = copy.deepcopy(model)
        optimizer = KFAC(twin)
        for xs, ys in zip(x.chunk(2), y.chunk(2), strict=True):
            with optimizer.capture(loss_normalizer=normalizer):
                (F.cross_entropy(twin(xs), ys) / 2).backward()
        optimizer.step()
        return optimizer.factors()

    right, wrong = factors(8), factors(normalizer)
    for name, pair in right.items():
        torch.testing.assert_close(wrong[name].A, pair.A)
        torch.testing.assert_close(wrong[name].B, pair.B / 4)


def test_a_capture_may_be_told_its_normalizer_late() -> None:
    """As when the number of valid tokens comes out of the loss function."""
    model, (x, y) = Patches(), images()
    early = KFAC(model)
    twin, late = copy.deepcopy((model, early))
    with early.capture(loss_normalizer=torch.tensor(8)):
        (F.cross_entropy(model(x), y, reduction="sum") / 8).backward()
    early.step()
    with late.capture() as capture:
        loss = F.cross_entropy(twin(x), y, reduction="sum")
        capture.loss_normalizer = torch.tensor(8)
        (loss / capture.loss_normalizer).backward()
    late.step()
    assert_same_factors(late.factors(), early.factors())
