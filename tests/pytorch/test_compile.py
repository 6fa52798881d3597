"""torch.compile: plain steps run compiled, the first statistics step uncompiled, and nothing is compiled anew.

Statistics inside compiled graphs are in test_compiled_statistics.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from algoperf_kfac.pytorch import KFAC
from tests.pytorch.toys import Patches, assert_same_factors, assert_same_parameters, covered, images, train

OPTIONS = {"factor_interval": 3, "refresh_interval": 6, "initial_statistics": 1}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


class Counting:
    """A backend that runs graphs as they are, and counts how many it got and how often they ran."""

    def __init__(self) -> None:
        self.graphs = 0
        self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1

        def run(*args: Any) -> Any:
            self.runs += 1
            return graph.forward(*args)

        return run


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_same_factors_and_trajectory_as_uncompiled(backend: str, approximation: str) -> None:
    model = Patches().double()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend=backend)
    optimizer = KFAC(compiled, approximation=approximation, **OPTIONS)
    other = KFAC(twin, approximation=approximation, **OPTIONS)
    assert covered(optimizer) == {"patch", "up", "down", "head"}
    batches = [(x.double(), y) for x, y in [images() for _ in range(8)]]
    train(compiled, optimizer, batches)
    train(twin, other, batches)
    assert_same_parameters(model, twin, rtol=1e-9, atol=1e-10)
    assert_same_factors(optimizer.factors(), other.factors(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("in_place", [False, True], ids=["torch.compile", "module.compile"])
def test_without_compiled_statistics_plain_steps_alone_are_compiled(in_place: bool) -> None:
    """30 steps, 10 of them statistics steps: one graph, run on the other 20. A second graph would mean that capture
    changes something the compiler guards on."""
    model, backend = Patches(), Counting()
    compiled: Any = model
    if in_place:
        model.compile(backend=backend)
    else:
        compiled = torch.compile(model, backend=backend)
    optimizer = KFAC(compiled, compiled_statistics=False, **OPTIONS)
    batches = [images() for _ in range(30)]
    train(compiled, optimizer, batches[:1])
    assert (backend.graphs, backend.runs) == (0, 0)
    train(compiled, optimizer, batches[1:3])
    assert (backend.graphs, backend.runs) == (1, 2)
    train(compiled, optimizer, batches[3:4])
    assert (backend.graphs, backend.runs) == (1, 2)
    train(compiled, optimizer, batches[4:])
    assert (backend.graphs, backend.runs) == (1, 20)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["recompiles"]


def test_a_compiled_loss_function() -> None:
    """The model inside a compiled function, as AlgoPerf's workloads may have it."""
    model, backend = Patches(), Counting()
    twin = copy.deepcopy(model)

    @torch.compile(backend=backend)
    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(x), y)

    optimizer, other = KFAC(model, **OPTIONS), KFAC(twin, **OPTIONS)
    for x, y in [images() for _ in range(5)]:
        optimizer.zero_grad()
        with optimizer.capture():
            loss(x, y).backward()
        optimizer.step()
        train(twin, other, [(x, y)])
    assert backend.runs == 3
    assert_same_parameters(model, twin)


def test_an_exception_in_capture_gives_compilation_back() -> None:
    model, backend = Patches(), Counting()
    compiled = torch.compile(model, backend=backend)
    optimizer = KFAC(compiled, **OPTIONS)

    def fails() -> None:
        with optimizer.capture():
            compiled(images()[0])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert backend.runs == 0
    compiled(images()[0])
    assert backend.runs == 1


def test_compiled_functional_layers_are_still_promoted() -> None:
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(3, 64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x.flatten(1), self.matrix)

    model = Raw()
    compiled = torch.compile(model, backend="eager")
    optimizer = KFAC(compiled, **OPTIONS)
    train(compiled, optimizer, [images() for _ in range(2)])
    assert optimizer.coverage().fraction == 1


def test_a_compiled_step_of_the_optimizer_runs_as_it_is() -> None:
    model = Patches().double()
    twin = copy.deepcopy(model)
    optimizer, other = KFAC(model, **OPTIONS), KFAC(twin, **OPTIONS)
    step = torch.compile(optimizer.step, backend="eager")
    for x, y in [(x.double(), y) for x, y in [images() for _ in range(3)]]:
        optimizer.zero_grad()
        with optimizer.capture():
            F.cross_entropy(model(x), y).backward()
        step()
        train(twin, other, [(x, y)])
    assert_same_parameters(model, twin, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="torch 2.5 runs it as it is")
def test_a_compiled_training_step_is_told_what_to_compile() -> None:
    model = Patches()
    optimizer = KFAC(model, **OPTIONS)
    x, y = images()

    def step() -> None:
        with optimizer.capture():
            F.cross_entropy(model(x), y).backward()

    with pytest.raises(RuntimeError, match="compile the model"):
        torch.compile(step, backend="eager")()
