"""The shared training step: the right gradient, the capture context, clipping, logging, hyperparameters."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import re
import weakref
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch

from submissions.common import batch_sizes, schedule
from submissions.common.hyperparameters import TrainingConfig
from submissions.common.logs import LOG_PERIOD
from submissions.common.pytorch import clip_gradient, compute_gradient, first_part, log_step
from submissions.kfac_reduce import DESCRIPTION as KFAC
from submissions.nadamw import DESCRIPTION as NADAMW
from workloads import registry, seeds


@pytest.fixture(scope="module")
def workload():
    return registry.load("bible_lm", "pytorch")


@pytest.fixture
def model(workload):
    return workload.init_model_fn(seeds.root(1))[0]


@pytest.fixture(scope="module")
def batch(workload):
    return next(workload._build_input_queue(seeds.root(1), "train", "", 4))


def _gradient(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def _step(workload, model, batch, **changes):
    return compute_gradient(workload, model, batch, None, seeds.root(2), **changes)


def test_gradient_is_that_of_the_mean_over_valid_tokens(workload, model, batch):
    weights = torch.ones_like(batch["weights"])
    weights[1:, 10:] = 0
    masked = {**batch, "weights": weights}
    result = _step(workload, model, masked)
    got = _gradient(model)
    model.zero_grad()
    losses = model(batch["inputs"]).log_softmax(-1).gather(-1, batch["targets"][..., None])[..., 0]
    mean = -(losses * weights).sum() / weights.sum()
    mean.backward()
    torch.testing.assert_close(result.loss, mean.detach())
    assert result.n_valid.item() == weights.sum().item() == 64 + 3 * 10
    for name, gradient in _gradient(model).items():
        torch.testing.assert_close(got[name], gradient, msg=name)


def test_old_gradients_are_dropped_and_nothing_keeps_the_graph(workload, model, batch):
    first = _step(workload, model, batch)
    once = _gradient(model)
    _step(workload, model, batch)
    assert all(torch.equal(once[name], gradient) for name, gradient in _gradient(model).items())
    assert not first.loss.requires_grad


def test_nothing_keeps_the_logits(workload, model, batch):
    """They are the largest array of a language model's step, and nobody reads them after it."""
    outputs = []
    model.register_forward_hook(lambda module, inputs, output: outputs.append(weakref.ref(output)))
    result = _step(workload, model, batch)
    assert outputs
    assert not any(output() is not None for output in outputs)
    assert result.loss.isfinite()


def test_the_backward_pass_does_without_the_logits(workload, model, batch):
    outputs, alive = [], []
    model.register_forward_hook(lambda module, inputs, output: outputs.append(weakref.ref(output)))
    model.output.weight.register_hook(lambda grad: alive.append(outputs[-1]() is not None))
    _step(workload, model, batch)
    assert alive == [False]


def test_a_part_of_a_batch(batch):
    part = first_part(batch, 4)
    assert {name: tuple(part[name].shape) for name in part} == {
        name: (1, *batch[name].shape[1:]) for name in batch if isinstance(batch[name], torch.Tensor)
    }
    torch.testing.assert_close(part["inputs"], batch["inputs"][:1])
    assert first_part({**batch, "weights": None}, 2)["weights"] is None
    assert first_part(batch, 3) is None
    assert first_part({**batch, "sizes": torch.ones(7)}, 4) is None
    assert first_part({**batch, "number": torch.ones(())}, 4) is None
    assert first_part({**batch, "graph": object()}, 4) is None


def test_context_spans_forward_and_backward_and_learns_the_normaliser_between(workload, model, batch):
    seen = []

    class Capture:
        loss_normalizer = None

        def backward_fisher(self, logits, loss_type, weights):
            seen.append(
                ("fisher", self.loss_normalizer, logits.requires_grad, loss_type, weights is batch["weights"])
            )

    capture = Capture()
    handle = model.output.weight.register_hook(lambda grad: seen.append(("backward", capture.loss_normalizer)))
    forward = model.register_forward_hook(lambda *_: seen.append(("forward", capture.loss_normalizer)))

    @contextlib.contextmanager
    def context():
        seen.append("enter")
        yield capture
        seen.append("exit")

    _step(workload, model, batch, context=context(), loss_type="softmax")
    handle.remove()
    forward.remove()
    count = torch.tensor(256.0)
    fisher = ("fisher", count, True, "softmax", True)
    assert seen == ["enter", ("forward", None), fisher, ("backward", count), "exit"]


def test_label_smoothing_and_dropout_arrive(workload, model, batch):
    torch.manual_seed(0)
    plain = _step(workload, model, batch).loss
    assert _step(workload, model, batch, label_smoothing=0.2).loss != plain
    assert _step(workload, model, batch, dropout_rate=0.5).loss != plain
    assert _step(workload, model, batch, dropout_rate=0.0).loss == plain


def test_clipping(workload, model, batch):
    _step(workload, model, batch)
    norm = torch.stack([gradient.norm() for gradient in _gradient(model).values()]).norm()
    before = _gradient(model)
    clip_gradient(model.parameters(), None)
    clip_gradient(model.parameters(), 2 * norm.item())
    assert all(torch.equal(before[name], gradient) for name, gradient in _gradient(model).items())
    clip_gradient(model.parameters(), norm.item() / 4)
    for name, gradient in _gradient(model).items():
        torch.testing.assert_close(gradient, before[name] / 4, rtol=1e-4, atol=1e-8)


def test_logging_is_sparse_and_optional(workload, model, batch):
    result = _step(workload, model, batch)
    rows = []
    logger = SimpleNamespace(append_scalar_metrics=lambda row, step: rows.append((step, row)))
    logged = SimpleNamespace(metrics_logger=logger)
    for step in range(2 * LOG_PERIOD + 1):
        log_step(logged, model, result.loss, step, extra=1.0)
    assert [step for step, _ in rows] == [0, LOG_PERIOD, 2 * LOG_PERIOD]
    assert set(rows[0][1]) == {"loss", "grad_norm", "extra"}
    assert rows[0][1]["grad_norm"] > 0
    log_step(SimpleNamespace(metrics_logger=None), model, result.loss, 0)


DESCRIPTION = dataclasses.replace(
    NADAMW, defaults={**NADAMW.defaults, "learning_rate": 1e-3, "beta2": 0.9, "grad_clip": None}
)
Point = namedtuple("Hyperparameters", ["beta2"])


@pytest.mark.parametrize("given", [None, {}, Point(0.99)])
def test_points_are_completed(given):
    training, config = DESCRIPTION.configure(given)
    assert (config.learning_rate, training.grad_clip) == (1e-3, None)
    assert config.beta2 == (0.99 if given else 0.9)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0),
        ("learning_rate", "0.1"),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("learning_rate", True),
        ("beta2", 1.0),
        ("beta2", -0.1),
        ("grad_clip", 0),
        ("grad_clip", math.inf),
        ("warmup_factor", 1.0),
        ("horizon_factor", 0),
        ("label_smoothing", -0.1),
        ("dropout_rate", "0.1"),
        ("momentum", 0.9),
    ],
)
@pytest.mark.parametrize("description", [DESCRIPTION, KFAC], ids=["nadamw", "kfac"])
def test_bad_hyperparameters_are_named(description, name, value):
    if description is KFAC and name == "learning_rate" and value == 0:
        assert description.configure({name: value})[1].learning_rate == 0
        return
    words = (
        f"hyperparameter {name}={value!r}: allowed is"
        if name != "momentum"
        else "unknown hyperparameter 'momentum'"
    )
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        description.configure({name: value})
    if name == "momentum":
        assert all(f"'{known}'" in str(caught.value) for known in ("grad_clip", "horizon_factor", "beta2"))


@pytest.mark.parametrize("given", [3, "beta2", [("beta2", 0.9)]])
def test_what_is_no_point_is_refused(given):
    with pytest.raises(ValueError, match="must be a namedtuple, a mapping or None"):
        DESCRIPTION.configure(given)


def test_batch_sizes():
    assert batch_sizes.get_batch_size("criteo1tb") == 262_144
    assert batch_sizes.get_batch_size("wmt") == 128
    for name in registry.WORKLOADS:
        assert batch_sizes.get_batch_size(name) > 0
    with pytest.raises(ValueError, match=r"'imagenet_vit_map'.*ogbg"):
        batch_sizes.get_batch_size("imagenet_vit_map")


@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5, 0.99])
@pytest.mark.parametrize("horizon", [0.003, 0.75, 1.0])
@pytest.mark.parametrize("shape", ["cosine", "linear", "one_minus_sqrt"])
def test_schedule_lasts_its_horizon(shape, horizon, warmup):
    factors = [schedule.learning_rate_factor(300, horizon, warmup, step, shape) for step in range(400)]
    assert all(0 < factor <= 1 for factor in factors)
    total = max(1, round(300 * horizon))
    assert max(factors[:total]) == pytest.approx(1.0, abs=0.02)
    if total > 10 and warmup < 0.9:
        assert factors[total - 1] < 0.01
        assert len(set(factors[total - 1 :])) == 1


def test_shapes_of_the_decay():
    """Ten steps of warm-up, a hundred of decay: where each shape is half-way, and at the last step."""

    def factor(shape, step):
        training = TrainingConfig(horizon_factor=1.1, warmup_factor=1 / 11, decay_shape=shape)
        return schedule.WARMUP_DECAY.at(100, training, step)

    for shape, half, last in [
        ("cosine", 50, 0.5 * (1 + math.cos(0.99 * math.pi))),
        ("linear", 50, 0.01),
        ("one_minus_sqrt", 25, 1 - math.sqrt(0.99)),
    ]:
        assert [factor(shape, step) for step in (0, 9, 10)] == pytest.approx([0.1, 1.0, 1.0])
        assert factor(shape, 10 + half) == pytest.approx(0.5)
        assert factor(shape, 109) == factor(shape, 500) == pytest.approx(last)
        assert factor(shape, 109) > 0
        falling = [factor(shape, step) for step in range(10, 110)]
        assert all(after < before for before, after in itertools.pairwise(falling))
    default = TrainingConfig()
    assert default.decay_shape == "cosine"
    constant = TrainingConfig(decay_shape="linear", warmup_factor=0.0)
    assert schedule.CONSTANT_AFTER_WARMUP.at(100, constant, 90) == 1.0


@pytest.mark.parametrize("shape", ["exponential", None, 1, ["linear"]])
def test_an_unknown_shape_is_refused_by_name(shape):
    with pytest.raises(ValueError, match=r"hyperparameter decay_shape=.*'cosine', 'linear', 'one_minus_sqrt'"):
        TrainingConfig(decay_shape=shape)
    with pytest.raises(ValueError, match="shape must be one of"):
        schedule.learning_rate_factor(100, 1.0, 0.0, 0, "exponential")


@pytest.mark.parametrize("description", [KFAC, NADAMW], ids=["kfac", "nadamw"])
def test_a_point_names_the_shape(description):
    assert description.configure({"decay_shape": "linear"})[0].decay_shape == "linear"
    assert description.configure(None)[0].decay_shape == "cosine"


def test_training_ends_with_a_schedule_that_decays_where_the_point_says_so():
    def over(which, step, ends):
        training = TrainingConfig(horizon_factor=0.5, ends_with_schedule=ends)
        return which.is_over(40, training, step)

    assert [over(schedule.WARMUP_DECAY, step, True) for step in (0, 19, 20, 21)] == [False, False, True, True]
    assert not over(schedule.WARMUP_DECAY, 30, False)
    assert not over(schedule.CONSTANT_AFTER_WARMUP, 30, True)
    with pytest.raises(ValueError, match=r"ends_with_schedule='yes'.*True or False"):
        TrainingConfig(ends_with_schedule="yes")


def position(clock, step, seconds, *, self_tuning=False, budget_factor=1.0):
    """Of a schedule of 20 steps on a workload with a budget of 1,000 seconds."""
    workload = SimpleNamespace(step_hint=40, max_allowed_runtime_sec=1_000)
    training = TrainingConfig(horizon_factor=0.5, schedule_clock=clock, budget_factor=budget_factor)
    state = {} if seconds is None else {"accumulated_submission_time": seconds}
    return schedule.WARMUP_DECAY.position(workload, training, step, state, self_tuning=self_tuning)


def test_a_schedule_ends_where_the_time_ends():
    # Steps of 100 seconds: ten of them fit, each two of the schedule's. Steps of 10: a hundred, a fifth each.
    assert [position("time", step, 100 * step) for step in (0, 1, 5, 10)] == [0, 2, 10, 20]
    assert [position("time", step, 10 * step) for step in (0, 1, 5, 10, 100)] == [0, 0, 1, 2, 20]
    assert [position("sooner", step, 100 * step) for step in (0, 1, 5, 10)] == [0, 2, 10, 20]
    assert [position("sooner", step, 10 * step) for step in (0, 1, 5, 10, 20)] == [0, 1, 5, 10, 20]
    assert [position("steps", step, 1e9) for step in (0, 7)] == [0, 7]
    assert position("time", 1, 600, self_tuning=True) == position("time", 1, 400) == 8  # 1.5 times the budget
    assert position("time", 1, 400, budget_factor=0.8) == 10


def test_a_schedule_restarts_in_the_time_that_is_left():
    # Steps of 20 seconds: twenty are a schedule and take 400, the second has the other 600, thirty steps.
    steps = (0, 10, 19, 20, 21, 35, 49, 50, 60)
    positions = [position("restart", step, 20 * step) for step in steps]
    assert positions == [0, 10, 19, 20, 20, 30, 39, 40, 40]
    training = TrainingConfig(horizon_factor=0.5, schedule_clock="restart", ends_with_schedule=True)
    once = dataclasses.replace(training, schedule_clock="steps")

    def factor(point, step):
        return schedule.WARMUP_DECAY.at(40, point, step)

    assert [factor(training, step) for step in range(20)] == [factor(once, step) for step in range(20)]
    assert [factor(training, step) for step in range(20, 41)] == [factor(once, step) for step in range(21)]
    assert [schedule.WARMUP_DECAY.is_over(40, training, step) for step in (19, 20, 39, 40)] == [False] * 3 + [True]
    # Steps that slow down: the second schedule ends with the time all the same, and never goes back.
    seconds = [20.0 * step + max(0, step - 30) ** 2 for step in range(50)]
    slower = [position("restart", step, second) for step, second in enumerate(seconds)]
    assert slower == sorted(slower)
    assert [second >= 1_000 for second in seconds] == [place == 40 for place in slower]


def test_a_schedule_does_not_restart_where_there_is_no_time_for_it():
    assert [position("restart", step, 100 * step) for step in (0, 1, 5, 9)] == [0, 2, 10, 18]  # slow: time alone
    assert [position("restart", step, 100 * step) for step in (10, 11)] == [40, 40]
    assert [position("restart", step, 40 * step) for step in (19, 20, 24, 25)] == [19, 40, 40, 40]  # 200 are left
    assert [position("restart", step, 30 * step) for step in (19, 20)] == [19, 20]  # 400 are
    # Without the time, the schedule is one of steps, and at its end.
    assert [position("restart", step, None) for step in (3, 19, 20, 99)] == [3, 19, 40, 40]
    training = TrainingConfig(horizon_factor=0.5, schedule_clock="restart")
    end = schedule.WARMUP_DECAY.at(40, training, 19)
    assert schedule.WARMUP_DECAY.at(40, training, 40) == end < 0.02


def test_a_schedule_by_time_needs_a_runner_that_tells_it():
    with pytest.raises(ValueError, match=r"schedule_clock='time'.*accumulated_submission_time"):
        position("time", 3, None)
    assert position("sooner", 3, None) == 3
    with pytest.raises(ValueError, match="schedule_clock='clock': allowed is one of"):
        TrainingConfig(schedule_clock="clock")


def test_self_tuning_k_fac_keeps_to_its_time():
    assert KFAC.configure(None)[0].schedule_clock == "restart"
    assert KFAC.configure({})[0].schedule_clock == "steps"
    assert NADAMW.configure(None)[0].schedule_clock == "steps"
    assert KFAC.configure(None)[1].refresh_budget == 0.1
    assert KFAC.configure({})[1].refresh_budget is None
