"""Directions are shared out among processes, layer by layer, and the training is that of a single process."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from algoperf_kfac.assignment import assign, deal
from algoperf_kfac.config import KFACConfig
from algoperf_kfac.pytorch import KFAC
from algoperf_kfac.pytorch.scalings import scaling_of
from algoperf_kfac.pytorch.stacks import Stack
from tests.pytorch import processes
from tests.pytorch.processes import Ranks
from tests.pytorch.test_distributed_refresh import leaves
from tests.pytorch.toys import SCALE_SENSITIVE

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")

BATCH, STEPS = 8, 12
INTERVALS = {"factor_interval": 2, "refresh_interval": 6, "initial_statistics": 3}
SENSITIVE: dict[str, Any] = {**SCALE_SENSITIVE, "damping": 0.1, "learning_rate": 3e-3}
POLAR: dict[str, Any] = {"scaling": "polar", "length": "rms", "damping": 0.1, "learning_rate": 3e-3}
CASES: dict[str, dict[str, Any]] = {
    "power": SENSITIVE,
    "grafted": {"learning_rate": 3e-3, "damping": 0.1},
    "inverse": {**SENSITIVE, "scaling": "power", "preconditioner": "inverse"},
    "polar": POLAR,
    "second_moment": {**SENSITIVE, "scaling": "second_moment", "damping": 0.3},
    "one_layer": SENSITIVE,
    "bf16": {"learning_rate": 3e-3, "damping": 0.1},
    "off": SENSITIVE,
}
# Four processes on fewer cores are slow: they run these.
OF_FOUR = ("power", "polar")
RUNS = [(2, case) for case in CASES] + [(4, case) for case in OF_FOUR]
NOT_DEALT = ("second_moment", "one_layer", "off")


class Net(nn.Module):
    """Six equal layers, some of which a step may leave out, grouped convolutions and some of other sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 6)
        self.convs = nn.ModuleList(nn.Conv1d(4, 4, 3, padding=1, groups=2) for _ in range(3))
        self.equal = nn.ModuleList(nn.Linear(6, 6) for _ in range(6))
        self.wide = nn.Linear(6, 20, bias=False)
        self.head = nn.Linear(20, 3)

    def forward(self, x: Tensor, skipped: tuple[int, ...] = ()) -> Tensor:
        x = self.embed(x)
        for layer in self.convs:
            x = x + layer(x).tanh()
        for number, layer in enumerate(self.equal):
            if number not in skipped:
                x = x + layer(x).tanh()
        return self.head(self.wide(x).tanh().mean(1))


class Lonely(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor, skipped: tuple[int, ...] = ()) -> Tensor:
        return self.head(x.mean(1))


def left_out(step: int) -> tuple[int, ...]:
    """Off statistics steps one layer, two of another process's, or the layers of one process altogether."""
    return {3: (2,), 5: (4, 5), 7: (0, 1, 2)}.get(step, ())


def made(case: str) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model = Lonely() if case == "one_layer" else Net()
    options = {**INTERVALS, **CASES[case]}
    if case == "off":
        options["share_directions"] = False
    return model.to(torch.bfloat16 if case == "bf16" else torch.float64), options


@contextmanager
def counting(names: list[list[str]]) -> Iterator[None]:
    """Notes the layers of which this process makes directions, call by call."""
    directions = Stack.directions

    def watched(self: Stack, scaling: Any, momentum: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        names.append(self.names[start:stop])
        return directions(self, scaling, momentum, start, stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stack, "directions", watched)
        yield


def batch(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, 4, 5, generator=source).to(dtype), torch.randint(3, (BATCH,), generator=source)


def train(model: nn.Module, optimizer: KFAC, steps: range, mine: slice) -> None:
    dtype = next(model.parameters()).dtype
    for step in steps:
        x, y = batch(step, dtype)
        optimizer.zero_grad()
        with optimizer.capture():
            F.cross_entropy(model(x[mine], left_out(step)), y[mine]).backward()
        optimizer.step()


def run(case: str, world: int, rank: int) -> dict[str, Any]:
    """Train on this process's share of the batches, and once more from a state in the middle of an interval."""
    model, options = made(case)
    if world == 1:
        options.pop("share_directions", None)

    def wrap(model: nn.Module) -> nn.Module:
        return DistributedDataParallel(model, find_unused_parameters=True) if world > 1 else model

    wrapped, names = wrap(model), []
    optimizer = KFAC(wrapped, **options)
    mine = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    with counting(names):
        train(wrapped, optimizer, range(8), mine)
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        train(wrapped, optimizer, range(8, STEPS), mine)
    again, _ = made(case)
    again.load_state_dict(saved[0])
    parallel = wrap(again)
    resumed = KFAC(parallel, **options)
    resumed.load_state_dict(saved[1])
    train(parallel, resumed, range(8, STEPS), mine)
    return {
        "model": model.state_dict(),
        "state": optimizer.state_dict(),
        "resumed": again.state_dict(),
        "metrics": optimizer.metrics(),
        "names": names,
    }


def own_gradients(rank: int) -> dict[str, Any]:
    """Without averages of the gradients, as between two averages of local steps."""
    model, options = made("power")
    names: list[list[str]] = []
    optimizer = KFAC(model, process_group=dist.group.WORLD, **options)
    with counting(names), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, optimizer, range(5), slice(4 * rank, 4 * rank + 4))
    return {"names": names, "said": [str(w.message) for w in caught]}


def idle_on_one(rank: int) -> dict[str, Any]:
    """Gradients averaged by hand, and on one step a layer without any on one process: nobody waits for it."""
    model, options = made("power")
    optimizer = KFAC(model, process_group=dist.group.WORLD, **options)
    for step in range(5):
        x, y = batch(step, torch.float64)
        optimizer.zero_grad()
        with optimizer.capture():
            F.cross_entropy(model(x[4 * rank : 4 * rank + 4]), y[4 * rank : 4 * rank + 4]).backward()
        for p in model.parameters():
            assert p.grad is not None
            dist.all_reduce(p.grad)
            p.grad /= 2
        if step == 3 and rank == 0:
            model.equal[0].weight.grad = None
        optimizer.step()
    return {"steps": optimizer.metrics()["steps"]}


def worker(rank: int, world: int, folder: str) -> None:
    with processes.joined(rank, world, folder):
        results = {case: run(case, world, rank) for case in (OF_FOUR if world == 4 else CASES)}
        if world == 2:
            results |= {"own_gradients": own_gradients(rank), "idle_on_one": idle_on_one(rank)}
        processes.save(results, rank, folder)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """The results of all processes of a number of them, for all cases."""
    return processes.ranks_of(worker, tmp_path_factory)


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    return processes.alone_of(run, CASES)


@pytest.mark.parametrize(("world", "case"), RUNS)
def test_same_training_as_one_process(world: int, case: str, ranks: Ranks, alone: dict[str, Any]) -> None:
    tolerance = {"rtol": 1e-6, "atol": 1e-8}
    if case == "second_moment":  # not dealt; inputs that differ by 1e-15 change the training of one process by 2e-5
        tolerance = {"rtol": 1e-3, "atol": 1e-4}
    elif case == "bf16":  # gradients of halves of a batch are rounded otherwise than those of the whole one
        tolerance = {"rtol": 0.1, "atol": 0.02}
    for results in ranks(world):
        torch.testing.assert_close(results[case]["model"], alone[case]["model"], **tolerance)


@pytest.mark.parametrize(("world", "case"), RUNS)
def test_processes_agree_bit_for_bit(world: int, case: str, ranks: Ranks) -> None:
    """Parameters, and all that is kept and counted; a resumed run goes on with the same bits."""
    first = ranks(world)[0][case]
    assert first["metrics"]["stand_ins"] == 0
    # The check of G^T A at the first step is of each process's own examples, and sees the rounding of bf16.
    alike = ("model",) if case == "bf16" else ("model", "state", "metrics")
    for results in ranks(world):
        for key in alike:
            assert leaves(results[case][key]) == leaves(first[key])
        assert leaves(results[case]["resumed"]) == leaves(first["model"])


def counts(calls: list[list[str]]) -> dict[str, int]:
    """How often the direction of each layer was made."""
    names = [name for call in calls for name in call]
    return {name: names.count(name) for name in sorted(set(names))}


@pytest.mark.parametrize(("world", "case"), RUNS)
def test_every_direction_is_made_once(world: int, case: str, ranks: Ranks, alone: dict[str, Any]) -> None:
    """Or by all, where they are not dealt; those of one process's equal layers in one product."""
    found = [counts(results[case]["names"]) for results in ranks(world)]
    want = counts(alone[case]["names"])
    if case in NOT_DEALT:
        assert all(one == want for one in found)
        return
    assert all(found)
    assert {name: count for one in found for name, count in one.items()} == want
    assert sum(len(one) for one in found) == len(want)
    for results in ranks(world):
        equal = [{name for name in call if name.startswith("equal")} for call in results[case]["names"]]
        assert set().union(*equal) in equal


@pytest.mark.parametrize("case", ["power", "polar"])
def test_every_process_makes_about_its_share(case: str, ranks: Ranks) -> None:
    config = KFACConfig(**CASES[case])
    specs = {layer.name: layer for layer in KFAC(made(case)[0], config=config).coverage().layers}
    work = [
        sum(scaling_of(config).flops(specs[name]).step for name in counts(results[case]["names"]))
        for results in ranks(2)
    ]
    assert max(work) / sum(work) < 0.6


def test_gradients_that_differ_are_not_dealt(ranks: Ranks, alone: dict[str, Any]) -> None:
    for results in ranks(2):
        found = results["own_gradients"]
        assert sum("processes have different gradients of " in text for text in found["said"]) == 1
        assert set(counts(found["names"])) == set(counts(alone["power"]["names"]))


def test_a_layer_without_gradient_on_one_process_leaves_nobody_waiting(ranks: Ranks) -> None:
    for results in ranks(2):
        assert results["idle_on_one"]["steps"] == 5


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_equal_jobs_of_a_worker_stand_side_by_side(workers: int) -> None:
    costs = [7, 4, 7, 4, 4, 7, 9, 4, 7]
    owners, greedy = deal(costs, workers), assign(costs, workers)
    for cost in set(costs):
        of_cost = [owner for owner, c in zip(owners, costs, strict=True) if c == cost]
        assert of_cost == sorted(of_cost)
        assert of_cost == sorted(owner for owner, c in zip(greedy, costs, strict=True) if c == cost)
