"""A run that is saved and loaded in mid-interval goes on bit for bit."""

from __future__ import annotations

import copy
import io
import itertools
from typing import Any

import pytest
import torch
from torch import nn

from algoperf_kfac.pytorch import KFAC, NadamW
from tests.pytorch.toys import Patches, assert_same_factors, assert_same_parameters, convnet, images, mlp, train

COMBINATIONS = [
    pytest.param({"preconditioner": p, "scaling": s, "approximation": a, "fisher": f}, id=f"{p}-{s}-{a}-{f}")
    for p, s, a, f in itertools.product(
        ["eigen", "inverse"],
        ["power", "root", "inverse", "second_moment"],
        ["expand", "reduce"],
        ["empirical", "mc", "exact"],
    )
    if p == "eigen" or s == "root"
]


def fisher_loss(options: dict[str, Any]) -> str | None:
    return None if options.get("fisher", "empirical") == "empirical" else "softmax_cross_entropy"


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def check_resume(make: type[nn.Module] | Any, options: dict[str, Any], stop: int, total: int) -> KFAC:
    """Train at a stretch and through a file after `stop` steps; returns the resumed optimizer."""
    batches = [images() for _ in range(total)]
    model = make()
    optimizer = KFAC(model, seed=3, **options)
    train(model, optimizer, batches[:stop], fisher_loss=fisher_loss(options))
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    losses = train(model, optimizer, batches[stop:], fisher_loss=fisher_loss(options))

    torch.manual_seed(99)
    resumed = make()
    resumed.load_state_dict(saved["model"])
    fresh = KFAC(resumed, **options)
    fresh.load_state_dict(saved["optimizer"])
    assert train(resumed, fresh, batches[stop:], fisher_loss=fisher_loss(options)) == losses
    assert_same_parameters(resumed, model, rtol=0, atol=0)
    assert_same_factors(fresh.factors(), optimizer.factors(), rtol=0, atol=0)
    assert fresh.metrics() == optimizer.metrics()
    assert str(fresh.coverage()) == str(optimizer.coverage())
    return fresh


@pytest.mark.parametrize("options", COMBINATIONS)
def test_every_combination(options: dict[str, Any]) -> None:
    """Stop at step 5: one past a statistics step, in the middle of the staggered refreshes."""
    intervals = {"factor_interval": 2, "refresh_interval": 6, "initial_statistics": 1}
    check_resume(Patches, {**intervals, **options}, stop=5, total=10)


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
def test_every_step_of_an_interval(stop: int) -> None:
    intervals = {"factor_interval": 2, "refresh_interval": 4, "initial_statistics": 1}
    check_resume(Patches, {**intervals, "fisher": "mc"}, stop=stop, total=8)


@pytest.mark.parametrize("stop", [2, 5, 6, 7])
def test_in_and_after_the_initial_statistics(stop: int) -> None:
    """The phase is counted in steps of the whole run: the resumed one neither repeats nor prolongs it."""
    options = {"factor_interval": 4, "refresh_interval": 4, "initial_statistics": 6, "initial_refreshes": "every"}
    fresh = check_resume(Patches, options, stop=stop, total=9)
    # Steps 0 to 5 and 8, four layers each.
    assert fresh.metrics()["refreshes"] == 7 * 4


@pytest.mark.parametrize(
    "options",
    [
        {"grafting": False},
        {"scaling": "polar", "length": "rms", "max_factor_dim": 5},
        {"drift_tolerance": 0.5},
        {"decomposition": "qr", "scaling": "polar"},
        {"max_factor_dim": 5, "large_factor": "block"},
        {"max_factor_dim": 8, "large_factor": "one_sided", "scaling": "second_moment"},
        {"damping_mode": "absolute", "weight_decay": 0.1},
    ],
    ids=lambda o: "-".join(o),
)
def test_other_options(options: dict[str, Any]) -> None:
    intervals = {"factor_interval": 2, "refresh_interval": 4, "initial_statistics": 1}
    check_resume(convnet, {**intervals, **options}, stop=5, total=9)


def test_saving_does_not_alias_the_running_optimizer() -> None:
    """A state taken by reference and loaded elsewhere must not move with the run it came from."""
    model, batches = Patches(), [images() for _ in range(6)]
    options = {"factor_interval": 2, "refresh_interval": 2, "initial_statistics": 1, "scaling": "second_moment"}
    optimizer = KFAC(model, **options)
    train(model, optimizer, batches[:3])
    resumed = copy.deepcopy(model)
    fresh = KFAC(resumed, **options)
    fresh.load_state_dict(optimizer.state_dict())
    train(model, optimizer, batches[3:])
    train(resumed, fresh, batches[3:])
    assert_same_parameters(resumed, model, rtol=0, atol=0)


def test_learning_rate_and_groups_come_back() -> None:
    model = mlp(5, 4, 3)
    optimizer = KFAC(model, learning_rate=0.1)
    optimizer.param_groups[0]["lr"] = 0.025
    fresh = KFAC(model, learning_rate=0.1)
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.param_groups[0]["lr"] == 0.025


def state_of(model: nn.Module, **options: Any) -> dict[str, Any]:
    optimizer = KFAC(model, **options)
    if isinstance(model[0], nn.Linear):
        x, y = torch.randn(6, model[0].in_features), torch.randint(3, (6,))
        train(model, optimizer, [(x, y)])
    return optimizer.state_dict()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: NadamW(mlp(5, 4, 3).parameters()).state_dict(), r"not KFAC's: it has no entry 'kfac'"),
        (lambda: state_of(mlp(5, 6, 3)), r"layer 0\b.*\(6, 5\).*\(4, 5\)"),
        (lambda: state_of(mlp(5, 4, 3), approximation="reduce"), r"layer 0\b.*approximation.*reduce.*expand"),
        (lambda: state_of(mlp(5, 4, 3), max_factor_dim=4), r"layer 0\b.*in_blocks"),
        (lambda: state_of(mlp(5, 4, 4, 3)), r"layer 2\b.*\(4, 4\).*\(3, 4\)"),
        (lambda: state_of(mlp(5, 4, 3), preconditioner="inverse"), r"preconditioner.*'inverse'.*'eigen'"),
        (lambda: state_of(nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3))), r"layer 0\b.*\(3, 5\).*\(4, 5\)"),
        (
            lambda: state_of(nn.Sequential(nn.LayerNorm(5), nn.Identity(), nn.LayerNorm(4))),
            r"parameter 0\.weight had shape \(5,\), and has \(4, 5\)",
        ),
        (lambda: state_of(nn.Sequential(nn.LayerNorm(5), nn.LayerNorm(4))), r"parameter 1\.bias is unknown here"),
    ],
    ids=["nadamw", "width", "approximation", "blocks", "depth", "preconditioner", "kinds", "norms", "names"],
)
def test_a_state_that_does_not_fit_is_refused_whole(state: Any, message: str) -> None:
    model, batch = mlp(5, 4, 3), (torch.randn(6, 5), torch.randint(3, (6,)))
    optimizer = KFAC(model)
    train(model, optimizer, [batch])
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state())
    after = optimizer.state_dict()
    assert str(after) == str(before), "a refused state_dict must change nothing"
