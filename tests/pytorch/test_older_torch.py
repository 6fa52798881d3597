"""Compiled models at a torch that lacks what statistics in graphs are made with: a line says so, steps go on."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo import eval_frame
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.variables import torch_function

from algoperf_kfac.pytorch import KFAC, compiled, interception
from tests.pytorch.toys import Patches, assert_same_factors, assert_same_parameters, images, train

OPTIONS: dict[str, Any] = {"factor_interval": 2, "refresh_interval": 4, "initial_statistics": 1}
TAPS = [
    (torch.compiler, "allow_in_graph"),
    (torch.compiler, "disable"),
    (torch.compiler, "is_dynamo_compiling"),
    (eval_frame, "skip_code"),
    (torch_function, "SymbolicTorchFunctionState"),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("module", "name"), TAPS, ids=[name for _, name in TAPS])
def test_without_taps_statistics_steps_run_uncompiled(
    module: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, backend = Patches(), CompileCounterWithBackend("aot_eager")
    twin = copy.deepcopy(model)
    graphs = torch.compile(model, backend=backend)
    optimizer, other = KFAC(graphs, **OPTIONS), KFAC(twin, **OPTIONS)
    batches = [images() for _ in range(5)]
    train(graphs, optimizer, batches[:2])  # dynamo's own machinery has to be there
    monkeypatch.delattr(module, name, raising=False)
    train(graphs, optimizer, batches[2:])
    train(twin, other, batches)
    said = f"this torch ({torch.__version__}) has no {module.__name__}.{name}, which torch 2.6 to 2.13 have"
    assert optimizer.coverage().note == f"statistics steps run uncompiled: {said}"
    assert str(optimizer.coverage()).endswith(said)
    assert not other.coverage().note
    assert backend.frame_count == 1
    assert_same_factors(optimizer.factors(), other.factors())
    assert_same_parameters(model, twin)


def test_the_way_of_torch_2_5_to_run_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.compiler, "set_stance", raising=False)
    model, backend = Patches(), CompileCounterWithBackend("aot_eager")
    graphs = torch.compile(model, backend=backend)
    optimizer = KFAC(graphs, compiled_statistics=False, **OPTIONS)
    train(graphs, optimizer, [images() for _ in range(4)])
    assert backend.frame_count == 1


def test_no_way_to_run_uncompiled_is_said_before_work_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as lacking:
        lacking.delattr(torch.compiler, "set_stance", raising=False)
        assert interception.can_run_eagerly()
        lacking.delattr(eval_frame, "_maybe_set_eval_frame")
        assert not interception.can_run_eagerly()
    # Optimizers of torch ask for it themselves.
    for module in (compiled, interception):
        monkeypatch.setattr(module, "can_run_eagerly", lambda: False)
    refused = r"the model is compiled, .* this torch \(.*\) has no torch.compiler.set_stance, which torch 2.6"
    with pytest.raises(RuntimeError, match=refused):
        KFAC(torch.compile(Patches(), backend="eager"), **OPTIONS)
    later = Patches()
    optimizer = KFAC(later, **OPTIONS)
    later.compile(backend="eager")
    with pytest.raises(RuntimeError, match=refused):
        optimizer.capture()
    plain = Patches()
    train(plain, KFAC(plain, **OPTIONS), [images()])
