"""Statistics of tied tables inside compiled graphs: several lookups, and products with the transpose."""

from __future__ import annotations

import functools
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
    POSITIONS,
    PRODUCTS,
    Tied,
    Translation,
    assert_same,
    pair,
    sequences,
    steps,
    translated,
)
from tests.pytorch.test_resume import through_a_file
from tests.pytorch.toys import assert_same_factors

pytestmark = pytest.mark.skipif(BEFORE_2_6, reason="torch 2.5 takes statistics uncompiled")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with inductor.patch(compile_threads=1):  # more would be processes that import torch
        yield
    torch._dynamo.reset()


# Any two of the three together: padding says which rows of the look-up are left out, as positions do, and an
# approximation what becomes of the rest.
TABLES = [
    pytest.param(approximation, positions, 0 if (i + j) % 2 else None, id=f"{approximation}-{j}-{(i + j) % 2}")
    for i, approximation in enumerate(("expand", "reduce", "mixed"))
    for j, positions in enumerate(POSITIONS)
]


@pytest.mark.parametrize(("approximation", "positions", "padding"), TABLES)
def test_tied_tables(approximation: str, positions: Callable[[Tensor], Any], padding: int | None) -> None:
    model, compiled, optimizer, twin, other = pair(lambda: Tied(padding), approximation=approximation)
    batches = [
        (torch.randint(9, y.shape), torch.where(y < 0, y, 2 * y)) for _, y in [sequences() for _ in range(4)]
    ]
    steps(compiled, optimizer, batches, positions)
    steps(twin, other, batches, positions)
    assert "table" in optimizer.factors()
    assert_same(model, optimizer, twin, other)


@pytest.mark.filterwarnings("ignore:K-FAC. the batch has 40 examples, as table sees them")  # of a flat product
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize(("approximation", "positions", "padding"), TABLES)
def test_tables_that_are_looked_up_twice(
    approximation: str, positions: Callable[[Tensor], Any], padding: int | None, product: str
) -> None:
    make = functools.partial(Translation, product, padding)
    model, compiled, optimizer, twin, other = pair(make, approximation=approximation)
    batches = [translated() for _ in range(4)]
    steps(compiled, optimizer, batches, positions)
    steps(twin, other, batches, positions)
    assert "table" in optimizer.factors()
    assert_same(model, optimizer, twin, other)


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_some_of_the_rows_of_tables_that_are_looked_up_several_times(approximation: str) -> None:
    make = functools.partial(Translation, lookups=3)
    options = {"approximation": approximation, "statistics_rows": 4, "statistics_rows_by_side": False}
    model, compiled, optimizer, twin, other = pair(make, **options)
    batches = [translated(17) for _ in range(3)]
    steps(compiled, optimizer, batches)
    steps(twin, other, batches)
    assert_same(model, optimizer, twin, other)
    all_rows = KFAC(twin, approximation=approximation, **OPTIONS)
    steps(twin, all_rows, batches[-1:])
    assert not torch.allclose(all_rows.factors()["table"][0], other.factors()["table"][0])


def test_a_penalty_on_a_table_that_the_output_multiplies_by() -> None:
    class Penalised(Translation):
        def forward(self, x: Tensor) -> Tensor:
            gram = self.table.weight.t() @ self.table.weight
            return super().forward(x) + 1e-3 * (gram - torch.eye(6)).square().sum()

    _model, compiled, optimizer, twin, other = pair(Penalised)
    batches = [translated() for _ in range(3)]
    steps(compiled, optimizer, batches)
    steps(twin, other, batches)
    assert optimizer.factors().keys() == other.factors().keys()
    assert_same_factors(optimizer.factors(), other.factors(), rtol=1e-9, atol=1e-12)


class TwoTables(nn.Module):
    """Tied tables of one shape: encoder's and decoder's, of vocabularies that are as large."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.up = nn.Embedding(9, 6), nn.Embedding(9, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(self.one(x) + self.one(x.flip(1)) + self.other(x.roll(1, 1))).tanh()
        return h @ self.one.weight.T + torch.matmul(h.sin(), self.other.weight.t())


def test_two_tables_of_one_shape() -> None:
    model, compiled, optimizer, twin, other = pair(TwoTables)
    batches = [translated() for _ in range(4)]
    steps(compiled, optimizer, batches)
    steps(twin, other, batches)
    assert {"one", "other"} < optimizer.factors().keys()
    assert_same(model, optimizer, twin, other)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.filterwarnings("error:K-FAC")  # none says that a layer has other rows than the loss function
def test_lookups_of_smaller_batches(approximation: str, positions: Callable[[Tensor], Any]) -> None:
    """The last batch of an epoch, of a table that is looked up several times."""
    model, compiled, optimizer, twin, other = pair(lambda: Translation(padding=0), approximation=approximation)
    batches = [translated(n) for n in (8, 8, 5, 8, 1, 7, 8)]
    for net, one in ((compiled, optimizer), (twin, other)):
        for batch in batches:
            one.zero_grad()
            mask = (batch[1] >= 0).double()
            with one.capture(positions(mask), loss_normalizer=mask.sum(), force=True):
                F.cross_entropy(net(batch[0]).flatten(0, 1), batch[1].flatten(), ignore_index=-1).backward()
            one.step()
    assert_same(model, optimizer, twin, other)


def test_lookups_of_larger_batches_are_not_added_up() -> None:
    model, compiled, optimizer, twin, other = pair(Translation)
    batches = [translated(8), translated(8)]
    steps(compiled, optimizer, batches)
    steps(twin, other, batches)
    assert_same(model, optimizer, twin, other)
    with pytest.warns(UserWarning, match="table was called more often or with another batch .* left out"):
        steps(compiled, optimizer, [translated(12) for _ in range(3)])
    assert "layer table is not used in the same way at every step" in str(optimizer.coverage().note)
    optimizer.load_state_dict(other.state_dict())
    model.load_state_dict(twin.state_dict())
    steps(compiled, optimizer, batches)
    steps(twin, other, batches)
    assert_same_factors(optimizer.factors(), other.factors(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", [Tied, Translation])
def test_a_resumed_table(make: Callable[[], nn.Module]) -> None:
    compiled = torch.compile(make(), backend="aot_eager")
    optimizer, fresh = KFAC(compiled, **OPTIONS), KFAC(compiled, **OPTIONS)
    steps(compiled, optimizer, [(torch.randint(9, (4, 5)), torch.randint(9, (4, 5)))])
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    assert fresh.coverage().note == optimizer.coverage().note == COMPILED
