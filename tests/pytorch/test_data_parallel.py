"""DistributedDataParallel on two processes follows one process on the joint batch."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from algoperf_kfac.pytorch import KFAC
from tests.pytorch import processes
from tests.pytorch.toys import SCALE_SENSITIVE, Functional, Patches, images

WORLD = 2
STEPS = 5
CASES: dict[str, dict[str, Any]] = {
    "expand": {"approximation": "expand"},
    "reduce": {"approximation": "reduce"},
    "inverse": {"approximation": "reduce", "preconditioner": "inverse"},
    "promoted": {"approximation": "expand"},
    "algoperf": {"approximation": "expand"},
    "uneven": {"approximation": "reduce"},
}
pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


def make(case: str) -> tuple[torch.nn.Module, dict[str, Any], list[Any]]:
    torch.manual_seed(0)
    model = (Functional() if case == "promoted" else Patches()).double()
    intervals = {"factor_interval": 2, "refresh_interval": 2, "initial_statistics": 1}
    options = {**intervals, **SCALE_SENSITIVE, **CASES[case]}
    batches = [(x.double(), y) for x, y in [images() for _ in range(STEPS)]]
    return model, options, batches


def result(model: torch.nn.Module, optimizer: KFAC) -> dict[str, Any]:
    factors = {name: tuple(pair) for name, pair in optimizer.factors().items()}
    return {"parameters": model.state_dict(), "factors": factors, "coverage": str(optimizer.coverage())}


def single_process(case: str) -> dict[str, Any]:
    model, options, batches = make(case)
    optimizer = KFAC(model, **options)
    for x, y in batches:
        optimizer.zero_grad()
        with optimizer.capture():
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return result(model, optimizer)


class Branches(torch.nn.Module):
    """Layers that run on one of the processes only, as with data-dependent control flow."""

    def __init__(self) -> None:
        super().__init__()
        self.here = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(WORLD))
        self.head = torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, branch: int) -> torch.Tensor:
        return self.head(self.here[branch](x).tanh())


def branches(rank: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Branches()
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = KFAC(parallel, factor_interval=1, refresh_interval=1)
    for step in range(3):
        optimizer.zero_grad()
        with warnings.catch_warnings(), optimizer.capture():
            warnings.simplefilter("ignore")
            branch = rank if step == 1 else 0
            parallel(torch.randn(6, 4), branch).square().mean().backward()
        optimizer.step()
    return result(model, optimizer) | {"coverage": str(optimizer.coverage().layers)}


def two_processes(case: str, rank: int) -> dict[str, Any]:
    model, options, batches = make(case)
    parallel = DistributedDataParallel(model)
    optimizer = KFAC(parallel, **options)
    for x, y in batches:
        optimizer.zero_grad()
        if case in ("algoperf", "uneven"):  # 5 and 3 examples: the convention is exact there as well
            sizes = [5, 3] if case == "uneven" else [4, 4]
            mine = slice(0, sizes[0]) if rank == 0 else slice(sizes[0], None)
            with optimizer.capture() as capture:
                summed = F.cross_entropy(parallel(x[mine]), y[mine], reduction="sum")
                summed = torch.distributed.nn.all_reduce(summed)
                valid = torch.distributed.nn.all_reduce(torch.tensor(float(sizes[rank])))
                capture.loss_normalizer = valid / WORLD
                (summed / valid).backward()
        else:
            mine = slice(4 * rank, 4 * rank + 4)
            with optimizer.capture():
                F.cross_entropy(parallel(x[mine]), y[mine]).backward()
        optimizer.step()
    return result(model, optimizer)


def sampled(rank: int) -> dict[str, Any]:
    """Sampled labels differ between processes, parameters must not."""
    model, options, batches = make("expand")
    parallel = DistributedDataParallel(model)
    optimizer = KFAC(parallel, **options, fisher="mc")
    for x, y in batches:
        optimizer.zero_grad()
        mine = slice(4 * rank, 4 * rank + 4)
        with optimizer.capture() as capture:
            outputs = parallel(x[mine])
            capture.backward_fisher(outputs, "softmax_cross_entropy")
            F.cross_entropy(outputs, y[mine]).backward()
        optimizer.step()
    return result(model, optimizer)


def worker(rank: int, world: int, folder: str) -> None:
    trained = {case: functools.partial(two_processes, case) for case in CASES}
    processes.run_cases({**trained, "mc": sampled, "partial": branches}, rank, world, folder)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of both processes, for all cases."""
    return processes.ranks_of(worker, tmp_path_factory)(WORLD)


def assert_same(got: dict[str, Any], want: dict[str, Any], **tolerance: float) -> None:
    assert got["coverage"] == want["coverage"]
    for key in ("factors", "parameters"):
        torch.testing.assert_close(got[key], want[key], **tolerance)


@pytest.mark.parametrize("case", CASES)
def test_same_trajectory_as_one_process(case: str, ranks: list[dict[str, Any]]) -> None:
    want = single_process(case)
    assert want["factors"], "nothing was covered"
    for results in ranks:
        assert_same(results[case], want, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("case", [*CASES, "mc", "partial"])
def test_processes_agree_bit_for_bit(case: str, ranks: list[dict[str, Any]]) -> None:
    first, second = (results[case] for results in ranks)
    assert_same(first, second, rtol=0, atol=0)


def test_a_layer_that_one_process_does_not_call_has_the_statistics_of_the_others(
    ranks: list[dict[str, Any]],
) -> None:
    for results in ranks:
        assert set(results["partial"]["factors"]) == {"head", "here.0", "here.1"}
