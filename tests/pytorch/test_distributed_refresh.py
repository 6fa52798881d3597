"""Refreshes are shared out among processes, and the training is that of a single process."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from algoperf_kfac.assignment import assign
from algoperf_kfac.pytorch import KFAC
from tests.pytorch import processes
from tests.pytorch.processes import Ranks
from tests.pytorch.toys import SCALE_SENSITIVE, images

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")

BATCH = 8
# Four processes on fewer cores are slow: they run these.
OF_FOUR = ("eigen-expand", "inverse-reduce", "drift", "fails_later", "short")
# All layers are refreshed up to step 6, then they take turns of three.
INTERVALS = {"factor_interval": 2, "refresh_interval": 6, "initial_statistics": 5, "initial_refreshes": "every"}
BAD_SIZE = 13  # of the matrices that do not decompose in the cases "fails_..."
CASES: dict[str, dict[str, Any]] = {
    **{
        f"{preconditioner}-{approximation}": {"preconditioner": preconditioner, "approximation": approximation}
        for preconditioner, approximation in itertools.product(("eigen", "inverse"), ("expand", "reduce"))
    },
    "grafted": {"approximation": "reduce", "grafting": True, "damping_mode": "relative", "scaling": "power"},
    "drift": {"drift_tolerance": 0.3},
    "following": {"decomposition": "qr"},
    "second_moment": {"scaling": "second_moment", "damping": 0.3},
    "blocks": {"max_factor_dim": 9},
    "one_sided": {"max_factor_dim": 12, "large_factor": "one_sided"},
    "fails_at_first": {},
    "fails_later": {},
    "fails_inverse": {"preconditioner": "inverse"},
    "short": {},
}
RUNS = [(2, case) for case in CASES] + [(4, case) for case in OF_FOUR]
STEPS = {"fails_at_first": 8, "fails_later": 8, "fails_inverse": 8, "short": 3, "one_sided": 8, "blocks": 8}


class Uneven(nn.Module):
    """Layers of many sizes, grouped and plain convolutions among them; position embedding and norm fall back."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, 8, 4, stride=4)
        self.grouped = nn.Conv1d(8, 8, 1, groups=4, bias=False)
        self.position = nn.Parameter(0.02 * torch.randn(4, 8))
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 12)
        self.middle = nn.Linear(12, 12)
        self.down = nn.Linear(12, 8, bias=False)
        self.wide = nn.Linear(8, 20)
        self.head = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patch(x).flatten(2)
        h = (h + self.grouped(h)).transpose(1, 2) + self.position
        h = h + self.down(F.gelu(self.middle(F.gelu(self.up(self.norm(h))))))
        return self.head(torch.tanh(self.wide(h).mean(1)))


class Decompositions:
    """Counts the decompositions of this process, and lets some of them fail."""

    def __init__(self, case: str) -> None:
        self.case = case
        self.step = 0
        self.matrices = 0
        self.work = 0

    def fails(self, m: Tensor) -> bool:
        steps = {"fails_at_first": range(3), "fails_later": range(2, 7), "fails_inverse": range(1, 4)}
        return m.shape[-1] == BAD_SIZE and self.step in steps.get(self.case, ())

    def eigh(self, m: Tensor) -> Any:
        self.count(m)
        if self.fails(m):
            raise torch.linalg.LinAlgError("a planted failure")
        return EIGH(m)

    def cholesky_ex(self, m: Tensor) -> Any:
        self.count(m)
        root, info = CHOLESKY_EX(m)
        return root, info + 1 if self.fails(m) else info

    def count(self, m: Tensor) -> None:
        self.matrices += len(m)
        self.work += len(m) * m.shape[-1] ** 3


EIGH, CHOLESKY_EX = torch.linalg.eigh, torch.linalg.cholesky_ex


def run(case: str, world: int, rank: int) -> dict[str, Any]:
    """Train on this process's share of the batches."""
    torch.manual_seed(0)
    model = Uneven().double()
    options = {**INTERVALS, **SCALE_SENSITIVE, "damping": 0.1, "learning_rate": 3e-3, **CASES[case]}
    wrapped = DistributedDataParallel(model) if world > 1 else model
    optimizer = KFAC(wrapped, **options)
    watch = Decompositions(case)
    share = BATCH // world
    mine = slice(rank * share, (rank + 1) * share)
    losses = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", watch.eigh)
        patch.setattr(torch.linalg, "cholesky_ex", watch.cholesky_ex)
        for step in range(STEPS.get(case, 25)):
            watch.step = step
            x, y = images(BATCH)
            optimizer.zero_grad()
            with optimizer.capture():
                loss = F.cross_entropy(wrapped(x[mine].double()), y[mine])
                loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    counters = {k: v for k, v in optimizer.metrics().items() if k.split("/")[-1] in COUNTERS}
    return {
        "model": model.state_dict(),
        "state": optimizer.state_dict(),
        "metrics": optimizer.metrics(),
        "counters": counters,
        "matrices": watch.matrices,
        "work": watch.work,
        "losses": losses,
    }


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """What nested containers hold, by path; tensors as lists of numbers."""
    if isinstance(value, Tensor):
        return {path: value.tolist()}
    if not isinstance(value, dict | list | tuple):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for key, child in items for k, v in leaves(child, f"{path}/{key}").items()}


COUNTERS = ("refreshes", "failures", "skipped", "dropped", "stand_ins", "steps", "missed_layers", "coverage")


def worker(rank: int, world: int, folder: str) -> None:
    with processes.joined(rank, world, folder):
        results = {case: run(case, world, rank) for case in (OF_FOUR if world == 4 else CASES)}
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
    want = alone[case]
    # Bases that are kept are arbitrary in the null space of their factors, and rounding decides: a change of the
    # inputs by 1e-15 changes the training of one process by as much.
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if case in ("drift", "following") else {"rtol": 1e-6, "atol": 1e-8}
    for results in ranks(world):
        got = results[case]
        torch.testing.assert_close(got["model"], want["model"], **tolerance)
        assert got["counters"] == want["counters"]
    losses = torch.tensor([results[case]["losses"] for results in ranks(world)]).mean(0)
    torch.testing.assert_close(losses, torch.tensor(want["losses"]), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("world", "case"), RUNS)
def test_processes_agree_bit_for_bit(world: int, case: str, ranks: Ranks) -> None:
    """The state, too: it is saved by one process and loaded by all."""

    def state_of(results: dict[str, Any]) -> dict[str, Any]:
        return leaves({key: results[case][key] for key in ("model", "state", "metrics")})

    first = state_of(ranks(world)[0])
    assert len(first) > 100
    for results in ranks(world)[1:]:
        assert state_of(results) == first


def test_the_cases_are_what_they_are_meant_to_be(alone: dict[str, Any]) -> None:
    counters = {case: results["counters"] for case, results in alone.items()}
    layers = 7
    # Statistics at steps 0-4, then at every second up to 24; all layers up to step 4, then by turns of three.
    assert layers * 5 < counters["eigen-expand"]["refreshes"] < layers * 15
    assert counters["drift"]["skipped"] > 0 < counters["drift"]["refreshes"]
    for case in ("fails_at_first", "fails_later", "fails_inverse"):
        assert counters[case]["failures"] > 0
        assert counters[case]["refreshes"] < counters["blocks"]["refreshes"]
    assert counters["eigen-expand"]["failures"] == 0


@pytest.mark.parametrize(("world", "case"), [(n, case) for n, case in RUNS if not case.startswith("fails")])
def test_every_decomposition_is_made_once(world: int, case: str, ranks: Ranks, alone: dict[str, Any]) -> None:
    assert sum(results[case]["matrices"] for results in ranks(world)) == alone[case]["matrices"]
    assert sum(results[case]["work"] for results in ranks(world)) == alone[case]["work"]


@pytest.mark.parametrize(("world", "case"), [(2, "eigen-expand"), (4, "eigen-expand"), (4, "inverse-reduce")])
def test_every_process_does_about_its_share(world: int, case: str, ranks: Ranks) -> None:
    work = [results[case]["work"] for results in ranks(world)]
    # The layer `wide` alone makes a third of the work: no process can have less at a full refresh.
    assert max(work) / sum(work) < {2: 0.65, 4: 0.5}[world]
    assert min(work) > 0


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_assignment(world: int) -> None:
    costs = [7, 7, 6, 6, 5, 5, 4, 4, 4]
    owners = assign(costs, world)
    loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == rank) for rank in range(world)]
    assert sum(loads) == sum(costs)
    least = max(max(costs), sum(costs) / world)
    assert max(loads) <= (4 / 3 - 1 / (3 * world)) * least + 1e-9


def test_assignment_gives_the_longest_first_and_ties_to_the_lowest_rank() -> None:
    assert assign([1, 1, 10, 2], 2) == [1, 1, 0, 1]
    assert assign([3, 3, 3], 2) == [0, 1, 0]
    assert assign([5], 4) == [0]
    assert assign([], 2) == []
