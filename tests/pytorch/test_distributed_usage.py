"""Several processes, used in the ways of real training loops: nothing hangs, and the training is one process's."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from algoperf_kfac.pytorch import KFAC, MissingStatisticsError
from tests.pytorch import processes
from tests.pytorch.toys import Patches
from tests.pytorch.two_processes import BATCH, OPTIONS, WORLD, assert_like, batches, plain, result, share

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


def accumulated(rank: int) -> dict[str, Any]:
    """Micro-batches of three and one examples, the first within no_sync."""
    torch.manual_seed(0)
    model = Patches().double()
    parallel = DistributedDataParallel(model)
    optimizer = KFAC(parallel, **OPTIONS)
    for x, y in batches():
        x, y = x[share(rank)], y[share(rank)]
        optimizer.zero_grad()
        with parallel.no_sync(), optimizer.capture(loss_normalizer=float(len(x))):
            (F.cross_entropy(parallel(x[:3]), y[:3], reduction="sum") / len(x)).backward()
        with optimizer.capture(loss_normalizer=float(len(x))):
            (F.cross_entropy(parallel(x[3:]), y[3:], reduction="sum") / len(x)).backward()
        optimizer.step()
    return result(model, optimizer)


def uneven(rank: int, sizes: tuple[int, int]) -> dict[str, Any]:
    """Processes with different numbers of examples: the loss is divided by the count of all."""
    torch.manual_seed(0)
    model = Patches().double()
    parallel = DistributedDataParallel(model)
    optimizer = KFAC(parallel, **OPTIONS)
    for x, y in batches():
        mine = slice(0, sizes[0]) if rank == 0 else slice(sizes[0], None)
        optimizer.zero_grad()
        with optimizer.capture(loss_normalizer=BATCH / WORLD):
            loss = F.cross_entropy(parallel(x[mine]), y[mine], reduction="sum")
            (loss * WORLD / BATCH).backward()
        optimizer.step()
    return result(model, optimizer)


class Sides(nn.Module):
    """Two sides on raw parameters, in an order of the caller's choice, and a detour that may be off."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Parameter(0.3 * torch.randn(5, 4))
        self.right = nn.Parameter(0.3 * torch.randn(5, 4))
        self.detour = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor, order: str, detour: bool) -> Tensor:
        sides = {}
        for side in order.split():
            sides[side] = F.linear(x, getattr(self, side)).tanh()
        h = sides["left"] * sides["right"]
        return self.head(h + self.detour(h) if detour else h)


def uses_detour(step: int, rank: int) -> bool:
    """On all processes on statistics steps; else on all, on one, or on none."""
    return step in (0, 1, 2) or step % 2 == 0 or (step % 4 == 3 and rank == 0)


def sides(rank: int | None) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Sides().double()
    wrapped = model if rank is None else DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = KFAC(wrapped, **OPTIONS)
    for step in range(13):
        x, y = torch.randn(BATCH, 4, dtype=torch.float64), torch.randint(3, (BATCH,))
        optimizer.zero_grad()
        with optimizer.capture():
            if rank is None and not optimizer.is_statistics_step:
                parts = [wrapped(x[share(r)], "left right", uses_detour(step, r)) for r in range(WORLD)]
                F.cross_entropy(torch.cat(parts), y).backward()
            else:
                mine = slice(None) if rank is None else share(rank)
                order = "right left" if rank == 1 else "left right"
                F.cross_entropy(wrapped(x[mine], order, uses_detour(step, rank or 0)), y[mine]).backward()
        optimizer.step()
    return result(model, optimizer, layers=[layer.name for layer in optimizer.coverage().layers])


class Experts(nn.Module):
    """Weights of two sizes in a list; each example goes through one, and who comes first is the caller's choice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 5)
        self.experts = nn.ParameterList([nn.Parameter(0.3 * torch.randn(5, size)) for size in (5, 7)])
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor, route: Tensor, order: str) -> Tensor:
        h = self.inner(x).tanh()
        out = torch.zeros_like(h)
        for number in map(int, order.split()):
            rows = (route == number).nonzero()[:, 0]
            if len(rows):
                out = out.index_add(0, rows, (h[rows] @ self.experts[number])[:, :5])
        return self.head(h + out)


def experts(rank: int | None, routes: list[list[int]]) -> dict[str, Any]:
    """The second process calls them in another order, and perhaps one alone."""
    torch.manual_seed(0)
    model = Experts().double()
    wrapped = model if rank is None else DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = KFAC(wrapped, **OPTIONS)
    for step in range(8):
        x, y = torch.randn(BATCH, 4, dtype=torch.float64), torch.randint(3, (BATCH,))
        mine = slice(None) if rank is None else share(rank)
        x, y, route = x[mine], y[mine], torch.tensor(routes[step % len(routes)])[mine]
        optimizer.zero_grad()
        with optimizer.capture(loss_normalizer=len(x)):
            F.cross_entropy(wrapped(x, route, "1 0" if rank == 1 else "0 1"), y).backward()
        optimizer.step()
    layers = {layer.name: layer.weight for layer in optimizer.coverage().layers}
    return result(model, optimizer, layers=layers)


ROUTES = {
    "experts_in_another_order": [[0, 1, 0, 1, 0, 1, 0, 1]],
    "one_expert_on_one_process": [[0, 1, 0, 1, 1, 1, 1, 1]],
    "another_expert_on_each_process": [[0, 0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0, 0]],
}


def read_in_two_ways(rank: int) -> str:
    """One process adds a bias that the other does without: of the first one, A has a row more."""
    model = Sides()
    model.register_parameter("bias", nn.Parameter(torch.zeros(5)))
    optimizer = KFAC(model, process_group=dist.group.WORLD, **OPTIONS)
    with optimizer.capture():
        h = F.linear(torch.randn(6, 4), model.left, model.bias if rank else None)
        model.head(model.detour(h)).square().mean().backward()
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return "no error"


def sampled(rank: int) -> dict[str, Any]:
    """The same inputs on all processes, so that draws differ by the process alone; then a resumption."""
    torch.manual_seed(0)
    model = Patches()
    parallel = DistributedDataParallel(model)
    options = {**OPTIONS, "fisher": "mc", "fisher_samples": 2}
    optimizer = KFAC(parallel, seed=5, **options)
    draws: list[Tensor] = []
    multinomial = torch.multinomial

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        draws.append(multinomial(*args, **kwargs))
        return draws[-1]

    def train(parallel: nn.Module, optimizer: KFAC, data: list[tuple[Tensor, Tensor]]) -> None:
        for x, y in data:
            optimizer.zero_grad()
            for half in (slice(0, 4), slice(4, 8)):
                with optimizer.capture(loss_normalizer=8.0) as capture:
                    outputs = parallel(x[half].float())
                    capture.backward_fisher(outputs, "softmax_cross_entropy")
                    (F.cross_entropy(outputs, y[half], reduction="sum") / 8).backward()
            optimizer.step()

    data = batches(12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "multinomial", watched)
        train(parallel, optimizer, data[:7])
        # What only the first process saves, all load.
        saved: list[Any] = [copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})]
        dist.broadcast_object_list(saved, src=0)
        before = len(draws)
        train(parallel, optimizer, data[7:])
        continued = draws[before:]
        resumed = Patches()
        resumed.load_state_dict(saved[0]["model"])
        parallel = DistributedDataParallel(resumed)
        fresh = KFAC(parallel, seed=6, **options)
        fresh.load_state_dict(saved[0]["optimizer"])
        before = len(draws)
        train(parallel, fresh, data[7:])
    return {
        "draws": torch.stack(draws[: len(draws) - len(continued)]),
        "continued": continued,
        "resumed": draws[before:],
        "first": result(model, optimizer),
        "second": result(resumed, fresh),
    }


def all_missing(rank: int) -> dict[str, Any]:
    """A process whose model calls no layer on a step takes part all the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    scale = nn.Parameter(torch.ones(()))
    model.register_parameter("scale", scale)
    optimizer = KFAC(model, process_group=dist.group.WORLD, **OPTIONS)
    for step in range(4):
        optimizer.zero_grad()
        with warnings.catch_warnings(), optimizer.capture():
            warnings.simplefilter("ignore")
            out = torch.randn(6, 3) if (rank, step) == (1, 2) else model(torch.randn(6, 4))
            (out * scale).square().mean().backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
    return {"layers": [layer.name for layer in optimizer.coverage().layers]}


def nothing_captured(rank: int) -> str:
    """A process without capture, which must not leave the others waiting."""
    model = nn.Linear(4, 3)
    optimizer = KFAC(model, process_group=dist.group.WORLD, **OPTIONS)
    if rank == 0:
        with optimizer.capture():
            model(torch.randn(6, 4)).square().mean().backward()
    else:
        model(torch.randn(6, 4)).square().mean().backward()
    try:
        optimizer.step()
    except MissingStatisticsError as error:
        return str(error)
    return "no error"


def compiled(backend: str) -> Callable[[nn.Module], nn.Module]:
    return lambda model: torch.compile(DistributedDataParallel(model), backend=backend)


CASES: dict[str, Callable[[int], Any]] = {
    "plain": lambda rank: plain(rank, DistributedDataParallel),
    "compiled_eager": lambda rank: plain(rank, compiled("eager")),
    "compiled_aot_eager": lambda rank: plain(rank, compiled("aot_eager")),
    "accumulated": accumulated,
    "uneven": lambda rank: uneven(rank, (5, 3)),
    "very_uneven": lambda rank: uneven(rank, (7, 1)),
    "sides": sides,
    **{case: functools.partial(experts, routes=routes) for case, routes in ROUTES.items()},
    "read_in_two_ways": read_in_two_ways,
    "sampled": sampled,
    "all_missing": all_missing,
    "nothing_captured": nothing_captured,
}
LIKE_PLAIN = ["plain", "compiled_eager", "compiled_aot_eager", "accumulated", "uneven", "very_uneven"]


def worker(rank: int, world: int, folder: str) -> None:
    processes.run_cases(CASES, rank, world, folder)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return processes.ranks_of(worker, tmp_path_factory)(WORLD)


@pytest.mark.parametrize("case", LIKE_PLAIN)
def test_same_training_as_one_process(case: str, ranks: list[dict[str, Any]]) -> None:
    want = plain(None, lambda model: model)
    for results in ranks:
        assert_like(results[case], want, rtol=1e-7, atol=1e-9)
    assert_like(ranks[1][case], ranks[0][case], rtol=0, atol=0)


def test_unused_layers_and_another_order_of_raw_parameters(ranks: list[dict[str, Any]]) -> None:
    want = sides(None)
    assert sorted(want["layers"]) == ["detour", "head", "left", "right"]
    for results in ranks:
        assert_like(results["sides"], want, rtol=1e-7, atol=1e-9)
        assert results["sides"]["layers"] == ranks[0]["sides"]["layers"]
    assert_like(ranks[1]["sides"], ranks[0]["sides"], rtol=0, atol=0)


@pytest.mark.parametrize("case", ROUTES)
def test_a_raw_weight_has_one_name_on_all_processes(case: str, ranks: list[dict[str, Any]]) -> None:
    torch.manual_seed(0)
    want = experts(None, ROUTES[case])
    assert want["layers"]["experts.0"] == "experts.0"
    for results in ranks:
        assert_like(results[case], want, rtol=1e-7, atol=1e-9)
        assert list(results[case]["layers"].items()) == list(ranks[0][case]["layers"].items())
        assert results[case]["layers"] == want["layers"]
    assert_like(ranks[1][case], ranks[0][case], rtol=0, atol=0)


def test_a_weight_that_processes_read_in_different_ways_is_named_on_all(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        text = results["read_in_two_ways"]
        assert "processes 0 and 1 read a weight in different ways: layer left has bias=None and 'bias'" in text


def test_sampled_labels_are_independent(ranks: list[dict[str, Any]]) -> None:
    """Between processes, captures of a step, and steps: three classes agree by chance in a third of the draws."""
    first, second = (results["sampled"]["draws"].flatten(1) for results in ranks)
    assert first.shape == second.shape == (2 * 2 * 7, 4)  # samples, captures, statistics steps; examples
    for one, other in [(first, second), (first[2:], first[:-2]), (first[4:], first[:-4]), (first[1:], first[:-1])]:
        assert (one == other).double().mean() < 0.6


def test_sampled_labels_resume(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        sampled = results["sampled"]
        assert len(sampled["continued"]) == len(sampled["resumed"]) > 0
        for one, other in zip(sampled["continued"], sampled["resumed"], strict=True):
            assert one.equal(other)
        assert_like(sampled["second"], sampled["first"], rtol=0, atol=0)
    assert_like(ranks[1]["sampled"]["first"], ranks[0]["sampled"]["first"], rtol=0, atol=0)


def test_a_process_that_misses_all_layers(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        assert results["all_missing"]["layers"] == ["0", "2"]


def test_a_process_that_captured_nothing_is_named_on_all(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        assert "nothing was captured on process 1" in results["nothing_captured"]


def test_a_state_that_holds_a_generator_gives_its_seed() -> None:
    """As version 0.1.0 wrote them."""
    state = KFAC(nn.Linear(4, 3), seed=1).state_dict()
    del state["kfac"]["seed"]
    state["kfac"]["generator"] = torch.Generator().manual_seed(77).get_state()
    fresh = KFAC(nn.Linear(4, 3))
    fresh.load_state_dict(state)
    assert fresh.state_dict()["kfac"]["seed"] == 77
