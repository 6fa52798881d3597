"""Adding a submission is adding a file: a toy one is found, trains, and is exported as what it says it is."""

from __future__ import annotations

import pytest

from tests.workloads.helpers import arguments, copied_checkout, run_in, table

TOY = '''
"""Plain gradient descent."""

import dataclasses

import torch

from submissions.common.batch_sizes import get_batch_size
from submissions.common.description import Description
from submissions.common.hyperparameters import POSITIVE, check
from submissions.common.pass_through import data_selection, prepare_for_eval
from submissions.common.pytorch_submission import Submission


@dataclasses.dataclass(frozen=True)
class Config:
    learning_rate: float

    def __post_init__(self):
        check("learning_rate", self.learning_rate, POSITIVE)


DESCRIPTION = Description("Toy SGD", "Gradient descent without any memory.", Config, {"learning_rate": 0.1})
_submission = Submission(DESCRIPTION, lambda model, config, *_: torch.optim.SGD(model.parameters()))
init_optimizer_state, update_params = _submission.init_optimizer_state, _submission.update_params
'''


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the repository's packages with one file more."""
    root = copied_checkout(tmp_path_factory.mktemp("checkout"))
    path = root / "submissions/toy_sgd/pytorch/submission.py"
    path.parent.mkdir(parents=True)
    path.write_text(TOY)
    return root


@pytest.fixture(scope="module")
def finished(checkout):
    """What the commands did with it."""
    space = checkout / "space.json"
    space.write_text('[{"learning_rate": 0.1, "momentum": 0.9}]')
    study = ["workloads.study", "--submissions=toy_sgd", "--workloads=mnist_vit", "--max_global_steps=2"]
    refused = arguments(
        checkout / "refused",
        workload="mnist_vit",
        submission_path="submissions/toy_sgd/pytorch/submission.py",
        tuning_ruleset=None,
        tuning_search_space=space,
    )
    commands = {
        "trained": [*study, "--jobs=1", "--experiment_dir=trained"],
        "refused": ["workloads.run", *refused],  # which a study starts in a process of its own
        "exported": ["submissions", "export", "toy_sgd", "--ruleset=self", "--out=exported"],
        "planned": ["submissions", "plan", "--workload=mnist_vit", "--submission=toy_sgd"],
    }
    return dict(zip(commands, run_in(checkout, *commands.values()), strict=True))


def test_it_trains_and_its_hyperparameters_are_checked(checkout, finished):
    assert finished["trained"].returncode == 0, finished["trained"].stderr
    rows = table(checkout / "trained/toy_sgd/study_1/mnist_vit_pytorch/trial_1/eval_measurements.csv")
    assert [row["global_step"] for row in rows] == ["1", "2"]
    assert finished["refused"].returncode == 2
    assert "unknown hyperparameter 'momentum': known are ['budget_factor', " in finished["refused"].stderr


def test_its_export_says_what_it_is(checkout, finished):
    assert finished["exported"].returncode == 0, finished["exported"].stderr
    folder = checkout / "exported/self_tuning/toy_sgd"
    assert 'submission_name: "Toy SGD"' in (folder / "submission_info.yml").read_text()
    readme = (folder / "README.md").read_text()
    assert readme.startswith("# Toy SGD\n\nGradient descent without any memory.\n")
    assert "K-FAC" not in readme
    assert not (folder / "common/kfac").exists()


def test_it_is_not_planned(finished):
    assert finished["planned"].returncode == 2
    assert finished["planned"].stderr == "error: toy_sgd is no K-FAC submission; plan kfac_expand or kfac_reduce\n"
