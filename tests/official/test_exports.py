"""An exported submission trains, self-tuning, in AlgoPerf's own runner, by its path in a clone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from submissions.__main__ import main
from workloads import algoperf

pytestmark = pytest.mark.skipif(not algoperf.installed(), reason=algoperf.NOT_INSTALLED)

ROOT = Path(__file__).resolve().parents[2]
# The official scoring of a submission by its path, on one repeated batch in place of the data.
PROGRAM = """
import sys
framework, path = sys.argv[1:]
sys.path[:0] = [""]  # the folder above the clone, as for the runner
from benchmarks.official import one_batch
from benchmarks.official.environment import load_runner
runner = load_runner(framework, "mnist", ["--tuning_ruleset=self", "--notorch_compile"])
workload = one_batch.make_workload(runner, "mnist", framework, (), data_parallel=False)
from algoperf import profiler
runner.score_submission_on_workload(
    workload, "mnist", path, "", "self", profiler=profiler.PassThroughProfiler(), max_global_steps=6, rng_seed=1)
module = sys.modules[path.removesuffix(".py").replace("/", ".")]
assert module.update_params.__self__.__class__.__module__.startswith("submissions_algorithms."), module
print("evaluations", len(workload.eval_seconds))
"""


@pytest.mark.parametrize(("framework", "name"), [("pytorch", "kfac_reduce"), ("jax", "kfac_reduce_jax")])
def test_it_trains_by_its_path(tmp_path, framework, name):
    out = tmp_path / "submissions_algorithms" / "submissions"
    assert main(["export", "kfac_reduce", f"--framework={framework}", "--ruleset=self", f"--out={out}"]) == 0
    path = f"submissions_algorithms/submissions/self_tuning/{name}/submission.py"
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-c", PROGRAM, framework, path]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "evaluations 1" in done.stdout
