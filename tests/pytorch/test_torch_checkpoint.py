"""torch.distributed.checkpoint passes on what belongs to parameters: K-FAC's state goes with it, bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from algoperf_kfac.pytorch import KFAC
from tests.pytorch.toys import assert_same_parameters, mlp

dcp = pytest.importorskip("torch.distributed.checkpoint")
state_dicts = pytest.importorskip("torch.distributed.checkpoint.state_dict")

OPTIONS = {"learning_rate": 1e-2, "factor_interval": 3, "initial_statistics": 3, "refresh_interval": 6}


def start() -> tuple[nn.Module, KFAC]:
    torch.manual_seed(0)
    model = mlp(6, 8, 3)
    return model, KFAC(model, **OPTIONS)


def run(model: nn.Module, optimizer: KFAC, first: int, last: int) -> None:
    for i in range(first, last):
        generator = torch.Generator().manual_seed(i)
        x, y = torch.randn(16, 6, generator=generator), torch.randint(3, (16,), generator=generator)
        optimizer.zero_grad()
        with optimizer.capture():
            F.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("steps", [0, 1, 4, 7])
def test_get_and_set_state_dict(steps: int) -> None:
    model, optimizer = start()
    run(model, optimizer, 0, steps)
    saved = copy.deepcopy(state_dicts.get_state_dict(model, optimizer))
    assert optimizer.metrics()["steps"] == steps
    run(model, optimizer, steps, 12)
    other, resumed = start()
    run(other, resumed, 0, 2)  # whatever it has seen is replaced
    state_dicts.set_state_dict(other, resumed, model_state_dict=saved[0], optim_state_dict=saved[1])
    assert resumed.metrics()["steps"] == steps
    run(other, resumed, steps, 12)
    assert_same_parameters(other, model, rtol=0, atol=0)


@pytest.mark.parametrize("steps", [0, 7])
@pytest.mark.parametrize("seen", [0, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"full_state_dict": True},
        {"full_state_dict": True, "cpu_offload": True},
        {"flatten_optimizer_state_dict": True},
    ],
    ids=["full", "offloaded", "flat"],
)
def test_options(options: dict[str, bool], seen: int, steps: int) -> None:
    """Into a fresh optimizer and into one that is running, with a frozen first parameter and a fallback."""
    chosen = state_dicts.StateDictOptions(**options)

    def frozen() -> tuple[nn.Module, KFAC]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))
        model[0].weight.requires_grad_(False)
        return model, KFAC(model, list(model.parameters()), seed=2**60, **OPTIONS)

    model, optimizer = frozen()
    run(model, optimizer, 0, steps)
    saved = copy.deepcopy(state_dicts.get_state_dict(model, optimizer, options=chosen))
    run(model, optimizer, steps, 10)
    other, resumed = frozen()
    run(other, resumed, 0, seen)
    state_dicts.set_state_dict(other, resumed, model_state_dict=saved[0], optim_state_dict=saved[1], options=chosen)
    assert resumed.metrics()["steps"] == steps
    run(other, resumed, steps, 10)
    assert_same_parameters(other, model, rtol=0, atol=0)
    assert resumed.metrics() == optimizer.metrics()


def test_through_files(tmp_path: Path) -> None:
    model, optimizer = start()
    run(model, optimizer, 0, 7)
    dcp.save(
        {"optim": state_dicts.get_optimizer_state_dict(model, optimizer), "model": model.state_dict()},
        checkpoint_id=tmp_path,
        no_dist=True,
    )
    run(model, optimizer, 7, 12)
    other, resumed = start()
    run(other, resumed, 0, 7)  # a state of the same structure to load into
    loaded = {"optim": state_dicts.get_optimizer_state_dict(other, resumed), "model": other.state_dict()}
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    state_dicts.set_state_dict(other, resumed, model_state_dict=loaded["model"], optim_state_dict=loaded["optim"])
    run(other, resumed, 7, 12)
    assert_same_parameters(other, model, rtol=0, atol=0)
