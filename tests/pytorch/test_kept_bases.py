"""A layer keeps eigenbases only where something reads them: its state, its checkpoints and its plan."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from algoperf_kfac.pytorch import KFAC

READ = ({"drift_tolerance": 0.5}, {"decomposition": "qr"}, {"scaling": "second_moment"})
UNREAD = ({}, {"preconditioner": "inverse"}, {"power": 0.75, "approximation": "reduce"})


def trained(steps=3, state=None, **config):
    """Model, optimizer and its state after some steps, from a state of the same model if one is given."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    optimizer = KFAC(model, refresh_interval=2, factor_interval=1, **config)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        with optimizer.capture():
            model(torch.randn(8, 4, generator=generator)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def states(optimizer):
    return [entry["state"] for entry in optimizer.state_dict()["kfac"]["layers"].values()]


@pytest.mark.parametrize("config", UNREAD, ids=str)
def test_what_nothing_reads_is_not_kept(config):
    _, optimizer = trained(**config)
    for state in states(optimizer):
        assert state["refreshes"]
        assert not state["a_basis"]
        assert not state["b_basis"]
        assert state["a_operator"]
        assert state["b_operator"]


@pytest.mark.parametrize("config", READ, ids=str)
def test_what_is_read_is_kept(config):
    assert all(state["a_basis"] and state["b_basis"] for state in states(trained(**config)[1]))


@pytest.mark.parametrize("config", [*UNREAD, *READ], ids=str)
def test_a_run_goes_on_bit_for_bit(config):
    whole, _ = trained(6, **config)
    model, optimizer = trained(3, **config)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    model.load_state_dict((saved := torch.load(file, weights_only=True))["model"])
    again = KFAC(model, refresh_interval=2, factor_interval=1, **config)
    again.load_state_dict(saved["optimizer"])
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(8, 4, generator=generator) for _ in range(6)]
    for x in batches[3:]:
        again.zero_grad()
        with again.capture():
            model(x).square().mean().backward()
        again.step()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("config", READ, ids=str)
def test_a_state_without_bases_is_refused_where_they_are_read(config):
    model, optimizer = trained()
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    with pytest.raises(ValueError, match=r"layer 0 was saved without eigenbases, which scaling=.*saved with$"):
        trained(1, saved, **config)


def test_a_state_with_bases_goes_on_without():
    model, optimizer = trained(drift_tolerance=0.5)
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    operators = [m.clone() for state in states(optimizer) for m in state["a_operator"]]
    _, again = trained(0, saved)
    assert not any(state["a_basis"] for state in states(again))
    found = [m for state in states(again) for m in state["a_operator"]]
    assert all(torch.equal(a, b) for a, b in zip(operators, found, strict=True))
