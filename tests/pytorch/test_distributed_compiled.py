"""Several processes whose models are compiled: statistics are taken in the graphs, and are those of one process."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from algoperf_kfac.pytorch import KFAC
from tests.pytorch import processes
from tests.pytorch.two_processes import OPTIONS, WORLD, assert_like, plain, result

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")

COMPILED = "statistics steps run compiled"
VOCABULARY, WIDTH, EXAMPLES = 50, 256, 4


class Language(nn.Module):
    """A tied table, and layers of half a megabyte each, that buckets of gradients split into several graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=k % 2 == 0) for k in range(6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x) + self.table(x.roll(1, 1))
        for layer in self.layers:
            h = h + layer(h).tanh()
        return torch.matmul(h, self.table.weight.T) / WIDTH**0.5


def sentences(steps: int) -> list[tuple[Tensor, Tensor]]:
    size = (WORLD * EXAMPLES, 7)
    return [(torch.randint(VOCABULARY, size), torch.randint(VOCABULARY, size)) for _ in range(steps)]


def trained(optimizer: KFAC, model: Any, data: list[tuple[Tensor, Tensor]], rank: int | None) -> None:
    for x, y in data:
        mine = slice(None) if rank is None else slice(rank * EXAMPLES, (rank + 1) * EXAMPLES)
        optimizer.zero_grad()
        with optimizer.capture():
            F.cross_entropy(model(x[mine]).flatten(0, 1), y[mine].flatten()).backward()
        optimizer.step()


def language(rank: int | None, wrap: Callable[[nn.Module], Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Language().double()
    wrapped = wrap(model)
    optimizer = KFAC(wrapped, **OPTIONS)
    trained(optimizer, wrapped, sentences(6), rank)
    return result(model, optimizer, note=str(optimizer.coverage().note))


def compiled_graphs(rank: int) -> dict[str, Any]:
    """With buckets that hold a layer or two."""
    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def wrap(model: nn.Module) -> Any:
        return torch.compile(DistributedDataParallel(model, bucket_cap_mb=1), backend=backend)

    return language(rank, wrap) | {"graphs": len(graphs)}


def images(rank: int) -> dict[str, Any]:
    torch._dynamo.reset()
    return plain(rank, lambda model: torch.compile(DistributedDataParallel(model), backend="aot_eager"))


def resumed(rank: int) -> dict[str, Any]:
    """From what only the first process saves: also the first statistics step runs compiled, as it would have."""
    torch._dynamo.reset()
    data = sentences(9)
    model = Language().double()
    wrapped: Any = torch.compile(DistributedDataParallel(model), backend="aot_eager")
    optimizer = KFAC(wrapped, **OPTIONS)
    trained(optimizer, wrapped, data[:5], rank)
    saved: list[Any] = [copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})]
    dist.broadcast_object_list(saved, src=0)
    other = Language().double()
    other.load_state_dict(saved[0]["model"])
    wrapped_again: Any = torch.compile(DistributedDataParallel(other), backend="aot_eager")
    fresh = KFAC(wrapped_again, **OPTIONS)
    fresh.load_state_dict(saved[0]["optimizer"])
    note = str(fresh.coverage().note)
    trained(optimizer, wrapped, data[5:], rank)
    trained(fresh, wrapped_again, data[5:], rank)
    return {"continued": result(model, optimizer), "resumed": result(other, fresh), "note": note}


class Deep(nn.Module):
    """A layer that is called as often as is said."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, calls: int = 1) -> Tensor:
        for _ in range(calls):
            x = self.a(x).tanh()
        return self.b(x)


def one_leaves(rank: int) -> dict[str, Any]:
    """On one process a layer is called twice in a step that runs compiled: that process alone goes on without."""
    torch._dynamo.reset()
    model = Deep().double()
    wrapped: Any = torch.compile(DistributedDataParallel(model), backend="aot_eager")
    optimizer = KFAC(wrapped, factor_interval=2, refresh_interval=4, learning_rate=1e-3, initial_statistics=1)
    for step in range(10):
        x, y = torch.randn(8, 6, dtype=torch.float64), torch.randint(3, (8,))
        optimizer.zero_grad()
        with warnings.catch_warnings(), optimizer.capture():
            warnings.simplefilter("ignore")
            calls = 2 if (rank, step) == (1, 4) else 1
            F.cross_entropy(wrapped(x[rank::2], calls), y[rank::2]).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
    dropped = {name: count for name, count in optimizer.metrics().items() if name.endswith("dropped")}
    return result(model, optimizer, note=str(optimizer.coverage().note), dropped=dropped)


def rehearsed(rank: int) -> dict[str, Any]:
    """A process by itself among others, and one of DistributedDataParallel that comes around the model later: who
    joins whom shows in the rehearsal, so that the first statistics step runs compiled."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    found: dict[str, Any] = {}
    for name, parallel in (("apart", False), ("together", True)):
        torch._dynamo.reset()
        graphs.clear()
        torch.manual_seed(0)
        model = Language().double()
        twin = copy.deepcopy(model)
        compiled: Any = torch.compile(model, backend=backend)
        optimizer, other = KFAC(compiled, **OPTIONS), KFAC(twin, **OPTIONS)
        wrapped = DistributedDataParallel(compiled) if parallel else compiled
        data = sentences(4)
        x, y = data[0]
        with optimizer.rehearsal(parts=EXAMPLES // 2):
            F.cross_entropy(wrapped(x[:2]).flatten(0, 1), y[:2].flatten()).backward()
        trained(optimizer, wrapped, data[:1], rank)
        count = len(graphs)
        trained(optimizer, wrapped, data[1:], rank)
        trained(other, DistributedDataParallel(twin) if parallel else twin, data, rank)
        found[name] = {"graphs": count, "got": result(model, optimizer), "want": result(twin, other)}
    return found


CASES: dict[str, Callable[[int], Any]] = {
    "uncompiled": lambda rank: language(rank, DistributedDataParallel),
    "compiled": compiled_graphs,
    "images": images,
    "resumed": resumed,
    "one_leaves": one_leaves,
    "rehearsed": rehearsed,
}


def worker(rank: int, world: int, folder: str) -> None:
    processes.run_cases(CASES, rank, world, folder)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return processes.ranks_of(worker, tmp_path_factory)(WORLD)


def test_graphs_that_buckets_split(ranks: list[dict[str, Any]]) -> None:
    alone = language(None, lambda model: model)
    for results in ranks:
        found = results["compiled"]
        assert found["note"] == COMPILED
        assert found["graphs"] > 2  # there would be two of a whole model: with statistics and without
        assert "table" in found["factors"]
        assert_like(found, results["uncompiled"], rtol=1e-9, atol=1e-12)
        assert_like(found, alone, rtol=1e-7, atol=1e-9)
    assert_like(ranks[1]["compiled"], ranks[0]["compiled"], rtol=0, atol=0)


def test_convolutions(ranks: list[dict[str, Any]]) -> None:
    alone = plain(None, lambda model: model)
    for results in ranks:
        assert_like(results["images"], alone, rtol=1e-7, atol=1e-9)


def test_a_resumed_run_takes_the_same_steps(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        found = results["resumed"]
        assert found["note"] == COMPILED
        assert_like(found["resumed"], found["continued"], rtol=0, atol=0)


def test_one_process_may_go_on_uncompiled(ranks: list[dict[str, Any]]) -> None:
    first, second = (results["one_leaves"] for results in ranks)
    assert first["note"] == COMPILED
    assert "not used in the same way" in second["note"]
    assert first["dropped"] == second["dropped"]
    assert sum(first["dropped"].values()) > 0
    assert_like(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("case", ["apart", "together"])
def test_the_first_step_behind_a_rehearsal(ranks: list[dict[str, Any]], case: str) -> None:
    for results in ranks:
        found = results["rehearsed"][case]
        assert found["graphs"] > 0
        assert_like(found["got"], found["want"], rtol=1e-9, atol=1e-12)
