"""The NadamW submission against the contract: both rulesets, state that resumes, a search space that is valid."""

from __future__ import annotations

import copy
import inspect
import io
from pathlib import Path

import pytest
import torch

from submissions.nadamw.pytorch import submission
from tests.submissions.steps import start, train
from workloads import registry
from workloads.runner import submission as loader
from workloads.runner import tuning

SPACE = Path(__file__).resolve().parents[2] / "tuning_search_spaces/nadamw.json"


@pytest.fixture(scope="module")
def workload():
    return registry.load("mnist_vit", "pytorch")


def test_loader_accepts_it():
    loaded = loader.load(inspect.getfile(submission))
    assert loaded.prepare_for_eval is not None
    assert loaded.needs_train_state
    assert loaded.get_batch_size("mnist_vit") == 128


def test_it_learns(workload):
    model, state = start(submission, workload)
    before = workload._eval_model_on_split("test", 500, 500, model, None, None, "")["loss"]
    model = train(submission, workload, model, state, 20)
    after = workload._eval_model_on_split("test", 500, 500, model, None, None, "")["loss"]
    assert after < before - 0.02


def test_every_point_of_the_search_space_trains_a_step(workload):
    for point in tuning.read_points(str(SPACE), 6):
        assert set(point._fields) <= set(submission.DESCRIPTION.defaults)
        model, state = start(submission, workload, point)
        before = copy.deepcopy(model.state_dict())
        train(submission, workload, model, state, 1, point=point)
        assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_state_resumes_bit_for_bit_and_loads_safely(workload):
    model, state = start(submission, workload)
    train(submission, workload, model, state, 3)
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), **{key: value.state_dict() for key, value in state.items()}}, buffer)
    train(submission, workload, model, state, 3, first=3)
    other, other_state = start(submission, workload)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    other.load_state_dict(saved.pop("model"))
    for key, value in other_state.items():
        value.load_state_dict(saved[key])
    train(submission, workload, other, other_state, 3, first=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_prepare_for_eval_changes_nothing(workload):
    model, state = start(submission, workload)
    arguments = (workload, model, None, None, None, None, state, [], 1, None)
    assert submission.prepare_for_eval(*arguments) == (state, model, None)
