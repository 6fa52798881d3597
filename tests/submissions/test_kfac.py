"""The K-FAC submissions against the contract: both rulesets, coverage, resume in mid-interval, valid spaces."""

from __future__ import annotations

import copy
import importlib
import io
import json
from pathlib import Path

import pytest
import torch

from algoperf_kfac.pytorch import KFAC
from submissions import registry as submissions
from submissions.common.kfac.pytorch import logged
from submissions.common.spec import LossType
from tests.pytorch.toys import assert_same_factors
from tests.submissions.steps import start, train
from workloads import registry, seeds
from workloads.runner import submission as loader
from workloads.runner import tuning

SPACES = Path(__file__).resolve().parents[2] / "tuning_search_spaces"
APPROXIMATIONS = ("expand", "reduce")


def load(approximation):
    return importlib.import_module(f"submissions.kfac_{approximation}.pytorch.submission")


@pytest.fixture(scope="module", params=["mnist_vit", "bible_lm"])
def workload(request):
    return registry.load(request.param, "pytorch")


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_the_runner_accepts_it(approximation):
    loaded = loader.load(load(approximation).__file__)
    assert loaded.prepare_for_eval is not None
    assert loaded.get_batch_size("imagenet_vit") == 1024
    with pytest.raises(ValueError, match="no batch size"):
        loaded.get_batch_size("unheard_of")


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_every_linear_layer_has_its_approximation(approximation, workload):
    _, state = start(load(approximation), workload)
    coverage = state["optimizer"].coverage()
    expected = {"expand": "expand", "reduce": "mixed"}[approximation]
    assert {layer.approximation for layer in coverage.layers} == {expected}
    assert coverage.fraction > 0.9
    assert all("embedding" in f.reason or "normalisation" in f.reason for f in coverage.fallbacks)


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_the_loss_falls(approximation, workload):
    submission = load(approximation)
    point = {"learning_rate": 5e-3}  # for batches of 16; the default point is for the workload's own
    model, state = start(submission, workload, point)
    batch = next(workload._build_input_queue(seeds.root(3), "eval_train", "", 64))

    def loss():
        with torch.no_grad():
            out = workload.loss_fn(batch["targets"], model(batch["inputs"]), batch["weights"])
        return float(out["summed"] / out["n_valid_examples"])

    before = loss()
    train(submission, workload, model, state, 30, point=point)
    assert loss() < 0.95 * before
    metrics = state["optimizer"].metrics()
    assert metrics["failures"] == metrics["dropped"] == metrics["missed_layers"] == metrics["stand_ins"] == 0


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_it_resumes_between_statistics_steps(approximation, workload):
    submission = load(approximation)
    point = {"factor_interval": 4, "refresh_interval": 8}
    model, state = start(submission, workload, point)
    train(submission, workload, model, state, 13, point=point)
    saved = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": state["optimizer"].state_dict()}, saved)
    train(submission, workload, model, state, 4, first=13, point=point)
    resumed, fresh = start(submission, workload, point)
    loaded = torch.load(io.BytesIO(saved.getvalue()), weights_only=True)
    resumed.load_state_dict(loaded["model"])
    fresh["optimizer"].load_state_dict(loaded["optimizer"])
    train(submission, workload, resumed, fresh, 4, first=13, point=point)
    for name, p in model.state_dict().items():
        assert torch.equal(p, resumed.state_dict()[name]), name


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_search_space(approximation):
    path = SPACES / f"kfac_{approximation}.json"
    points = tuning.read_points(str(path), 5)
    assert len(points) == len(json.loads(path.read_text())) == 5
    assert len(set(points)) == 5
    own = submissions.describe(f"kfac_{approximation}", "pytorch").defaults
    assert points[0]._asdict() == {name: own[name] for name in points[0]._fields}, "the first is the default point"


@pytest.mark.parametrize(
    ("point", "message"),
    [({"learning_rate": -1.0}, "learning_rate=-1.0"), ({"dampling": 1.0}, "unknown hyperparameter 'dampling'")],
)
def test_bad_points(point, message):
    workload = registry.load("mnist_vit", "pytorch")
    with pytest.raises(ValueError, match=message):
        start(load("reduce"), workload, point)


def test_the_interval_is_logged_where_a_budget_sets_it():
    for config, expected in (({}, {}), ({"refresh_budget": 0.1}, {"refresh_interval": 4})):
        optimizer = KFAC(torch.nn.Linear(3, 2), factor_interval=2, refresh_interval=4, **config)
        assert logged(optimizer) == expected


def test_the_fisher_may_be_sampled():
    workload = registry.load("mnist_vit", "pytorch")
    submission = load("reduce")
    point = {"fisher": "mc", "factor_interval": 1, "refresh_interval": 1}
    model, state = start(submission, workload, point)
    assert workload.loss_type == LossType.SOFTMAX_CROSS_ENTROPY
    before = copy.deepcopy(model.state_dict())
    train(submission, workload, model, state, 2, point=point)
    assert any(not torch.equal(p, before[name]) for name, p in model.state_dict().items())
    # The head starts at zero: at the first step no gradient reaches the layers before it.
    assert state["optimizer"].metrics()["refreshes"] == 1 + len(state["optimizer"].coverage().layers)


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_a_compiled_model_never_runs_a_whole_batch_uncompiled(approximation, workload):
    """Ahead of the first step a quarter of the batch shows the layers; random numbers are drawn as without."""
    submission, factors, uncompiled, point = load(approximation), {}, [], {"learning_rate": 1e-3}
    batch = next(workload._build_input_queue(seeds.root(3), "train", "", 8))
    for compiles in (True, False):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, _ = workload.init_model_fn(seeds.root(1))
        if compiles:
            first = next(module for module in model.modules() if isinstance(module, torch.nn.Linear))
            first.register_forward_pre_hook(
                lambda module, args: None if torch.compiler.is_compiling() else uncompiled.append(len(args[0]))
            )
            model = torch.compile(model, backend="aot_eager")
        state = submission.init_optimizer_state(workload, model, None, point, seeds.root(2))
        state, *_ = submission.update_params(
            workload, model, None, None, point, batch, workload.loss_type, state, [], 0, seeds.root(4), {}
        )
        factors[compiles] = state["optimizer"].factors()
        drawn = torch.rand(())
        if compiles:
            assert state["optimizer"].coverage().note == "statistics steps run compiled"
            factors["drawn"] = drawn
    assert uncompiled == [2]
    assert factors["drawn"] == drawn
    assert_same_factors(factors[True], factors[False], rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()


def test_a_rehearsal_on_what_does_not_count(workload):
    """The first quarter of the batch may be padding."""
    submission, point = load("reduce"), {"learning_rate": 1e-3}
    batch = next(workload._build_input_queue(seeds.root(3), "train", "", 8))
    weights = torch.ones(batch["targets"].shape)
    weights[:2] = 0
    factors = []
    for compiles in (True, False):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, _ = workload.init_model_fn(seeds.root(1))
        model = torch.compile(model, backend="aot_eager") if compiles else model
        state = submission.init_optimizer_state(workload, model, None, point, seeds.root(2))
        padded = batch | {"weights": weights}
        state, *_ = submission.update_params(
            workload, model, None, None, point, padded, workload.loss_type, state, [], 0, seeds.root(4), {}
        )
        note = state["optimizer"].coverage().note
        assert note == ("statistics steps run compiled" if compiles else "")
        factors.append(state["optimizer"].factors())
    assert_same_factors(*factors, rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()
