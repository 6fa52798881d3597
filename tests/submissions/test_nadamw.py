"""The NadamW submission against the contract: both rulesets, state that resumes, a search space that is valid."""

from __future__ import annotations

import copy
import inspect
import io
from pathlib import Path

import pytest
import torch

from submissions.nadamw.pytorch import submission
from workloads import registry, seeds
from workloads.runner import submission as loader
from workloads.runner import tuning

SPACE = Path(__file__).resolve().parents[2] / "tuning_search_spaces/nadamw.json"


@pytest.fixture(scope="module")
def workload():
    return registry.load("mnist_vit", "pytorch")


def _start(workload, point=None):
    model, state = workload.init_model_fn(seeds.root(1))
    return model, submission.init_optimizer_state(workload, model, state, point, seeds.root(2))


def _train(workload, model, optimizer_state, steps, point=None, first=0):
    queue = workload._build_input_queue(seeds.root(3), "train", "", 16)
    queue.position = first
    for step in range(first, first + steps):
        batch = submission.data_selection(workload, queue, optimizer_state, model, None, point, step, None)
        optimizer_state, model, _ = submission.update_params(
            workload=workload,
            current_param_container=model,
            current_params_types=workload.model_params_types,
            model_state=None,
            hyperparameters=point,
            batch=batch,
            loss_type=workload.loss_type,
            optimizer_state=optimizer_state,
            eval_results=[],
            global_step=step,
            rng=seeds.root(step),
            train_state={},
        )
    return model


def test_loader_accepts_it():
    loaded = loader.load(inspect.getfile(submission))
    assert loaded.prepare_for_eval is not None
    assert loaded.needs_train_state
    assert loaded.get_batch_size("mnist_vit") == 128


def test_it_learns(workload):
    model, state = _start(workload)
    before = workload._eval_model_on_split("test", 500, 500, model, None, None, "")["loss"]
    model = _train(workload, model, state, 20)
    after = workload._eval_model_on_split("test", 500, 500, model, None, None, "")["loss"]
    assert after < before - 0.02


def test_every_point_of_the_search_space_trains_a_step(workload):
    for point in tuning.read_points(str(SPACE), 6):
        assert set(point._fields) <= set(submission.DEFAULTS)
        model, state = _start(workload, point)
        before = copy.deepcopy(model.state_dict())
        _train(workload, model, state, 1, point)
        assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_state_resumes_bit_for_bit_and_loads_safely(workload):
    model, state = _start(workload)
    _train(workload, model, state, 3)
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), **{key: value.state_dict() for key, value in state.items()}}, buffer)
    _train(workload, model, state, 3, first=3)
    other, other_state = _start(workload)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    other.load_state_dict(saved.pop("model"))
    for key, value in other_state.items():
        value.load_state_dict(saved[key])
    _train(workload, other, other_state, 3, first=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_prepare_for_eval_changes_nothing(workload):
    model, state = _start(workload)
    arguments = (workload, model, None, None, None, None, state, [], 1, None)
    assert submission.prepare_for_eval(*arguments) == (state, model, None)
