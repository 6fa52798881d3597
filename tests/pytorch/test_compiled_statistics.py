"""Statistics inside compiled graphs: what uncompiled statistics steps give, and one graph more for them."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from algoperf_kfac.pytorch import KFAC
from tests.pytorch.test_resume import through_a_file
from tests.pytorch.toys import Patches, assert_same_factors, assert_same_parameters, convnet, images, train

OPTIONS = {"factor_interval": 2, "refresh_interval": 4, "initial_statistics": 1}
COMPILED = "statistics steps run compiled"
BEFORE_2_6 = not hasattr(torch.compiler, "set_stance")
pytestmark = pytest.mark.skipif(BEFORE_2_6, reason="torch 2.5 takes statistics uncompiled")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with inductor.patch(compile_threads=1):  # more would be processes that import torch
        yield
    torch._dynamo.reset()


class Tokens(nn.Module):
    """Attention over tokens with a fused projection, and a layer without bias; padded tokens are zero."""

    def __init__(self, width: int = 6, classes: int = 3) -> None:
        super().__init__()
        self.fused = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.fused(x).chunk(3, -1)
        return self.head(x + self.out(F.scaled_dot_product_attention(query, key, value)))


class Tied(nn.Module):
    """A table that is the output layer, too, as a language model has it."""

    def __init__(self, padding: int | None = None, lookups: int = 1) -> None:
        super().__init__()
        self.lookups = lookups
        self.table = nn.Embedding(9, 6, padding_idx=padding)
        self.up, self.head = nn.Linear(6, 6, bias=False), nn.Linear(6, 9, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        rows = sum(self.table(x.roll(shift, 1)) for shift in range(self.lookups))
        return self.head(self.up(rows).tanh())


class Twice(nn.Module):
    """One layer, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shared(self.shared(x).tanh()).tanh())


def steps(
    model: nn.Module,
    optimizer: KFAC,
    batches: list[tuple[Tensor, Tensor]],
    positions: Callable[[Tensor], Any] = lambda mask: None,
) -> None:
    """Steps on sequences, of which the loss leaves out positions with target -1."""
    for x, y in batches:
        optimizer.zero_grad()
        mask = (y >= 0).to(next(model.parameters()).dtype)
        with optimizer.capture(positions(mask), loss_normalizer=mask.sum()):
            F.cross_entropy(model(x).flatten(0, -2), y.flatten(), ignore_index=-1).backward()
        optimizer.step()


def sequences(count: int = 8, length: int = 5) -> tuple[Tensor, Tensor]:
    x, y = torch.randn(count, length, 6, dtype=torch.float64), torch.randint(3, (count, length))
    y[torch.arange(length) >= torch.randint(1, length + 1, (count, 1))] = -1
    return x, y


def pair(make: Callable[[], nn.Module], **options: Any) -> tuple[nn.Module, Any, KFAC, nn.Module, KFAC]:
    """A model, the same compiled, its optimizer, and both for a twin that is not."""
    model = make().double()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    return model, compiled, KFAC(compiled, **OPTIONS, **options), twin, KFAC(twin, **OPTIONS, **options)


def assert_same(model: nn.Module, optimizer: KFAC, twin: nn.Module, other: KFAC) -> None:
    assert optimizer.coverage().note == COMPILED
    assert_same_factors(optimizer.factors(), other.factors(), rtol=1e-9, atol=1e-12)
    assert_same_parameters(model, twin, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("in_place", [False, True], ids=["torch.compile", "module.compile"])
def test_one_graph_more_and_no_break(in_place: bool) -> None:
    """The first statistics step runs uncompiled, all other steps compiled; with statistics or not, in turns."""
    model, backend = Patches(), CompileCounterWithBackend("aot_eager")
    compiled: Any = model
    if in_place:
        model.compile(backend=backend)
    else:
        compiled = torch.compile(model, backend=backend)
    optimizer = KFAC(compiled, **OPTIONS)
    frames = []
    for _ in range(8):
        train(compiled, optimizer, [images()])
        frames.append(backend.frame_count)
    assert frames == [0, 1, 2, 2, 2, 2, 2, 2]
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    assert optimizer.coverage().note == COMPILED


def test_statistics_at_every_step_need_one_graph() -> None:
    model, backend = Patches(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=backend)
    optimizer = KFAC(compiled, factor_interval=1, refresh_interval=4)
    train(compiled, optimizer, [images() for _ in range(4)])
    assert backend.frame_count == 1


@pytest.mark.parametrize("positions", [lambda mask: None, lambda mask: mask, lambda mask: "gradient"])
@pytest.mark.parametrize("approximation", ["expand", "reduce", "mixed"])
def test_linear_layers_as_uncompiled(approximation: str, positions: Callable[[Tensor], Any]) -> None:
    options: dict[str, Any] = {"approximation": approximation, "output_splits": {"fused": 3}}
    model, compiled, optimizer, twin, other = pair(Tokens, **options)
    batches = [sequences() for _ in range(4)]
    steps(compiled, optimizer, batches, positions)
    steps(twin, other, batches, positions)
    assert_same(model, optimizer, twin, other)


POSITIONS: list[Callable[[Tensor], Any]] = [lambda mask: None, lambda mask: mask, lambda mask: "gradient"]
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


class Broken(nn.Module):
    """Graphs that break in a loop, which dynamo leaves uncompiled as a whole, but not what is called in it."""

    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 3)])
        self.breaks = breaks
        self.register_buffer("scale", torch.rand(1, 16, 6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        x = x * self.scale[:, :length].to(x.device).to(x.dtype)
        for layer in self.layers:
            if self.breaks:
                torch._dynamo.graph_break()
            x = layer(x.unflatten(dim=-1, sizes=(-1, 2)).flatten(-2)).tanh()
        return x


@pytest.mark.parametrize("breaks", [False, True])
def test_broken_graphs(breaks: bool) -> None:
    torch.manual_seed(0)
    model = Broken(breaks).double()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=not breaks)
    optimizer, other = KFAC(compiled, **OPTIONS), KFAC(twin, **OPTIONS)
    batches = [sequences() for _ in range(4)]
    steps(compiled, optimizer, batches)
    steps(twin, other, batches)
    assert_same(model, optimizer, twin, other)


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul, T": lambda h, table: torch.matmul(h, table.T),
    "@, t()": lambda h, table: h @ table.t(),
    ".matmul, transpose": lambda h, table: h.matmul(table.transpose(0, 1)),
    "mm, mT": lambda h, table: torch.mm(h.flatten(0, -2), table.mT).unflatten(0, h.shape[:-1]),
}


class Translation(nn.Module):
    """A table that encoder and decoder look up, and the output layer multiplies by, as AlgoPerf's wmt has it."""

    def __init__(self, product: str = "matmul, T", padding: int | None = None, lookups: int = 2) -> None:
        super().__init__()
        self.product, self.lookups = PRODUCTS[product], lookups
        self.table = nn.Embedding(9, 6, padding_idx=padding)
        self.encoder, self.decoder = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.encoder(self.table(x)).tanh()
        for shift in range(1, self.lookups):
            h = self.decoder(h + self.table(x.roll(shift, 1))).tanh() if shift == 1 else h + self.table(x.flip(1))
        return self.product(h, self.table.weight) / 2.0


def translated(count: int = 8) -> tuple[Tensor, Tensor]:
    _, y = sequences(count)
    return torch.randint(9, y.shape), torch.where(y < 0, y, 2 * y)


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


@pytest.mark.parametrize("make", [Tied, Translation])
def test_a_resumed_table(make: Callable[[], nn.Module]) -> None:
    compiled = torch.compile(make(), backend="aot_eager")
    optimizer, fresh = KFAC(compiled, **OPTIONS), KFAC(compiled, **OPTIONS)
    steps(compiled, optimizer, [(torch.randint(9, (4, 5)), torch.randint(9, (4, 5)))])
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    assert fresh.coverage().note == optimizer.coverage().note == COMPILED


def test_some_of_the_rows() -> None:
    model, compiled, optimizer, twin, other = pair(Tokens, statistics_rows=10, approximation="expand")
    batches = [sequences() for _ in range(3)]
    steps(compiled, optimizer, batches, lambda mask: {"fused": mask, "*": "gradient"})
    steps(twin, other, batches, lambda mask: {"fused": mask, "*": "gradient"})
    assert_same(model, optimizer, twin, other)


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_convolutions(approximation: str) -> None:
    model, compiled, optimizer, twin, other = pair(convnet, approximation=approximation)
    batches = [(x.double(), y) for x, y in [images() for _ in range(3)]]
    train(compiled, optimizer, batches)
    train(twin, other, batches)
    assert_same(model, optimizer, twin, other)


def test_other_batch_sizes() -> None:
    """The last batch of an epoch: it is counted as it is, not as the batch that layers were first seen with."""
    model, compiled, optimizer, twin, other = pair(Tokens, approximation="reduce")
    batches = [sequences(n) for n in (8, 8, 8, 8, 5, 7, 6, 8, 8)]
    steps(compiled, optimizer, batches, lambda mask: mask)
    steps(twin, other, batches, lambda mask: mask)
    assert_same(model, optimizer, twin, other)


def test_micro_batches_in_captures_of_their_own() -> None:
    model, compiled, optimizer, twin, other = pair(Tokens, approximation="expand")
    batches = [sequences() for _ in range(4)]
    for net, one in ((compiled, optimizer), (twin, other)):
        for x, y in batches:
            one.zero_grad()
            for part_x, part_y in zip(x.chunk(2), y.chunk(2), strict=True):
                with one.capture(loss_normalizer=8):
                    loss = F.cross_entropy(
                        net(part_x).flatten(0, 1), part_y.flatten(), ignore_index=-1, reduction="sum"
                    )
                    (loss / 8).backward()
            one.step()
    assert_same(model, optimizer, twin, other)


def test_autocast() -> None:
    """Products in bfloat16, sums of theirs in float32, as uncompiled: to the rounding of bfloat16."""
    torch.manual_seed(0)
    model = Patches()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager")
    both = [(compiled, KFAC(compiled, **OPTIONS)), (twin, KFAC(twin, **OPTIONS))]
    x, y = images()
    for net, optimizer in both:
        for _ in range(3):
            optimizer.zero_grad()
            with optimizer.capture():
                with torch.autocast("cpu", torch.bfloat16):
                    loss = F.cross_entropy(net(x), y)
                loss.backward()
            optimizer.step()
    (_, mine), (_, theirs) = both
    assert mine.coverage().note == COMPILED
    for name, factors in theirs.factors().items():
        for got, want in zip(mine.factors()[name], factors, strict=True):
            assert isinstance(got, Tensor)
            assert isinstance(want, Tensor)
            assert (got - want).norm() < 0.02 * want.norm()


def test_what_cannot_be_taken_runs_uncompiled_and_is_named() -> None:
    model, backend = Twice(), CompileCounterWithBackend("aot_eager")
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend=backend)
    optimizer, other = KFAC(compiled, **OPTIONS), KFAC(twin, **OPTIONS)
    batches = [(torch.randn(8, 5), torch.randint(3, (8,))) for _ in range(4)]
    train(compiled, optimizer, batches)
    train(twin, other, batches)
    assert backend.frame_count == 1
    assert optimizer.coverage().note == "statistics steps run uncompiled: layer shared is called 2 times"
    assert str(optimizer.coverage()).endswith(optimizer.coverage().note)
    assert not other.coverage().note
    assert_same_factors(optimizer.factors(), other.factors())


def test_gradients_for_given_parameters_run_uncompiled() -> None:
    model = Patches()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = KFAC(compiled, **OPTIONS)
    params = list(model.parameters())
    for x, y in [images() for _ in range(3)]:
        optimizer.zero_grad()
        with optimizer.capture():
            grads = torch.autograd.grad(F.cross_entropy(compiled(x), y), params)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        optimizer.step()
    assert optimizer.coverage().note == "statistics steps run uncompiled: gradients are taken for given parameters"


def test_a_sampled_fisher_runs_uncompiled() -> None:
    model = Patches()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = KFAC(compiled, fisher="mc", **OPTIONS)
    train(compiled, optimizer, [images() for _ in range(3)], fisher_loss="softmax_cross_entropy")
    assert optimizer.coverage().note == "statistics steps run uncompiled: fisher='mc'"


def test_a_failed_batch_leaves_nothing_behind() -> None:
    """Sums that a graph handed out before an exception are not those of the next batch."""
    model, compiled, optimizer, twin, other = pair(Patches)
    batches = [(x.double(), y) for x, y in [images() for _ in range(3)]]
    train(compiled, optimizer, batches[:2])
    train(twin, other, batches)

    def fails() -> None:
        with optimizer.capture():
            compiled(batches[2][0]).sum().backward()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    train(compiled, optimizer, batches[2:])
    assert_same(model, optimizer, twin, other)


class Normed(nn.Module):
    """Few operations, as each kernel of theirs is a C++ program to compile; a norm is rounded in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.head = nn.Linear(64, 12), nn.LayerNorm(12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.norm(self.up(x.flatten(1)))))


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_takes_the_same_steps_compiled(stop: int) -> None:
    """Bit for bit, with a compiler whose graphs round otherwise than uncompiled code."""
    torch.manual_seed(0)
    batches = [images() for _ in range(5)]
    model = Normed()
    compiled = torch.compile(model, backend="inductor")
    optimizer = KFAC(compiled, **OPTIONS)
    train(compiled, optimizer, batches[:stop])
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(compiled, optimizer, batches[stop:])

    resumed = Normed()
    resumed.load_state_dict(saved["model"])
    again = torch.compile(resumed, backend="inductor")
    fresh = KFAC(again, **OPTIONS)
    fresh.load_state_dict(saved["optimizer"])
    assert fresh.coverage().note == COMPILED
    train(again, fresh, batches[stop:])
    assert_same_factors(fresh.factors(), optimizer.factors(), rtol=0, atol=0)
    assert_same_parameters(resumed, model, rtol=0, atol=0)


def test_what_was_not_learnt_is_learnt_after_loading() -> None:
    """A state of an optimizer that saw nothing, and one from before there were any sights."""
    compiled = torch.compile(Patches(), backend="aot_eager")
    optimizer = KFAC(compiled, **OPTIONS)
    unseen = copy.deepcopy(optimizer.state_dict())
    train(compiled, optimizer, [images() for _ in range(3)])
    older = copy.deepcopy(optimizer.state_dict())
    del older["kfac"]["sights"]
    for state in (unseen, older):
        optimizer.load_state_dict(state)
        assert "the first one does" in optimizer.coverage().note
        train(compiled, optimizer, [images() for _ in range(3)])
        assert optimizer.coverage().note == COMPILED


def test_a_copy_learns_anew() -> None:
    model = Patches()
    model.compile(backend="aot_eager")
    optimizer = KFAC(model, **OPTIONS)
    train(model, optimizer, [images() for _ in range(3)])
    copied, its = copy.deepcopy((model, optimizer))
    assert "the first one does" in its.coverage().note
    batches = [images() for _ in range(4)]
    train(model, optimizer, batches)
    train(copied, its, batches)
    assert_same_parameters(model, copied, rtol=1e-4, atol=1e-5)
