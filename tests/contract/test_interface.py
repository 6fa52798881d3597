"""What users see first: what can be imported and what that brings, which arguments there are, what is refused."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import algoperf_kfac.jax
import algoperf_kfac.pytorch
from tests.contract.frameworks import NAMES, start
from tests.contract.models import perceptron

OF_SUBMISSIONS = {
    "grad_clip": 1.0, "label_smoothing": 0.1, "dropout_rate": 0.5, "horizon_factor": 3.0, "warmup_factor": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("framework", NAMES)
@pytest.mark.parametrize("name", OF_SUBMISSIONS)
def test_what_the_optimizer_does_not_read_is_refused(framework: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}'"):
        start(framework, perceptron((3, 2)), **{name: OF_SUBMISSIONS[name]})


@pytest.mark.parametrize("name", OF_SUBMISSIONS)
def test_the_configuration_has_what_the_optimizer_reads(name: str) -> None:
    assert name not in {field.name for field in dataclasses.fields(algoperf_kfac.pytorch.KFACConfig)}


# As every optimizer of PyTorch.


def test_names_of_pytorch() -> None:
    options = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.02}
    optimizer = algoperf_kfac.pytorch.KFAC(nn.Linear(3, 2), **options)
    (group,) = optimizer.param_groups
    assert group["lr"] == 0.1
    assert group["betas"] == pytest.approx((0.8, 0.95))
    assert (group["eps"], group["weight_decay"]) == (1e-6, 0.02)


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.1, "learning_rate": 0.1},
        {"betas": (0.9, 0.99), "beta2": 0.99},
        {"betas": (0.9, 0.99), "one_minus_beta1": 0.1},
    ],
    ids=["learning-rate", "beta2", "beta1"],
)
def test_the_same_twice(options: dict[str, Any]) -> None:
    first, second = options
    with pytest.raises(ValueError, match=rf"^(?!unknown).*({first}.*{second}|{second}.*{first})"):
        algoperf_kfac.pytorch.KFAC(nn.Linear(3, 2), **options)


def test_both_spellings_train_alike() -> None:
    found = []
    for options in (
        {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-6},
        {"learning_rate": 0.1, "one_minus_beta1": 0.2, "beta2": 0.95, "eps": 1e-6},
    ):
        torch.manual_seed(0)
        run = start("pytorch", perceptron((3, 2)), **options)
        run.step()
        run.step()
        found.append(run.parameters())
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(theirs), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "given",
    [
        lambda model: model.parameters(),
        lambda model: list(model.parameters()),
        lambda model: [{"params": model.parameters()}],
        lambda model: model.named_parameters(),
    ],
    ids=["generator", "list", "groups", "named"],
)
def test_the_model_is_wanted(given: Callable[[nn.Module], Any]) -> None:
    with pytest.raises(TypeError, match="model") as caught:
        algoperf_kfac.pytorch.KFAC(given(nn.Linear(3, 2)))
    assert "\n" not in str(caught.value)


# What imports bring.


def imported(statement: str, folder: Path) -> set[str]:
    """What of the frameworks, and of AlgoPerf, a fresh interpreter has loaded after an import.

    Args:
        statement: the import.
        folder: for a stand-in of AlgoPerf, so that it could be imported.
    """
    (folder / "algoperf").mkdir()
    for name in ("__init__", "spec"):
        (folder / "algoperf" / f"{name}.py").touch()
    code = f"import sys; {statement}; print(*(m for m in ('torch', 'jax', 'algoperf') if m in sys.modules))"
    # Beside this checkout, whatever is installed.
    path = os.pathsep.join([str(Path(algoperf_kfac.__file__).parents[1]), str(folder)])
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    return set(run.stdout.split())


@pytest.mark.parametrize(
    ("statement", "allowed"),
    [
        ("import algoperf_kfac", set()),
        (
            "from algoperf_kfac import KFACConfig, Positions, Coverage, MissingStatisticsError, plan, __version__",
            set(),
        ),
        ("import algoperf_kfac.pytorch", {"torch"}),
        ("import algoperf_kfac.jax", {"jax"}),
    ],
    ids=["package", "names", "pytorch", "jax"],
)
def test_imports(statement: str, allowed: set[str], tmp_path: Path) -> None:
    assert imported(statement, tmp_path) == allowed


@pytest.mark.parametrize("name", ["KFACConfig", "Positions", "MissingStatisticsError"])
def test_one_class_serves_both(name: str) -> None:
    expected = getattr(algoperf_kfac, name)
    assert getattr(algoperf_kfac.pytorch, name) is expected
    assert getattr(algoperf_kfac.jax, name) is expected
