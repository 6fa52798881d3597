"""KFAC does what any torch.optim.Optimizer does: groups, schedulers, closures, copies, and clear refusals."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler

from algoperf_kfac.pytorch import KFAC, KFACConfig, NadamW
from tests.pytorch.toys import (
    Patches,
    assert_finite,
    assert_same_factors,
    assert_same_parameters,
    covered,
    images,
    mlp,
    reasons,
    train,
    vectors,
)


def moved(model: nn.Module, start: nn.Module) -> dict[str, Tensor]:
    return {n: (p - q).detach() for (n, p), q in zip(model.named_parameters(), start.parameters(), strict=True)}


def test_groups_set_their_own_learning_rate() -> None:
    """A layer's weight and bias may lie in different groups."""
    model = mlp(5, 4, 3)
    start, twin, batch = copy.deepcopy(model), copy.deepcopy(model), vectors()
    weights = [p for p in model.parameters() if p.dim() == 2]
    biases = [p for p in model.parameters() if p.dim() == 1]
    grouped = KFAC(model, [{"params": weights, "lr": 1e-2}, {"params": biases, "lr": 3e-2}], learning_rate=5.0)
    train(model, grouped, [batch])
    train(twin, KFAC(twin, learning_rate=1e-2), [batch])
    for (name, got), want in zip(moved(model, start).items(), moved(twin, start).values(), strict=True):
        torch.testing.assert_close(got, want * (3 if name.endswith("bias") else 1), rtol=1e-4, atol=1e-7)


def test_groups_set_their_own_weight_decay() -> None:
    """p <- (1 - lr weight_decay) p - lr direction, the direction free of the decay."""
    model = mlp(5, 4, 3)
    with torch.no_grad():
        model[0].bias += 1
    start, twin, batch = copy.deepcopy(model), copy.deepcopy(model), vectors()
    groups = [
        {"params": [model[0].weight, model[2].weight], "weight_decay": 0.5},
        {"params": [model[0].bias, model[2].bias]},
    ]
    train(model, KFAC(model, groups, learning_rate=0.1), [batch])
    train(twin, KFAC(twin, learning_rate=0.1), [batch])
    for name, p in model.named_parameters():
        decay = 0.05 * start.get_parameter(name) if name.endswith("weight") else 0.0
        torch.testing.assert_close(p, twin.get_parameter(name) - decay)


def test_groups_set_their_own_betas() -> None:
    """Momentum belongs to a parameter's group."""
    model = mlp(5, 4, 3)
    optimizer = KFAC(
        model,
        [{"params": model[0].parameters(), "betas": (0.5, 0.9)}, {"params": model[2].parameters()}],
        initial_statistics=1,
    )
    train(model, optimizer, [vectors(), vectors()])
    g = model[0].weight.grad
    before = optimizer.state[model[0].weight]["exp_avg"].clone()
    other = optimizer.state[model[2].weight]["exp_avg"].clone()
    for p in model.parameters():
        p.grad.zero_()
    optimizer.step()
    assert g is not None
    torch.testing.assert_close(optimizer.state[model[0].weight]["exp_avg"], 0.5 * before)
    torch.testing.assert_close(optimizer.state[model[2].weight]["exp_avg"], 0.9 * other)


def test_lambda_lr_scales_the_step() -> None:
    model = mlp(5, 4, 3)
    optimizer = KFAC(model, learning_rate=0.1, refresh_interval=10)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step == 1 else 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()" would mean a lost patch
        train(model, optimizer, [vectors()])
        scheduler.step()
        start = copy.deepcopy(model)
        train(model, optimizer, [vectors()])
        scheduler.step()
    assert_same_parameters(model, start, rtol=0, atol=0)
    train(model, optimizer, [vectors()])
    assert all(m.abs().max() > 0 for m in moved(model, start).values())


def test_one_cycle_lr_cycles_the_momentum_too() -> None:
    model, seen = mlp(5, 4, 3), []
    optimizer = KFAC(model, factor_interval=2, refresh_interval=2, initial_statistics=1)
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=10)
    for _ in range(9):
        train(model, optimizer, [vectors()])
        scheduler.step()
        seen.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"]))
    assert max(lr for lr, _ in seen) == pytest.approx(0.05, rel=0.1)
    assert min(beta1 for _, (beta1, _) in seen) == pytest.approx(0.85, abs=0.01)
    assert {beta2 for _, (_, beta2) in seen} == {optimizer.config.beta2}
    assert_finite(model, optimizer)


def test_reduce_lr_on_plateau() -> None:
    model = mlp(5, 4, 3)
    optimizer = KFAC(model, learning_rate=0.1)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for _ in range(3):
        train(model, optimizer, [vectors()])
        scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] == 0.025


def test_a_closure_runs_inside_capture() -> None:
    model = mlp(5, 4, 3)
    twin = copy.deepcopy(model)
    options = {"factor_interval": 2, "refresh_interval": 2, "initial_statistics": 1}
    optimizer, other = (KFAC(m, **options) for m in (model, twin))
    for x, y in [vectors() for _ in range(4)]:

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        got = optimizer.step(closure)
        assert got.requires_grad
        assert torch.equal(got, train(twin, other, [(x, y)])[0])
    assert_same_parameters(model, twin, rtol=0, atol=0)
    assert_same_factors(optimizer.factors(), other.factors(), rtol=0, atol=0)


def test_zero_grad_drops_pending_statistics() -> None:
    """What belongs to gradients that were thrown away, as after an overflow, must not enter the factors."""
    model, (x, y) = mlp(5, 4, 3), vectors()
    twin = copy.deepcopy(model)
    optimizer, other = KFAC(model), KFAC(twin)
    with optimizer.capture():
        model(100 * x).square().sum().backward()
    optimizer.zero_grad()
    train(model, optimizer, [(x, y)])
    train(twin, other, [(x, y)])
    assert_same_factors(optimizer.factors(), other.factors(), rtol=0, atol=0)


@pytest.mark.parametrize("clear", [lambda p: p.grad.data.zero_(), lambda p: setattr(p, "grad", p.grad * 0)])
def test_gradients_zeroed_without_a_trace_take_their_statistics_along(clear: Callable[[Tensor], object]) -> None:
    """Neither a version nor an identity tells that these are gone."""
    model, (x, y) = mlp(5, 4, 3), vectors()
    twin = copy.deepcopy(model)
    optimizer, other = KFAC(model), KFAC(twin)
    with optimizer.capture():
        F.cross_entropy(model(100 * x), y).backward()  # a spike: the step is skipped
    for p in model.parameters():
        clear(p)
    for net, its in ((model, optimizer), (twin, other)):
        with its.capture():
            F.cross_entropy(net(x), y).backward()
        its.step()
    assert_same_factors(optimizer.factors(), other.factors(), rtol=0, atol=0)


def test_micro_batches_are_kept_whatever_became_of_their_gradients() -> None:
    """Scaled in place or replaced, and of a first micro-batch without any: the factors are those of both."""
    for change in (lambda g: g / 3, lambda g: g.div_(3), lambda g: g):
        model, (x, y) = mlp(5, 4, 3), vectors(8)
        optimizer = KFAC(model)
        for weight in (0.0 if change(torch.ones(1)) == 1 else 1.0, 1.0):
            with optimizer.capture(loss_normalizer=8):
                (weight * F.cross_entropy(model(x), y)).backward()
            for p in model.parameters():
                p.grad = change(p.grad)
        optimizer.step()
        homogeneous = torch.cat([x, torch.ones(8, 1)], 1)
        torch.testing.assert_close(optimizer.factors()["0"].A, homogeneous.T @ homogeneous / 8)
        assert float(optimizer._layers.states["0"].examples / optimizer._layers.states["0"].weight) == 16


def test_a_thawed_layer_joins_and_the_others_go_on() -> None:
    """Bit for bit: the layers that were there keep their factors, moments and turns."""
    model = mlp(5, 4, 4, 3)
    model[0].requires_grad_(False)
    optimizer = KFAC(model, learning_rate=0.01, factor_interval=2, refresh_interval=4, initial_statistics=2)
    assert covered(optimizer) == {"2", "4"}
    train(model, optimizer, [vectors() for _ in range(5)])
    before = copy.deepcopy(optimizer.state_dict()["kfac"]["layers"])
    model[0].requires_grad_(True)
    with pytest.raises(ValueError, match="does not belong to the model"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.02})
    assert [layer.name for layer in optimizer.coverage().layers] == ["2", "4", "0"]
    after = optimizer.state_dict()["kfac"]["layers"]
    for name, entry in before.items():
        assert all(torch.equal(a, b) for a, b in zip(entry["state"]["a"], after[name]["state"]["a"], strict=True))
    weight = model[0].weight.detach().clone()
    train(model, optimizer, [vectors() for _ in range(5)])
    assert not torch.equal(weight, model[0].weight)
    assert optimizer.metrics()["0/refreshes"] > 0


@pytest.mark.parametrize(
    "make", [lambda: nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)), lambda: nn.GRUCell(5, 5)]
)
def test_a_bias_that_was_trained_ahead_of_its_weight_joins_with_it(make: Callable[[], nn.Module]) -> None:
    """BitFit first, then everything: the layers are those of an optimizer that had all from the start."""
    model, (x, y) = make(), vectors()
    biases = [p for name, p in model.named_parameters() if "bias" in name]
    optimizer = KFAC(model, biases, lr=1e-2)
    assert optimizer.coverage().fraction == 0
    train(model, optimizer, [(x, y)])
    optimizer.add_param_group({"params": [p for name, p in model.named_parameters() if "weight" in name]})
    whole = KFAC(copy.deepcopy(model))
    assert {spec.name: spec for spec in optimizer.coverage().layers} == {s.name: s for s in whole.coverage().layers}
    assert not reasons(optimizer)
    train(model, optimizer, [(x, y)])
    assert optimizer.metrics()["refreshes"] == len(optimizer.coverage().layers)


def test_parameters_without_gradients_wait() -> None:
    """Without a gradient a parameter stays as it is, and its moments are corrected by its own count."""
    model = Patches()
    optimizer = KFAC(model, learning_rate=0.01, initial_statistics=1)
    train(model, optimizer, [images()])
    start = copy.deepcopy(model)
    optimizer.zero_grad()
    F.cross_entropy(model(images()[0]), torch.randint(3, (8,))).backward()
    model.up.weight.grad = None  # a covered layer in part
    model.head.weight.grad = model.head.bias.grad = None  # a covered layer
    model.norm.bias.grad = None  # a fallback parameter
    optimizer.step()
    steps = {name: int(optimizer.state[p]["step"]) for name, p in model.named_parameters()}
    stayed = {name for name, m in moved(model, start).items() if not m.any()}
    assert stayed == {"up.weight", "head.weight", "head.bias", "norm.bias"}
    assert {name for name, count in steps.items() if count == 1} == stayed
    train(model, optimizer, [images()])
    assert_finite(model, optimizer)


def test_no_gradients_at_all() -> None:
    model = mlp(5, 4, 3)
    start = copy.deepcopy(model)
    optimizer = KFAC(model, factor_interval=2, refresh_interval=2, initial_statistics=1)
    train(model, optimizer, [vectors()])
    start = copy.deepcopy(model)
    optimizer.zero_grad()
    optimizer.step()
    assert_same_parameters(model, start, rtol=0, atol=0)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize(
    "options", [{}, {"fisher": "mc"}, {"scaling": "second_moment"}], ids=["default", "mc", "moment"]
)
def test_a_copy_of_model_and_optimizer_trains_on_alike(how: str, options: dict) -> None:
    model, batches = Patches(), [images() for _ in range(6)]
    options = {"factor_interval": 2, "refresh_interval": 4, "initial_statistics": 1, **options}
    fisher_loss = "softmax_cross_entropy" if "fisher" in options else None
    optimizer = KFAC(model, **options)
    train(model, optimizer, batches[:3], fisher_loss=fisher_loss)
    pair = (model, optimizer)
    model2, optimizer2 = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    for m, o in ((model, optimizer), (model2, optimizer2)):
        train(m, o, batches[3:], fisher_loss=fisher_loss)
    assert_same_parameters(model, model2, rtol=0, atol=0)
    assert_same_factors(optimizer.factors(), optimizer2.factors(), rtol=0, atol=0)
    assert str(optimizer2.coverage()) == str(optimizer.coverage())
    assert optimizer2.metrics() == optimizer.metrics()


def test_repr_and_defaults() -> None:
    optimizer = KFAC(mlp(5, 4, 3), learning_rate=0.2, weight_decay=0.1)
    assert "lr: 0.2" in repr(optimizer)
    assert optimizer.defaults["weight_decay"] == 0.1


def test_constructor_refuses_what_it_cannot_use() -> None:
    model = mlp(5, 4, 3)
    with pytest.raises(ValueError, match=r"unknown hyperparameter 'grad_clip': known are .*'learning_rate'"):
        KFAC(model, grad_clip=0.1)
    with pytest.raises(ValueError, match="unknown hyperparameter 'rate'"):
        KFAC(model, config=KFACConfig(), rate=0.1)
    with pytest.raises(ValueError, match="learning_rate is given twice, as lr, too"):
        KFAC(model, lr=0.1, learning_rate=0.1)
    with pytest.raises(ValueError, match="given twice, as betas, too"):
        KFAC(model, betas=(0.9, 0.99), beta2=0.9)
    with pytest.raises(TypeError, match="takes the model itself, not generator"):
        KFAC(model.parameters())
    with pytest.raises(ValueError, match=r"shape \(3,\) in params does not belong to the model"):
        KFAC(model, [*model.parameters(), nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match="no trainable parameter"):
        KFAC(model.requires_grad_(False))


def test_torchs_names_for_hyperparameters() -> None:
    by_torch = KFAC(mlp(5, 3), lr=0.5, betas=(0.75, 0.96875), eps=1e-6, weight_decay=0.1)
    ours = KFAC(mlp(5, 3), learning_rate=0.5, one_minus_beta1=0.25, beta2=0.96875, eps=1e-6, weight_decay=0.1)
    assert by_torch.config == ours.config
    assert by_torch.defaults == ours.defaults


def test_config_and_keywords_combine() -> None:
    config = KFACConfig(learning_rate=0.5, damping=0.1)
    optimizer = KFAC(mlp(5, 3), config=config, damping=0.2)
    assert optimizer.config == dataclasses.replace(config, damping=0.2)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_without_covered_layers_it_is_nadamw() -> None:
    """Embedding and norm only: the update of the fallback, and no capture needed."""
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4))
    twin = copy.deepcopy(model)
    ours = KFAC(model, learning_rate=0.1, weight_decay=0.1)
    theirs = NadamW(twin.parameters(), lr=0.1, betas=(0.9, 0.99), weight_decay=0.1)
    for _ in range(5):
        tokens, target = torch.randint(5, (6,)), torch.randn(6, 4)
        for m, o in ((model, ours), (twin, theirs)):
            o.zero_grad()
            (m(tokens) - target).square().mean().backward()
            o.step()
    assert_same_parameters(model, twin)


@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_backward_fisher_without_covered_layers(fisher: str) -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4))
    optimizer = KFAC(model, fisher=fisher)
    with optimizer.capture() as capture:
        outputs = model(torch.randint(5, (6,)))
        capture.backward_fisher(outputs, "mean_squared_error")
        outputs.square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_a_forgotten_backward_fisher_says_so(fisher: str) -> None:
    from algoperf_kfac.pytorch import MissingStatisticsError

    model = mlp(5, 3)
    optimizer = KFAC(model, fisher=fisher)
    with pytest.raises(MissingStatisticsError, match=r"capture\.backward_fisher\(outputs, loss_type\)"):
        train(model, optimizer, [vectors()])


def test_nadamw_without_momentum_is_adamw_without_momentum() -> None:
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    ours, adam = (
        NadamW([p], lr=0.1, betas=(0.0, 0.9)),
        torch.optim.AdamW([q], lr=0.1, betas=(0.0, 0.9), weight_decay=0),
    )
    for _ in range(4):
        g = torch.randn(3)
        p.grad, q.grad = g.clone(), g.clone()
        ours.step()
        adam.step()
    torch.testing.assert_close(p, q)


@pytest.mark.parametrize(
    "bad", [{"lr": -1.0}, {"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}, {"eps": -1.0}, {"weight_decay": -1.0}]
)
def test_nadamw_refuses_values_out_of_range(bad: dict) -> None:
    with pytest.raises(ValueError, match=r"must"):
        NadamW([nn.Parameter(torch.ones(1))], **bad)
