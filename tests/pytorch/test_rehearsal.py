"""Rehearsals: after a pass on a part of a batch the first statistics step of a compiled model runs compiled."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from algoperf_kfac.pytorch import KFAC
from tests.pytorch.compiled import (
    BEFORE_2_6,
    COMPILED,
    OPTIONS,
    Tokens,
    Translation,
    assert_same,
    pair,
    sequences,
    steps,
    translated,
)
from tests.pytorch.test_resume import through_a_file

pytestmark = pytest.mark.skipif(BEFORE_2_6, reason="torch 2.5 takes statistics uncompiled")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with inductor.patch(compile_threads=1):  # more would be processes that import torch
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("make", "data"), [(Tokens, sequences), (Translation, translated)])
def test_after_a_rehearsal_the_first_statistics_step_runs_compiled(
    make: Callable[[], nn.Module], data: Callable[[int], tuple[Tensor, Tensor]]
) -> None:
    model, compiled, optimizer, twin, other = pair(make)
    batches = [data(8) for _ in range(4)]
    x, y = batches[0]
    assert optimizer.wants_rehearsal
    with optimizer.rehearsal("gradient", parts=4):
        F.cross_entropy(compiled(x[:2]).flatten(0, -2), y[:2].flatten(), ignore_index=-1).backward()
    assert not optimizer.wants_rehearsal
    assert optimizer.coverage().note == COMPILED
    assert max(optimizer.metrics()[f"{layer.name}/gradient_error"] for layer in optimizer.coverage().layers) < 1e-12
    with pytest.raises(RuntimeError, match="no layer has statistics yet"):
        optimizer.factors()
    steps(compiled, optimizer, batches, lambda mask: "gradient")
    steps(twin, other, batches, lambda mask: "gradient")
    assert_same(model, optimizer, twin, other)


def rehearse(model: Any, optimizer: KFAC, parts: int = 4) -> None:
    x, y = translated(2)
    with optimizer.rehearsal(parts=parts):
        F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-1).backward()
    optimizer.zero_grad()


def test_who_needs_a_rehearsal_again() -> None:
    """A state that was saved behind a rehearsal and before a step, and a check that was asked for."""
    _, compiled, optimizer, _, _ = pair(Translation)
    rehearse(compiled, optimizer)
    for again in (lambda: optimizer.load_state_dict(through_a_file(optimizer.state_dict())), optimizer.check):
        assert not optimizer.wants_rehearsal
        assert optimizer.capture()._options.taps is not None
        again()
        assert optimizer.wants_rehearsal
        assert optimizer.capture()._options.taps is None
        rehearse(compiled, optimizer)


def test_rows_that_are_no_part_of_a_batch() -> None:
    """A layer that is called once for all examples has as many rows in the batch as in the rehearsal."""

    class Placed(Tokens):
        def __init__(self) -> None:
            super().__init__()
            self.place, self.places = nn.Linear(4, 6), nn.Parameter(torch.randn(1, 5, 4))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + self.place(self.places))

    model, compiled, optimizer, twin, other = pair(Placed)
    x, y = sequences(2)
    with optimizer.rehearsal(parts=4):
        F.cross_entropy(compiled(x).flatten(0, 1), y.flatten(), ignore_index=-1).backward()
    for batch in (sequences() for _ in range(3)):
        for net, one in ((compiled, optimizer), (twin, other)):
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                steps(net, one, [batch])
            assert all("rows in dimension 0: place (1)" in str(warning.message) for warning in said)
    assert_same(model, optimizer, twin, other)


@pytest.mark.parametrize("parts", [0, -1, 2.5])
def test_parts_of_a_batch_are_whole(parts: Any) -> None:
    _, compiled, optimizer, _, _ = pair(Translation)
    with pytest.raises(ValueError, match=r"parts=.*: allowed is a whole number from 1 on"):
        rehearse(compiled, optimizer, parts)


def test_who_needs_no_rehearsal() -> None:
    model = Tokens().double()
    compiled = torch.compile(model, backend="aot_eager")
    assert not KFAC(model, **OPTIONS).wants_rehearsal
    assert not KFAC(compiled, compiled_statistics=False, **OPTIONS).wants_rehearsal
    assert not KFAC(compiled, fisher="mc", **OPTIONS).wants_rehearsal
    optimizer = KFAC(compiled, **OPTIONS)
    steps(compiled, optimizer, [sequences()])
    assert not optimizer.wants_rehearsal
