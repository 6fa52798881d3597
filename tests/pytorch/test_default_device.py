"""torch.set_default_device concerns what models make: what is K-FAC's own lies where the model does."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._device import _device_constructors

import algoperf_kfac
from algoperf_kfac.pytorch import KFAC, Positions
from tests.pytorch.toys import Patches, assert_same_factors, assert_same_parameters, convnet, images, mlp, vectors

HALF = Path(algoperf_kfac.__file__).parent / "pytorch"


@pytest.fixture
def elsewhere() -> Iterator[Callable[[], None]]:
    """Sets a default device on which nothing can be computed."""
    yield lambda: torch.set_default_device("meta")
    torch.set_default_device(None)


def test_whatever_is_made_says_where() -> None:
    """Every call of torch that the default device decides names a device."""
    names = {function.__name__ for function in _device_constructors()}
    silent = [
        f"{path.relative_to(HALF)}:{node.lineno} torch.{node.func.attr}"
        for path in sorted(HALF.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value) == "torch"
        and node.func.attr in names
        and not any(keyword.arg == "device" for keyword in node.keywords)
    ]
    assert len(silent) == 1, silent
    assert silent[0].startswith("probe.py"), "a plan asks for the device"


class Packed(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.recurrent, self.head = kind(5, 4, 2, bidirectional=True), nn.Linear(8, 3)
        shape = (4, 4, 4)
        self.states = (torch.zeros(shape), torch.zeros(shape)) if kind is nn.LSTM else torch.zeros(shape)

    def forward(self, packed: PackedSequence) -> Tensor:
        return self.head(self.recurrent(packed, self.states)[0].data)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(7, 8, padding_idx=0), nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.mix(self.table(tokens))), self.table.weight).flatten(0, 1)


Case = tuple[nn.Module, Any, Tensor, dict[str, Any]]


def packed(kind: type[nn.RNNBase]) -> Case:
    data = pack_padded_sequence(torch.randn(5, 4, 5), torch.tensor([3, 5, 2, 4]), enforce_sorted=False)
    return Packed(kind), data, torch.randint(3, (14,)), {}


CASES: dict[str, Callable[[], Case]] = {
    "mlp": lambda: (mlp(5, 8, 3), *vectors(), {}),
    "segments": lambda: (
        mlp(5, 8, 3),
        *vectors(5),
        {"positions": Positions(segment_ids=torch.tensor([0, 0, 1, 1, 1]), num_segments=2)},
    ),
    "by gradient": lambda: (Patches(), *images(), {"positions": "gradient"}),
    "convolutions": lambda: (convnet(), *images(), {}),
    "tied": lambda: (Tied(), torch.randint(7, (4, 5)), torch.randint(7, (20,)), {}),
    "lstm": lambda: packed(nn.LSTM),
    "gru": lambda: packed(nn.GRU),
    "sparse": lambda: (mlp(5, 8, 3), vectors()[0].to_sparse(), vectors()[1], {}),
}


@pytest.mark.parametrize("approximation", ["expand", "reduce", "mixed"])
@pytest.mark.parametrize("case", CASES)
def test_training_is_what_it_is_without(case: str, approximation: str, elsewhere: Callable[[], None]) -> None:
    model, x, y, options = CASES[case]()
    other = copy.deepcopy(model)

    def trained(net: nn.Module) -> KFAC:
        optimizer = KFAC(net, lr=1e-2, approximation=approximation, factor_interval=1)
        for _ in range(2):
            optimizer.zero_grad()
            with optimizer.capture(**options):
                F.cross_entropy(net(x), y).backward()
            optimizer.step()
        optimizer.metrics(), optimizer.summary()
        optimizer.load_state_dict(optimizer.state_dict())
        return optimizer

    want = trained(other)
    elsewhere()
    got = trained(model)
    torch.set_default_device(None)
    assert_same_factors(got.factors(), want.factors())
    assert_same_parameters(model, other)
