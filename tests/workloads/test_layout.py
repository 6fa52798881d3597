"""Adding a workload is adding a folder: a toy one trains, is planned and listed with nothing else touched."""

from __future__ import annotations

import pytest

from tests.workloads.helpers import copied_checkout, run_in, table

TASK = '''
from submissions.common.spec import LossType
from workloads import seeds
from workloads.workload import Workload


class ToyBlobsTask(Workload):
    """Which of three directions a vector lies in."""

    target_metric_name = "accuracy"
    lower_is_better = False
    validation_target_value = 0.99
    test_target_value = 0.99
    loss_type = LossType.SOFTMAX_CROSS_ENTROPY
    num_train_examples = 512
    num_eval_train_examples = num_validation_examples = num_test_examples = 32
    batch_size = 16
    eval_batch_size = 32
    train_mean = train_stddev = None
    max_allowed_runtime_sec = 60
    eval_period_time_sec = 1
    eval_period_steps = 2
    step_hint = 6

    def is_output_params(self, param_key):
        return True

    def numpy_batch(self, data_rng, split, index, batch_size):
        generator = seeds.generator(seeds.fold_in(data_rng, index))
        inputs = generator.standard_normal((batch_size, 3)).astype("float32")
        batch = {"inputs": inputs, "targets": inputs.argmax(axis=1)}
        return batch if split == "train" else batch | {"weights": inputs[:, 0] * 0 + 1}
'''
MODELS = {
    "pytorch": """
import torch
from torch import nn

from workloads.pytorch.workload import PyTorchWorkload
from workloads.toy_blobs.task import ToyBlobsTask


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, inputs, dropout_rate=0.0):
        return self.linear(inputs)


class ToyBlobsWorkload(PyTorchWorkload, ToyBlobsTask):
    def build_model(self):
        return Model()
""",
    "jax": """
import flax.linen as nn

from workloads.jax.workload import JaxWorkload
from workloads.toy_blobs.task import ToyBlobsTask


class Model(nn.Module):
    @nn.compact
    def __call__(self, inputs, dropout_rate=0.0, *, train=False):
        return nn.Dense(3)(inputs)


class ToyBlobsWorkload(JaxWorkload, ToyBlobsTask):
    def build_model(self):
        return Model()
""",
}


FRAMEWORKS = ("pytorch", "jax")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the repository's packages with one folder more."""
    root = copied_checkout(tmp_path_factory.mktemp("checkout"))
    folder = root / "workloads" / "toy_blobs"
    folder.mkdir()
    for name, text in {"task": TASK, **MODELS}.items():
        (folder / f"{name}.py").write_text(text)
    return root


@pytest.fixture(scope="module")
def finished(checkout):
    """What the commands did with it: trained in each framework, planned, and said of themselves."""

    def train(framework):
        return (
            "workloads.run",
            "--workload=toy_blobs",
            f"--framework={framework}",
            f"--submission_path=submissions/kfac_reduce/{framework}/submission.py",
            "--tuning_ruleset=self",
            "--experiment_dir=runs",
            "--experiment_name=e",
        )

    plan = ("submissions", "plan", "--workload=toy_blobs", "--devices=1")
    done = run_in(checkout, *map(train, FRAMEWORKS), plan, ("workloads.run", "--help"))
    return dict(zip((*FRAMEWORKS, "plan", "help"), done, strict=True))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_it_trains(checkout, finished, framework):
    assert finished[framework].returncode == 0, finished[framework].stderr
    rows = table(checkout / f"runs/e/toy_blobs_{framework}/trial_1/eval_measurements.csv")
    assert [row["global_step"] for row in rows] == ["1", "2", "4", "6"]


def test_it_is_planned_at_its_own_batch_size(finished):
    assert finished["plan"].stdout.startswith("toy_blobs: batch 16 on 1 device\n"), finished["plan"].stderr
    assert "K-FAC covers 12 of 12 parameters" in finished["plan"].stdout


def test_it_is_listed_with_the_others(finished):
    assert ", toy_blobs" in finished["help"].stdout
