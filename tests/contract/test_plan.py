"""The plan of a model, in either framework, says of coverage and state what the optimizer then has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algoperf_kfac import plan
from algoperf_kfac.config import KFACConfig
from tests.contract.frameworks import EVERY_STEP, NAMES, Run, array, parameters_of, start
from tests.contract.models import Model, convolutional, perceptron, recurrent, tied

MLP = perceptron((64, 96, 10))
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "power": {},
    "second_moment": {"scaling": "second_moment"},
    "inverse": {"preconditioner": "inverse"},
    "drift": {"drift_tolerance": 0.1},
    "following": {"decomposition": "qr"},
    "polar": {"scaling": "polar"},
    "polar-blocks": {"scaling": "polar", "max_factor_dim": 40, "length": "rms"},
    "no-grafting": {"grafting": False},
    "one-sided": {"max_factor_dim": 70, "large_factor": "one_sided"},
    "blocks": {"max_factor_dim": 40},
    "reduce": {"approximation": "reduce"},
    "mixed": {"approximation": "mixed", "statistics_rows": 4},
}


def trained(framework: str, model: Model, **options: Any) -> Run:
    """In PyTorch after a step, which makes bases and shows what tables are tied; in JAX all is there before."""
    run = start(framework, model, dtype="float32", **EVERY_STEP, **options)
    if framework == "pytorch":
        run.step()
    return run


def planned(framework: str, model: Model, **options: Any) -> Any:
    config = KFACConfig(**EVERY_STEP, **options)
    if framework == "pytorch":
        batch = tuple(array("pytorch", x, "float32") for x in model.inputs)
        return plan(model.module().float(), batch, config=config)
    inputs = [array("jax", x, "float32") for x in model.inputs]
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs]
    return plan(model.apply, parameters_of(model, "float32"), *shapes, config=config)


@pytest.mark.parametrize("framework", NAMES)
@pytest.mark.parametrize("options", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_the_real_state(framework: str, options: dict[str, Any]) -> None:
    stated = planned(framework, MLP, **options).memory.kfac_state
    assert stated == pytest.approx(trained(framework, MLP, **options).kfac_bytes(), rel=0.02)


@pytest.mark.parametrize("framework", NAMES)
@pytest.mark.parametrize("options", [{}, {"length": "rms"}], ids=["graft", "rms"])
def test_the_size_of_a_checkpoint(framework: str, options: dict[str, Any]) -> None:
    """State with moments; a file has headers beside them."""
    stated = planned(framework, MLP, **options).memory.state
    assert 0 <= trained(framework, MLP, **options).checkpoint_bytes() - stated < 0.02 * stated + 20_000


@pytest.mark.parametrize("framework", NAMES)
def test_a_length_of_its_own_saves_the_second_moments_of_covered_layers(framework: str) -> None:
    grafted, own = (planned(framework, MLP, length=length).memory for length in ("graft", "rms"))
    covered = planned(framework, MLP).coverage.num_covered
    assert grafted.moments - own.moments == 4 * covered
    files = [trained(framework, MLP, length=length).checkpoint_bytes() for length in ("graft", "rms")]
    assert files[0] - files[1] == pytest.approx(4 * covered, rel=0.1)


@pytest.mark.parametrize("framework", NAMES)
@pytest.mark.parametrize("model", [convolutional, tied], ids=["convolutional", "tied"])
def test_the_coverage(framework: str, model: Callable[[], Model]) -> None:
    options = {"max_factor_dim": 8, "approximation": {"linear": "reduce"}}
    assert planned(framework, model(), **options).coverage == trained(framework, model(), **options).coverage()


def test_an_lstm() -> None:
    """In PyTorch, where it is one module; its cell in JAX is made of products like any others."""
    run = trained("pytorch", recurrent())
    stated = planned("pytorch", recurrent())
    assert stated.coverage == run.coverage()
    assert stated.memory.kfac_state == pytest.approx(run.kfac_bytes(), rel=0.02)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.layer(x) * scale


def test_forms_of_a_batch() -> None:
    """In PyTorch: a tensor, positional arguments, or keyword arguments; the model stays as it was."""
    x, scale = torch.ones(6, 3), torch.ones(())
    one, two = nn.Linear(3, 2), TwoInputs()
    before = [p.detach().clone() for p in two.parameters()]
    plans = [plan(two, (x, scale)), plan(two, {"x": x, "scale": scale}), plan(two, {"scale": scale, "x": x})]
    assert plans[0] == plans[1] == plans[2]
    assert plan(one, x).memory == plan(one, (x,)).memory
    assert plan(one, x).coverage.fraction == 1
    assert all(torch.equal(p, q) for p, q in zip(before, two.parameters(), strict=True))
    assert all(p.grad is None for p in two.parameters())
    F.mse_loss(two(x, scale), torch.zeros(6, 2)).backward()  # it runs without the plan's hooks


def shared_by(devices: int, framework: str, model: Model, **options: Any) -> Any:
    config = KFACConfig(**EVERY_STEP, **options)
    if framework == "pytorch":
        return plan(model.module(), torch.zeros(6, 64), config=config, devices=devices)
    x = jax.ShapeDtypeStruct((6, 64), np.float32)
    return plan(model.apply, parameters_of(model, "float32"), x, config=config, devices=devices)


@pytest.mark.parametrize("framework", NAMES)
def test_several_devices_share_the_refreshes(framework: str) -> None:
    """And directions; nothing else: the state is on each of them. In JAX only equal layers are divided."""
    alone, shared = planned(framework, MLP), shared_by(2, framework, MLP)
    assert shared.memory.kfac_state == alone.memory.kfac_state
    assert shared.flops.refresh < alone.flops.refresh
    wide, narrow = (layer.preconditioning / alone.flops.model for layer in alone.layers)
    assert alone.flops.preconditioning == pytest.approx(wide + narrow)
    assert shared.flops.preconditioning == pytest.approx(wide + (narrow if framework == "jax" else 0))


@pytest.mark.parametrize("framework", NAMES)
@pytest.mark.parametrize(("devices", "most"), [(2, 3), (4, 2), (8, 1)])
@pytest.mark.parametrize("scaling", ["power", "second_moment"])
def test_several_devices_share_the_directions(framework: str, scaling: str, devices: int, most: int) -> None:
    """Five equal layers. In PyTorch those of "second_moment" stay with all, in JAX those of fewer than devices."""
    model = perceptron((64,) * 6)
    (each,) = {layer.preconditioning for layer in shared_by(1, framework, model, scaling=scaling).layers}
    if devices > 5 if framework == "jax" else scaling == "second_moment":
        most = 5
    found = shared_by(devices, framework, model, scaling=scaling)
    assert found.flops.preconditioning * found.flops.model == pytest.approx(most * each)
    assert max(map(len, found.dealt)) == most
    assert {number for numbers in found.dealt for number in numbers} == set(range(5))


@pytest.mark.parametrize("framework", NAMES)
@pytest.mark.parametrize(
    ("approximation", "by_side", "share"), [("expand", False, 0.4), ("reduce", False, 1.0), ("expand", True, 1.0)]
)
def test_statistics_of_fewer_rows_cost_less(
    framework: str, approximation: str, by_side: bool, share: float
) -> None:
    """Two positions of 6 examples are 12 rows, of 30; all are not 65; with reduce an example has one row."""
    rows = {"approximation": approximation, "statistics_rows": 10, "statistics_rows_by_side": by_side}

    def of(**options: object) -> float:
        if framework == "pytorch":
            return plan(MLP.module(), torch.zeros(6, 5, 64), **options).flops.statistics
        x = jax.ShapeDtypeStruct((6, 5, 64), np.float32)
        return plan(MLP.apply, parameters_of(MLP, "float32"), x, **options).flops.statistics

    assert of(**rows) == pytest.approx(share * of(approximation=approximation))


def test_what_is_no_model() -> None:
    with pytest.raises(TypeError, match=r"nn\.Module or a function"):
        plan([torch.zeros(2)], torch.zeros(6, 3))
