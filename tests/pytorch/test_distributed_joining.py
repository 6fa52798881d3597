"""The optimizer is made before DistributedDataParallel wraps the model, or gradients are averaged by hand."""

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
from tests.pytorch.toys import Patches
from tests.pytorch.two_processes import OPTIONS, WORLD, assert_like, batches, plain, result, share

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")

Change = Callable[[nn.Module, int], None]


class Inside(nn.Module):
    """A module that has DistributedDataParallel inside, and perhaps more."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


def patches() -> nn.Module:
    torch.manual_seed(0)
    return Patches().double()


def train(
    optimizer: KFAC,
    model: nn.Module,
    rank: int,
    data: list[tuple[Tensor, Tensor]],
    *,
    inside: Change | None = None,
    before: Change | None = None,
) -> None:
    """The loop of the README; `inside` changes gradients within the capture, `before` ahead of the step."""
    for x, y in data:
        optimizer.zero_grad()
        with optimizer.capture() as capture:
            outputs = model(x[share(rank)])
            capture.backward_fisher(outputs, "softmax_cross_entropy")
            F.cross_entropy(outputs, y[share(rank)]).backward()
            if inside is not None:
                inside(model, rank)
        if before is not None:
            before(model, rank)
        optimizer.step()


def average(model: nn.Module, rank: int) -> None:
    for p in model.parameters():
        assert p.grad is not None
        dist.all_reduce(p.grad)
        p.grad /= WORLD


def clip_and_scale(model: nn.Module, rank: int) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    for p in model.parameters():
        if p.grad is not None:
            p.grad.mul_(1 / 1024).mul_(1024.0 + rank)


def said(function: Callable[[], None]) -> list[str]:
    """K-FAC's warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [text for warning in caught if (text := str(warning.message)).startswith("K-FAC: ")]


def refused(function: Callable[[], None]) -> str:
    try:
        function()
    except RuntimeError as error:
        return str(error)
    return "no error"


def later(rank: int) -> dict[str, Any]:
    model = patches()
    optimizer = KFAC(model, **OPTIONS)
    train(optimizer, DistributedDataParallel(model), rank, batches())
    return result(model, optimizer)


def of_its_module(rank: int) -> dict[str, Any]:
    model = patches()
    parallel = DistributedDataParallel(model)
    optimizer = KFAC(parallel.module, **OPTIONS)
    train(optimizer, parallel, rank, batches())
    return result(model, optimizer)


def in_a_module(rank: int) -> dict[str, Any]:
    model = patches()
    whole = Inside(DistributedDataParallel(model))
    optimizer = KFAC(whole, **OPTIONS)
    train(optimizer, whole, rank, batches())
    factors = {name.removeprefix("parts.0.module."): tuple(pair) for name, pair in optimizer.factors().items()}
    return {"parameters": model.state_dict(), "factors": factors}


def compiled_inside(rank: int) -> dict[str, Any]:
    """Resumed by an optimizer that could run its first statistics step compiled, where nothing would be seen."""
    model = patches()
    optimizer = KFAC(model, **OPTIONS)
    data = batches()
    compiled = torch.compile(model, backend="eager")
    train(optimizer, DistributedDataParallel(compiled), rank, data[:5])
    state = copy.deepcopy(optimizer.state_dict())
    optimizer = KFAC(model, **OPTIONS)
    optimizer.load_state_dict(state)
    train(optimizer, DistributedDataParallel(compiled), rank, data[5:])
    return result(model, optimizer)


def sampled(rank: int) -> dict[str, Any]:
    """As if the optimizer were made of the wrapped model, draws of the first capture included; then resumed."""
    found = []
    data = batches(8)
    for known in (True, False):
        model = patches()
        parallel = DistributedDataParallel(model)
        optimizer = KFAC(parallel if known else model, fisher="mc", seed=3, **OPTIONS)
        train(optimizer, parallel, rank, data[:5])
        if not known:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = KFAC(model, fisher="mc", seed=4, **OPTIONS)
            optimizer.load_state_dict(state)
        train(optimizer, parallel, rank, data[5:])
        found.append(result(model, optimizer))
    return {"known": found[0], "later": found[1]}


def in_two_parts() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Tanh()).double(), nn.Linear(5, 3).double()


def two_inside(rank: int) -> dict[str, Any]:
    """Both of one process group, and each around a part."""
    model = Inside(*map(DistributedDataParallel, in_two_parts()))
    optimizer = KFAC(model, **OPTIONS)
    train(optimizer, model, rank, batches())
    return result(model, optimizer)


def around_a_part(rank: int) -> str:
    first, second = in_two_parts()
    model = Inside(DistributedDataParallel(first), second)
    optimizer = KFAC(model, **OPTIONS)
    return refused(lambda: train(optimizer, model, rank, batches(1)))


def after_steps_alone(rank: int) -> str:
    model = patches()
    optimizer = KFAC(model, **OPTIONS)
    train(optimizer, model, rank, batches(1))
    return refused(lambda: train(optimizer, DistributedDataParallel(model), rank, batches(3)))


def alone_on_purpose(rank: int) -> str:
    model = patches()
    groups = [dist.new_group([other]) for other in range(WORLD)]
    optimizer = KFAC(model, process_group=groups[rank], **OPTIONS)
    return refused(lambda: train(optimizer, DistributedDataParallel(model), rank, batches(1)))


def by_hand(rank: int) -> list[str]:
    model = patches()
    optimizer = KFAC(model, **OPTIONS)
    return said(lambda: train(optimizer, model, rank, batches(4), before=average))


def by_hand_inside(rank: int) -> list[str]:
    model = patches()
    optimizer = KFAC(model, **OPTIONS)
    return said(lambda: train(optimizer, model, rank, batches(4), inside=average))


def by_hand_and_told(rank: int) -> dict[str, Any]:
    model = patches()
    optimizer = KFAC(model, process_group=dist.group.WORLD, **OPTIONS)
    found = said(lambda: train(optimizer, model, rank, batches(), before=average))
    return result(model, optimizer, said=found)


def apart(rank: int) -> list[str]:
    """Models of their own, whose gradients are clipped and scaled, added up over captures and skipped."""
    model = patches()
    optimizer = KFAC(model, **OPTIONS)

    def run() -> None:
        train(optimizer, model, rank, batches(2 + rank), before=clip_and_scale)
        for x, y in batches(2):
            optimizer.zero_grad()
            for half in (slice(0, 2), slice(2, 8)):
                with optimizer.capture(loss_normalizer=8, force=True):
                    (F.cross_entropy(model(x[half]), y[half], reduction="sum") / 8).backward()
            if rank:
                optimizer.step()  # else the batch is given up
        train(optimizer, model, rank, batches(3), before=clip_and_scale)

    return said(run)


CASES: dict[str, Callable[[int], Any]] = {
    function.__name__: function
    for function in (
        later,
        of_its_module,
        in_a_module,
        compiled_inside,
        two_inside,
        sampled,
        around_a_part,
        after_steps_alone,
        alone_on_purpose,
        by_hand,
        by_hand_inside,
        by_hand_and_told,
        apart,
    )
}


def worker(rank: int, world: int, folder: str) -> None:
    processes.run_cases(CASES, rank, world, folder)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return processes.ranks_of(worker, tmp_path_factory)(WORLD)


LIKE_PLAIN = ["later", "of_its_module", "in_a_module", "compiled_inside", "by_hand_and_told"]


@pytest.mark.parametrize("case", LIKE_PLAIN)
def test_same_training_as_one_process(case: str, ranks: list[dict[str, Any]]) -> None:
    want = plain(None, lambda model: model)
    for results in ranks:
        assert_like(results[case], want, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("case", [*LIKE_PLAIN, "two_inside"])
def test_processes_agree_bit_for_bit(case: str, ranks: list[dict[str, Any]]) -> None:
    assert_like(ranks[1][case], ranks[0][case], rtol=0, atol=0)


def test_labels_are_drawn_as_by_an_optimizer_of_the_wrapped_model(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        assert_like(results["sampled"]["later"], results["sampled"]["known"], rtol=0, atol=0)


def test_what_is_no_safe_reason_to_share_is_refused(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        assert "around a part of the model, without parts.1.weight, parts.1.bias" in results["around_a_part"]
        assert "has taken statistics of its own before" in results["after_steps_alone"]
        for case in ("around_a_part", "after_steps_alone"):
            assert "process_group=..." in results[case]
        assert results["alone_on_purpose"] == "no error"


@pytest.mark.parametrize("case", ["by_hand", "by_hand_inside"])
def test_gradients_averaged_by_hand_are_noticed_once(case: str, ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        (text,) = results[case]
        assert "changed between backward() and step()" in text
        assert "process_group=torch.distributed.group.WORLD" in text


def test_nothing_is_said_of_models_side_by_side(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        assert results["apart"] == []
        assert results["by_hand_and_told"]["said"] == []
