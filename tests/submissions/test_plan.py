"""The plan's numbers against the real optimizer and against counted flops."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.cost import ITEM_BYTES, Load
from algoperf_kfac.layers import Coverage, LayerSpec
from algoperf_kfac.pytorch import KFAC
from submissions.cli.pytorch_probe import Subject, sight_optimizer
from tests.submissions.planned import BATCH, Branching, Net, Recurrent, inputs, make_plan, seen_by


def tensor_bytes(tree: object, seen: set[int]) -> int:
    """Bytes of all tensors in a state_dict, each storage once."""
    if isinstance(tree, torch.Tensor):
        if tree.data_ptr() in seen or not tree.is_floating_point():
            return 0
        seen.add(tree.data_ptr())
        return tree.numel() * tree.element_size()
    values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return sum(tensor_bytes(value, seen) for value in values)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"approximation": "reduce", "max_factor_dim": 6},
        {"max_factor_dim": 6, "large_factor": "one_sided"},
        {"preconditioner": "inverse"},
        {"preconditioner": "inverse", "grafting": False, "damping_mode": "absolute"},
        {"scaling": "second_moment"},
    ],
    ids=str,
)
def test_state_memory_is_that_of_the_optimizer(config):
    torch.manual_seed(0)
    model = Net()
    optimizer = KFAC(model, **config)
    for _ in range(2):  # the raw weight is covered after the first
        optimizer.zero_grad()
        with optimizer.capture():
            model(inputs()).square().mean().backward()
        optimizer.step()
    plan = make_plan(optimizer.coverage(), {}, optimizer.config)
    assert plan.memory.state == tensor_bytes(optimizer.state_dict(), set())
    assert plan.memory.parameters == sum(p.numel() * p.element_size() for p in model.parameters())


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_model_flops_are_those_counted():
    # Without groups: the counter takes the weight gradient of a grouped convolution for a dense one.
    seen = seen_by(lambda: Net(groups=1))
    x = inputs().requires_grad_()  # with a gradient for the first layer's input, which the formula includes
    model = Net(groups=1)
    assert make_plan(seen.coverage, seen.loads, seen.config).flops.model == counted(
        lambda: model(x).sum().backward()
    )
    grouped, dense = (
        next(layer for layer in make_plan(s.coverage, s.loads, s.config).layers if layer.spec.name == "conv")
        for s in (seen_by(), seen)
    )
    assert 2 * grouped.model == dense.model


def test_expand_statistics_flops_are_those_counted():
    model = nn.Sequential(nn.Linear(5, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False))
    x = torch.randn(BATCH, 6, 5, requires_grad=True)
    optimizer = KFAC(model)

    def step(captured):
        with optimizer.capture(force=captured) if captured else torch.enable_grad():
            model(x).sum().backward()

    subject = Subject(
        lambda: model, lambda net, n: net(x[:n].detach().to(next(net.parameters()).device)), BATCH, None
    )
    seen = sight_optimizer(subject, KFAC)
    plan = make_plan(seen.coverage, seen.loads, seen.config)
    step(True)  # the first one also compares what is captured with the gradients
    optimizer.step()
    extra = counted(lambda: step(True)) - counted(lambda: step(False))
    assert sum(layer.statistics for layer in plan.layers) == extra


@pytest.mark.parametrize("config", [{}, {"preconditioner": "inverse"}, {"scaling": "second_moment"}], ids=str)
def test_preconditioning_flops_are_those_counted(config):
    torch.manual_seed(0)
    model = Net()
    optimizer = KFAC(model, max_factor_dim=6, **config)
    with optimizer.capture():
        model(inputs()).square().mean().backward()
    optimizer.step()
    for layer in make_plan(optimizer.coverage(), {}, optimizer.config).layers:
        spec, state = layer.spec, optimizer._layers.states[layer.spec.name]
        m = torch.randn(spec.groups, spec.out_dim, spec.factor_in_dim)
        flops = counted(lambda m=m, state=state: optimizer.scaling.precondition(state, m, m, 0.9))
        assert layer.preconditioning == flops, spec.name


def one_layer(**fields) -> Coverage:
    spec = {
        "name": "l",
        "kind": "linear",
        "weight": "l.weight",
        "bias": None,
        "weight_shape": (10, 30),
        "groups": 1,
    }
    spec |= {"in_dim": 30, "out_dim": 10, "approximation": "reduce", "in_blocks": (30,), "out_blocks": (10,)}
    return Coverage((LayerSpec(**(spec | fields)),), ())


def test_flops_by_hand():
    load = Load(examples=8, positions=5, products=40, input_elements=1200, output_elements=400)
    config = KFACConfig(factor_interval=2, refresh_interval=4)
    reduce = make_plan(one_layer(), {"l.weight": load}, config)
    assert reduce.flops.model == 6 * 40 * 300
    assert reduce.flops.statistics * reduce.flops.model == pytest.approx((1600 + 2 * 8 * (900 + 100)) / 2)
    assert reduce.flops.refresh * reduce.flops.model == pytest.approx(11 * (27000 + 1000) / 4)
    expand = make_plan(one_layer(approximation="expand"), {"l.weight": load}, config)
    assert expand.flops.statistics * expand.flops.model == pytest.approx(2 * 40 * (900 + 100) / 2)
    inverse = make_plan(one_layer(), {"l.weight": load}, KFACConfig(preconditioner="inverse"))
    assert inverse.flops.refresh * inverse.flops.model == pytest.approx((27000 + 1000) / 20)


def test_refreshes_are_divided_over_devices():
    base = one_layer().layers[0]
    specs = []
    for i, size in enumerate((40, 40, 20)):
        changes = {"name": str(i), "weight": str(i), "in_blocks": (size,), "out_blocks": ()}
        specs.append(LayerSpec(**(vars(base) | changes)))
    coverage, loads = Coverage(tuple(specs), ()), {"0": Load(1, 1, 1, 1, 1)}
    cubes = [40**3, 40**3, 20**3]
    for devices, busiest in ((1, sum(cubes)), (2, 40**3 + 20**3), (3, 40**3), (8, 40**3)):
        plan = make_plan(coverage, loads, KFACConfig(), devices=devices)
        assert plan.flops.refresh * plan.flops.model == pytest.approx(11 * busiest / 20)
    with pytest.raises(ValueError, match="devices must be at least 1"):
        make_plan(coverage, loads, KFACConfig(), devices=0)


def test_a_plan_without_data_is_the_plan_with_data():
    config = {"approximation": "reduce"}
    meta, real, scaled = seen_by(**config), seen_by(Branching, **config), seen_by(Branching, small=2, **config)
    assert meta.note == ""
    assert real.note == f"seen on a real batch of {BATCH}"
    assert scaled.note == f"seen on a real batch of 2, scaled to {BATCH}"
    assert meta.coverage == real.coverage == scaled.coverage
    assert {layer.name for layer in meta.coverage.layers} == {"conv", "up", "raw", "head"}
    assert meta.loads == real.loads == scaled.loads
    assert meta.loads["conv.weight"] == Load(BATCH, 12, 12 * BATCH, 4 * 48 * BATCH, 6 * 12 * BATCH, 3)
    assert meta.loads["up.weight"] == Load(BATCH, 48, 12 * BATCH, 6 * 12 * BATCH, 5 * 48 * BATCH, 2)
    assert meta.loads["raw"] == Load(BATCH, 48, 48 * BATCH, 5 * 48 * BATCH, 7 * 48 * BATCH)


def test_planning_leaves_torch_as_it_was():
    before = torch.Generator, torch.autocast, nn.Parameter.__new__
    seen_by()
    assert (torch.Generator, torch.autocast, nn.Parameter.__new__) == before
    assert nn.Linear(2, 2).weight.device.type == "cpu"


@dataclasses.dataclass
class Outputs:
    """As libraries of models return them, with what refers back to it."""

    logits: torch.Tensor
    itself: object = None


class ReturnsAnObject(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> Outputs:
        outputs = Outputs(self.head(x))
        outputs.itself = [outputs]
        return outputs


def test_a_model_that_returns_an_object():
    subject = Subject(ReturnsAnObject, lambda net, n: net(torch.zeros(n, 4)), BATCH, None)
    assert sight_optimizer(subject, KFAC).coverage.fraction == 1


def test_both_weights_of_an_lstm_see_every_time_step():
    subject = Subject(Recurrent, lambda net, n: net(torch.zeros(n, 7, 3)), BATCH, None)
    seen = sight_optimizer(subject, KFAC)
    for direction in ("", "_reverse"):
        inputs_load, hidden_load = (seen.loads[f"lstm.weight_{side}_l0{direction}"] for side in ("ih", "hh"))
        assert inputs_load == Load(BATCH, 7, 7 * BATCH, 7 * BATCH * 3, 7 * BATCH * 20, in_segments=True)
        assert hidden_load == Load(BATCH, 7, 7 * BATCH, 7 * BATCH * 5, 7 * BATCH * 20, in_segments=True)


def test_peaks_by_hand():
    """Reduce makes outer products once the activations are gone, expand while they are there."""
    load = Load(examples=8, positions=5, products=40, input_elements=1200, output_elements=400)
    total, matrices = 300, 900 + 100
    for approximation, held in (("reduce", 8 * (30 + 10)), ("expand", matrices)):
        coverage = one_layer(approximation=approximation)
        seen = {"activation_bytes": 1e6, "capture_bytes": 1e5, "output_bytes": 2e5}
        plan = make_plan(coverage, {"l.weight": load}, KFACConfig(), **seen)
        assert plan.memory.capture == 1e5 + ITEM_BYTES * held
        assert plan.memory.loss == 3 * 2e5
        assert plan.memory.peak == ITEM_BYTES * 2 * total + plan.memory.state + 1.6e6 + plan.memory.capture
        assert plan.memory.first_order_peak == ITEM_BYTES * 4 * total + 1.6e6
    idle = make_plan(coverage, {}, KFACConfig(), activation_bytes=0.0)
    assert idle.memory.first_order_peak == ITEM_BYTES * 6 * total


def test_rows_of_graphs_are_positions_of_their_graphs():
    make = lambda: nn.Linear(3, 5)  # noqa: E731
    subject = Subject(make, lambda net, n: net(torch.zeros(12, 3)), 3, None, segments={12: 3})
    assert sight_optimizer(subject, KFAC).loads["weight"] == Load(3, 4, 12, 36, 60, in_segments=True)
