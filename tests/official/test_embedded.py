"""The embedded workloads inside AlgoPerf's own runner give what they give in the embedded one."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from workloads import algoperf, official, registry

ROOT = Path(__file__).resolve().parents[2]
needs_algoperf = pytest.mark.skipif(not algoperf.installed(), reason=algoperf.NOT_INSTALLED)
CASES = [(name, framework) for name, entry in registry.WORKLOADS.items() for framework in entry.frameworks]
NOT_COMPARED = {"score", "total_duration", "preemption_count"}


def _call(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=600, check=False)


def _train(module: str, folder: Path, name: str, framework: str, *more: str) -> list[dict[str, float]]:
    """The evaluations of a run of twelve steps."""
    done = _call(
        module,
        f"--workload={name}",
        f"--framework={framework}",
        f"--submission_path=submissions/kfac_reduce/{framework}/submission.py",
        "--tuning_search_space=tuning_search_spaces/kfac_reduce.json",
        "--num_tuning_trials=1",
        "--rng_seed=5",
        "--max_global_steps=12",
        "--notorch_compile",
        "--nosave_checkpoints",
        f"--experiment_dir={folder}",
        f"--experiment_name={module}",
        *more,
    )
    path = folder / module / f"{name}_{framework}" / "trial_1" / "eval_measurements.csv"
    assert path.exists(), done.stderr[-3000:]
    with path.open() as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    return [{k: v for k, v in row.items() if k not in NOT_COMPARED and "accumulated" not in k} for row in rows]


@needs_algoperf
@pytest.mark.parametrize(("name", "framework"), CASES)
def test_both_runners_give_the_same_numbers(name, framework, tmp_path):
    if not (ROOT / f"submissions/kfac_reduce/{framework}/submission.py").exists():
        pytest.skip(f"there is no kfac_reduce for {framework} yet")
    theirs = _train("workloads.official", tmp_path, name, framework)
    ours = _train("benchmarks.official.embedded", tmp_path, name, framework)
    assert theirs == ours  # the steps of the evaluations, too
    period = registry.load(name, framework).eval_period_steps
    assert [row["global_step"] for row in theirs] == [1, *range(period, 12, period), 12]
    assert theirs[-1]["validation/loss"] != theirs[0]["validation/loss"]


@needs_algoperf
def test_other_seeds_give_other_numbers(tmp_path):
    """Else the comparison above would compare nothing that depends on the seed."""
    first = _train("workloads.official", tmp_path / "a", "mnist_vit", "pytorch")
    second = _train("workloads.official", tmp_path / "b", "mnist_vit", "pytorch", "--rng_seed=6")
    assert first != second


def test_help_needs_no_algoperf(monkeypatch, capsys):
    monkeypatch.setattr(official, "installed", lambda: False)
    assert official.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "--workload=NAME" in out
    assert out.count(official.NOT_INSTALLED) == 1


def test_without_algoperf_it_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(official, "installed", lambda: False)
    assert official.main(["--workload=mnist_vit"]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"error: {official.NOT_INSTALLED}\n"
    assert captured.out == ""


@needs_algoperf
def test_an_unknown_framework_of_a_workload_is_refused(tmp_path):
    done = _call(
        "workloads.official",
        "--workload=mnist_vit",
        "--framework=tensorflow",
        "--submission_path=submissions/kfac_reduce/pytorch/submission.py",
        f"--experiment_dir={tmp_path}",
        "--experiment_name=x",
    )
    assert done.returncode != 0
    assert "framework" in done.stderr
