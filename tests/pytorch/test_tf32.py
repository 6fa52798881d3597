"""Refreshes keep out of TF32, whoever switched it on by whatever setting, and leave it as it was."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from algoperf_kfac.pytorch import KFAC
from algoperf_kfac.pytorch.refresh import full_precision
from algoperf_kfac.pytorch.scalings import power


@pytest.fixture
def tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def step(model, optimizer):
    optimizer.zero_grad()
    with optimizer.capture():
        model(torch.randn(8, 3)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("drift_tolerance", [0.0, 0.999])
def test_decompositions_eigenvalues_and_operators_are_exact(tf32, monkeypatch, drift_tolerance):
    """Also where the basis stays and its eigenvalues are updated; the products of every step are the user's."""
    seen: dict[str, list[str]] = {"eigh": [], "operators": [], "step": [], "rotated": []}

    def noting(key, function):
        def noted(*args, **kwargs):
            seen[key].append(torch.get_float32_matmul_precision())
            return function(*args, **kwargs)

        return noted

    from algoperf_kfac.pytorch import refresh

    monkeypatch.setattr(torch.linalg, "eigh", noting("eigh", torch.linalg.eigh))
    monkeypatch.setattr(refresh, "_rotated_diagonals", noting("rotated", refresh._rotated_diagonals))

    class Observed(power.Scaling):
        def operators(self, state):
            return noting("operators", super().operators)(state)

        def precondition(self, *args):
            return noting("step", super().precondition)(*args)

    model = nn.Sequential(nn.Linear(3, 4))
    optimizer = KFAC(
        model, scaling=Observed, factor_interval=1, refresh_interval=1, drift_tolerance=drift_tolerance
    )
    for _ in range(3):
        step(model, optimizer)
    assert bool(seen["rotated"]) == (drift_tolerance > 0)
    for key in ("eigh", "operators", "rotated"):
        assert set(seen[key]) <= {"highest"}
    assert seen["eigh"]
    assert seen["operators"]
    assert set(seen["step"]) == {"high"}
    assert torch.get_float32_matmul_precision() == "high"


def test_an_error_inside_leaves_the_setting(tf32):
    with pytest.raises(ValueError, match="inside"), full_precision():
        raise ValueError("inside")
    assert torch.get_float32_matmul_precision() == "high"


def test_the_newer_setting_is_guarded_too():
    """In a process of its own: a mix of both settings is refused from then on."""
    if not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("this torch has the older setting alone")
    program = (
        "import torch; from algoperf_kfac.pytorch.refresh import full_precision as full\n"
        "matmul = torch.backends.cuda.matmul; matmul.fp32_precision = 'tf32'\n"
        "with full(): print(matmul.fp32_precision)\n"
        "print(matmul.fp32_precision)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["ieee", "tf32"]
