"""Statistics inside compiled graphs: what uncompiled statistics steps give, and one graph more for them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from algoperf_kfac.pytorch import KFAC
from tests.pytorch.compiled import (
    BEFORE_2_6,
    COMPILED,
    OPTIONS,
    Tokens,
    assert_same,
    pair,
    sequences,
    steps,
)
from tests.pytorch.test_resume import through_a_file
from tests.pytorch.toys import Patches, assert_same_factors, assert_same_parameters, convnet, images, train

pytestmark = pytest.mark.skipif(BEFORE_2_6, reason="torch 2.5 takes statistics uncompiled")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with inductor.patch(compile_threads=1):  # more would be processes that import torch
        yield
    torch._dynamo.reset()


class Twice(nn.Module):
    """One layer, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shared(self.shared(x).tanh()).tanh())


@pytest.mark.parametrize("in_place", [False, True], ids=["torch.compile", "module.compile"])
def test_one_graph_more_and_no_break(in_place: bool) -> None:
    """The first statistics step runs uncompiled, all other steps compiled; with statistics or not, in turns."""
    model, backend = Patches(), CompileCounterWithBackend("aot_eager")
    compiled: Any = model
    if in_place:
        model.compile(backend=backend)
    else:
        compiled = torch.compile(model, backend=backend)
    optimizer = KFAC(compiled, **OPTIONS)
    frames = []
    for _ in range(8):
        train(compiled, optimizer, [images()])
        frames.append(backend.frame_count)
    assert frames == [0, 1, 2, 2, 2, 2, 2, 2]
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    assert optimizer.coverage().note == COMPILED


def test_statistics_at_every_step_need_one_graph() -> None:
    model, backend = Patches(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=backend)
    optimizer = KFAC(compiled, factor_interval=1, refresh_interval=4)
    train(compiled, optimizer, [images() for _ in range(4)])
    assert backend.frame_count == 1


@pytest.mark.parametrize("positions", [lambda mask: None, lambda mask: mask, lambda mask: "gradient"])
@pytest.mark.parametrize("approximation", ["expand", "reduce", "mixed"])
def test_linear_layers_as_uncompiled(approximation: str, positions: Callable[[Tensor], Any]) -> None:
    options: dict[str, Any] = {"approximation": approximation, "output_splits": {"fused": 3}}
    model, compiled, optimizer, twin, other = pair(Tokens, **options)
    batches = [sequences() for _ in range(4)]
    steps(compiled, optimizer, batches, positions)
    steps(twin, other, batches, positions)
    assert_same(model, optimizer, twin, other)


class Broken(nn.Module):
    """Graphs that break in a loop, which dynamo leaves uncompiled as a whole, but not what is called in it."""

    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 3)])
        self.breaks = breaks
        self.register_buffer("scale", torch.rand(1, 16, 6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        x = x * self.scale[:, :length].to(x.device).to(x.dtype)
        for layer in self.layers:
            if self.breaks:
                torch._dynamo.graph_break()
            x = layer(x.unflatten(dim=-1, sizes=(-1, 2)).flatten(-2)).tanh()
        return x


@pytest.mark.parametrize("breaks", [False, True])
def test_broken_graphs(breaks: bool) -> None:
    torch.manual_seed(0)
    model = Broken(breaks).double()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=not breaks)
    optimizer, other = KFAC(compiled, **OPTIONS), KFAC(twin, **OPTIONS)
    batches = [sequences() for _ in range(4)]
    steps(compiled, optimizer, batches)
    steps(twin, other, batches)
    assert_same(model, optimizer, twin, other)


def test_some_of_the_rows() -> None:
    model, compiled, optimizer, twin, other = pair(Tokens, statistics_rows=10, approximation="expand")
    batches = [sequences() for _ in range(3)]
    steps(compiled, optimizer, batches, lambda mask: {"fused": mask, "*": "gradient"})
    steps(twin, other, batches, lambda mask: {"fused": mask, "*": "gradient"})
    assert_same(model, optimizer, twin, other)


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_convolutions(approximation: str) -> None:
    model, compiled, optimizer, twin, other = pair(convnet, approximation=approximation)
    batches = [(x.double(), y) for x, y in [images() for _ in range(3)]]
    train(compiled, optimizer, batches)
    train(twin, other, batches)
    assert_same(model, optimizer, twin, other)


def test_other_batch_sizes() -> None:
    """The last batch of an epoch: it is counted as it is, not as the batch that layers were first seen with."""
    model, compiled, optimizer, twin, other = pair(Tokens, approximation="reduce")
    batches = [sequences(n) for n in (8, 8, 8, 8, 5, 7, 6, 8, 8)]
    steps(compiled, optimizer, batches, lambda mask: mask)
    steps(twin, other, batches, lambda mask: mask)
    assert_same(model, optimizer, twin, other)


def test_micro_batches_in_captures_of_their_own() -> None:
    model, compiled, optimizer, twin, other = pair(Tokens, approximation="expand")
    batches = [sequences() for _ in range(4)]
    for net, one in ((compiled, optimizer), (twin, other)):
        for x, y in batches:
            one.zero_grad()
            for part_x, part_y in zip(x.chunk(2), y.chunk(2), strict=True):
                with one.capture(loss_normalizer=8):
                    loss = F.cross_entropy(
                        net(part_x).flatten(0, 1), part_y.flatten(), ignore_index=-1, reduction="sum"
                    )
                    (loss / 8).backward()
            one.step()
    assert_same(model, optimizer, twin, other)


def test_autocast() -> None:
    """Products in bfloat16, sums of theirs in float32, as uncompiled: to the rounding of bfloat16."""
    torch.manual_seed(0)
    model = Patches()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager")
    both = [(compiled, KFAC(compiled, **OPTIONS)), (twin, KFAC(twin, **OPTIONS))]
    x, y = images()
    for net, optimizer in both:
        for _ in range(3):
            optimizer.zero_grad()
            with optimizer.capture():
                with torch.autocast("cpu", torch.bfloat16):
                    loss = F.cross_entropy(net(x), y)
                loss.backward()
            optimizer.step()
    (_, mine), (_, theirs) = both
    assert mine.coverage().note == COMPILED
    for name, factors in theirs.factors().items():
        for got, want in zip(mine.factors()[name], factors, strict=True):
            assert isinstance(got, Tensor)
            assert isinstance(want, Tensor)
            assert (got - want).norm() < 0.02 * want.norm()


def test_what_cannot_be_taken_runs_uncompiled_and_is_named() -> None:
    model, backend = Twice(), CompileCounterWithBackend("aot_eager")
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend=backend)
    optimizer, other = KFAC(compiled, **OPTIONS), KFAC(twin, **OPTIONS)
    batches = [(torch.randn(8, 5), torch.randint(3, (8,))) for _ in range(4)]
    train(compiled, optimizer, batches)
    train(twin, other, batches)
    assert backend.frame_count == 1
    assert optimizer.coverage().note == "statistics steps run uncompiled: layer shared is called 2 times"
    assert str(optimizer.coverage()).endswith(optimizer.coverage().note)
    assert not other.coverage().note
    assert_same_factors(optimizer.factors(), other.factors())


def test_gradients_for_given_parameters_run_uncompiled() -> None:
    model = Patches()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = KFAC(compiled, **OPTIONS)
    params = list(model.parameters())
    for x, y in [images() for _ in range(3)]:
        optimizer.zero_grad()
        with optimizer.capture():
            grads = torch.autograd.grad(F.cross_entropy(compiled(x), y), params)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        optimizer.step()
    assert optimizer.coverage().note == "statistics steps run uncompiled: gradients are taken for given parameters"


def test_a_sampled_fisher_runs_uncompiled() -> None:
    model = Patches()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = KFAC(compiled, fisher="mc", **OPTIONS)
    train(compiled, optimizer, [images() for _ in range(3)], fisher_loss="softmax_cross_entropy")
    assert optimizer.coverage().note == "statistics steps run uncompiled: fisher='mc'"


def test_a_failed_batch_leaves_nothing_behind() -> None:
    """Sums that a graph handed out before an exception are not those of the next batch."""
    model, compiled, optimizer, twin, other = pair(Patches)
    batches = [(x.double(), y) for x, y in [images() for _ in range(3)]]
    train(compiled, optimizer, batches[:2])
    train(twin, other, batches)

    def fails() -> None:
        with optimizer.capture():
            compiled(batches[2][0]).sum().backward()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    train(compiled, optimizer, batches[2:])
    assert_same(model, optimizer, twin, other)


class Normed(nn.Module):
    """Few operations, as each kernel of theirs is a C++ program to compile; a norm is rounded in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.head = nn.Linear(64, 12), nn.LayerNorm(12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.norm(self.up(x.flatten(1)))))


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_takes_the_same_steps_compiled(stop: int) -> None:
    """Bit for bit, with a compiler whose graphs round otherwise than uncompiled code."""
    torch.manual_seed(0)
    batches = [images() for _ in range(5)]
    model = Normed()
    compiled = torch.compile(model, backend="inductor")
    optimizer = KFAC(compiled, **OPTIONS)
    train(compiled, optimizer, batches[:stop])
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(compiled, optimizer, batches[stop:])

    resumed = Normed()
    resumed.load_state_dict(saved["model"])
    again = torch.compile(resumed, backend="inductor")
    fresh = KFAC(again, **OPTIONS)
    fresh.load_state_dict(saved["optimizer"])
    assert fresh.coverage().note == COMPILED
    train(again, fresh, batches[stop:])
    assert_same_factors(fresh.factors(), optimizer.factors(), rtol=0, atol=0)
    assert_same_parameters(resumed, model, rtol=0, atol=0)


def test_what_was_not_learnt_is_learnt_after_loading() -> None:
    """A state of an optimizer that saw nothing, and one from before there were any sights."""
    compiled = torch.compile(Patches(), backend="aot_eager")
    optimizer = KFAC(compiled, **OPTIONS)
    unseen = copy.deepcopy(optimizer.state_dict())
    train(compiled, optimizer, [images() for _ in range(3)])
    older = copy.deepcopy(optimizer.state_dict())
    del older["kfac"]["sights"]
    for state in (unseen, older):
        optimizer.load_state_dict(state)
        assert "the first one does" in optimizer.coverage().note
        train(compiled, optimizer, [images() for _ in range(3)])
        assert optimizer.coverage().note == COMPILED


def test_a_copy_learns_anew() -> None:
    model = Patches()
    model.compile(backend="aot_eager")
    optimizer = KFAC(model, **OPTIONS)
    train(model, optimizer, [images() for _ in range(3)])
    copied, its = copy.deepcopy((model, optimizer))
    assert "the first one does" in its.coverage().note
    batches = [images() for _ in range(4)]
    train(model, optimizer, batches)
    train(copied, its, batches)
    assert_same_parameters(model, copied, rtol=1e-4, atol=1e-5)
