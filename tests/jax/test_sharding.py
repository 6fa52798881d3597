"""Several devices: the batch split over them, statistics summed, decompositions shared; as on a single device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """What a process with eight devices found, by how many of them it took."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    run = subprocess.run(
        [sys.executable, "-m", "tests.jax.sharded"],
        cwd=ROOT, env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}, text=True, capture_output=True,
        timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_as_on_one_device(devices: int, report: dict[str, Any]) -> None:
    """Twelve steps; each number of devices has its configurations."""
    assert report[str(devices)]
    for result in report[str(devices)]:
        assert result["parameters"] < 1e-9, result
        assert result["factors"] < 1e-9, result
        assert result["replicated"], result
        # Three matrices of 5 x 5 (A of each layer) are padded to a multiple of the devices: one for each device.
        assert result["batches"] == [1], result
        assert result["gathers"] > 0, result
        assert result["reduces"] > 0, result


@pytest.mark.parametrize("scaling", ["power", "polar", "second_moment"])
def test_directions_are_shared(scaling: str, report: dict[str, Any]) -> None:
    """Nine equal layers: each device takes 5, 3 or 2 of them, and all of stacks of fewer layers than devices."""
    products = []
    for devices, found in report["directions"][scaling].items():
        layers = {"2": 5, "4": 3, "8": 2}[devices]
        assert found["directions"] < 1e-12, found
        assert found["state"] < 1e-12, found
        assert found["replicated"], found
        # What a device is spared, as a share of what the layers take that it does not.
        products.append((1 - found["flops"]) / (1 - layers / 9))
    assert len(products) == (3 if scaling == "power" else 2)
    assert products == pytest.approx([products[0]] * len(products), rel=0.01)
    assert 0.6 < products[0] < 1  # of the flops of an update, whose other operations each device makes


def test_explicit_axes(report: dict[str, Any]) -> None:
    """Under a mesh whose axes are explicit the statistics are those of the whole batch."""
    assert report["explicit"] < 1e-12


def test_mapped_over_devices(report: dict[str, Any]) -> None:
    """Where devices map over their examples, statistics summed over them are those of the whole batch."""
    assert len(report["mapped"]) == 3
    assert max(report["mapped"].values()) < 1e-12, report["mapped"]
