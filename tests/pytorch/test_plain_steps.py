"""A plain step costs what NadamW and a few matrix products cost: no interception, no waiting for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from algoperf_kfac.pytorch import KFAC, observer
from algoperf_kfac.pytorch.hooks import output_hook
from algoperf_kfac.pytorch.interception import Interceptor
from tests.pytorch.toys import Batch, Patches, images

OPTIONS: list[dict[str, Any]] = [
    {},
    {"grafting": False},
    {"preconditioner": "inverse"},
    {"scaling": "root"},
    {"scaling": "second_moment"},
    {"scaling": "polar", "length": "rms"},
    {"fisher": "mc"},
    {"drift_tolerance": 0.1},
    {"weight_decay": 0.1},
    {"max_factor_dim": 9},
]
READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "nonzero")


def one_step(model: torch.nn.Module, optimizer: KFAC, batch: Batch) -> None:
    optimizer.zero_grad()
    with optimizer.capture() as context:
        outputs = model(batch[0])
        context.backward_fisher(outputs, "softmax_cross_entropy")
        F.cross_entropy(outputs, batch[1]).backward()
    optimizer.step()


def refuse_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, reading a tensor's value on the host raises."""

    def refuse(self: Tensor, *args: object) -> None:
        raise AssertionError("a tensor was read on the host")

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, refuse)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "default")
def test_plain_steps_do_not_synchronise(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = Patches(), [images() for _ in range(4)]
    optimizer = KFAC(model, factor_interval=5, refresh_interval=10, initial_statistics=1, **options)
    one_step(model, optimizer, batches[0])
    with monkeypatch.context() as patch:
        refuse_reads(patch)
        for batch in batches[1:]:
            one_step(model, optimizer, batch)


def test_statistics_between_refreshes_do_not_synchronise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decompositions must report failures; statistics alone need not."""
    model, batches = Patches(), [images() for _ in range(9)]
    # Four layers over eight steps: no refresh at some of them.
    optimizer = KFAC(model, factor_interval=1, refresh_interval=8, initial_statistics=1)
    quiet = 0
    for batch in batches:
        due = optimizer._curvature.due(optimizer._steps)
        with monkeypatch.context() as patch:
            if not due:
                refuse_reads(patch)
                quiet += 1
            one_step(model, optimizer, batch)
    for _ in range(8):
        with monkeypatch.context() as patch:
            if not optimizer._curvature.due(optimizer._steps):
                refuse_reads(patch)
                quiet += 1
            one_step(model, optimizer, batches[0])
    assert quiet >= 4


def test_the_check_sees_a_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refresh has to read whether it succeeded: the refusal above must notice that."""
    model, batch = Patches(), images()
    optimizer = KFAC(model)
    with monkeypatch.context() as patch:
        refuse_reads(patch)
        with pytest.raises(AssertionError, match="read on the host"):
            one_step(model, optimizer, batch)


def test_capture_intercepts_nothing_on_plain_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = Patches(), images()
    optimizer = KFAC(model, factor_interval=2, refresh_interval=2, initial_statistics=1)
    calls = 0
    original = Interceptor.__torch_function__
    hooked: list[Tensor] = []

    def hook(output: Tensor, *args: Any) -> Any:
        hooked.append(output)
        return output_hook(output, *args)

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Interceptor, "__torch_function__", counting)
    monkeypatch.setattr(observer, "output_hook", hook)
    for plain in (False, True, False, True):
        calls = 0
        hooked.clear()
        optimizer.zero_grad()
        with optimizer.capture() as context:
            assert context.active is not plain
            assert len(_get_current_function_mode_stack()) == (0 if plain else 1)
            outputs = model(batch[0])
            assert bool(hooked) is not plain
            assert not outputs._backward_hooks  # where the model's own would come first
            F.cross_entropy(outputs, batch[1]).backward()
        optimizer.step()
        assert (calls == 0) is plain


class Count(TorchFunctionMode):
    """Counts the operations of a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return func(*args, **(kwargs or {}))


def test_plain_capture_adds_no_operation() -> None:
    model, (x, y) = Patches(), images()
    optimizer = KFAC(model, factor_interval=2, refresh_interval=2, initial_statistics=1)
    one_step(model, optimizer, (x, y))
    with Count() as without:
        F.cross_entropy(model(x), y).backward()
    with Count() as within, optimizer.capture():
        F.cross_entropy(model(x), y).backward()
    assert within.operations == without.operations > 0
