"""Raw parameters become layers in the order of their use, which differs between processes: names do not, and what
processes have in common is the same on all, or an error is."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.layers import LayerSpec, make_spec
from algoperf_kfac.pytorch import KFAC
from algoperf_kfac.pytorch.agreement import Entry, common_layers
from tests.pytorch.toys import assert_same_parameters

OPTIONS = {"factor_interval": 1, "refresh_interval": 1}


class Experts(nn.Module):
    """Weights in a list, of which each call uses some."""

    def __init__(self, count: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.ParameterList([nn.Parameter(0.3 * torch.randn(6, 6)) for _ in range(count)])
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, *used: int) -> Tensor:
        return self.head(torch.stack([torch.tanh(x @ self.w[number]) for number in used]).sum(0))


class Branches(nn.Module):
    """Calls that a test gives, on parameters of its own."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(0.3 * torch.randn(*shape)))

    def forward(self, call: Callable[[Branches], Tensor]) -> Tensor:
        return call(self)


def step(optimizer: KFAC, loss: Callable[[], Tensor]) -> None:
    optimizer.zero_grad()
    with optimizer.capture(loss_normalizer=8):
        loss().backward()
    optimizer.step()


def weights(optimizer: KFAC) -> dict[str, str]:
    """By layer, its weight."""
    return {layer.name: layer.weight for layer in optimizer.coverage().layers}


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_names_do_not_depend_on_the_order_of_use(order: tuple[int, ...]) -> None:
    model, x = Experts(3), torch.randn(8, 6)
    optimizer = KFAC(model, **OPTIONS)
    for number in order:
        step(optimizer, lambda used=number: model(x, used).square().mean())
    assert weights(optimizer) == {"head": "head.weight", "w.0": "w.0", "w.1": "w.1", "w.2": "w.2"}


def test_a_module_gives_its_name_to_its_only_matrix() -> None:
    """Biases, scales and class tokens are none."""
    inner = Branches(bias=(4,), token=(1, 1, 6), scale=(1, 4), matrix=(4, 6))
    model = nn.Sequential(nn.Linear(6, 6), inner)
    optimizer, x = KFAC(model, **OPTIONS), torch.randn(8, 6)

    def call(m: Branches) -> Tensor:
        return F.linear(model[0](x) + m.token[0], m.matrix, m.bias) * m.scale

    step(optimizer, lambda: inner(call).square().mean())
    assert weights(optimizer) == {"0": "0.weight", "1": "1.matrix"}


def test_parts_of_many_sizes_all_have_names() -> None:
    """The first block of one row, the second of two and the third of four are each number 1 of their size."""
    model, x = Branches(fused=(8, 5), head=(3, 7)), torch.randn(8, 5)
    optimizer = KFAC(model, **OPTIONS)

    def call(m: Branches) -> Tensor:
        parts = [F.linear(x, m.fused[begin : 2 * begin]) for begin in (1, 2, 4)]
        return F.linear(torch.cat(parts, 1).tanh(), m.head)

    step(optimizer, lambda: model(call).square().mean())
    parts = [layer for layer in optimizer.coverage().layers if layer.weight == "fused"]
    assert [(layer.name, layer.out_dim) for layer in parts] == [
        ("fused.1", 1),
        ("fused.from10", 2),
        ("fused.from20", 4),
    ]


def with_old_names(state: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A state as it was saved when the first of several weights in a module that was used had the module's name."""
    state = copy.deepcopy(state)
    for moments in state["state"].values():
        moments.pop("kfac", None)
    kfac = state["kfac"]
    for key in ("layers", "missed", "gradient_errors", "missed_steps", "sights"):
        kfac[key] = {names.get(name, name): value for name, value in kfac[key].items()}
    for name, entry in kfac["layers"].items():
        entry["spec"]["name"] = name
    return state


@pytest.mark.parametrize("seen", [0, 1])
@pytest.mark.parametrize("first", [0, 1])
def test_states_with_names_by_order_of_use_load(first: int, seen: int) -> None:
    """Into a new optimizer, and into one that has names already."""
    model, x = Experts(3), torch.randn(8, 6)
    optimizer = KFAC(model, **OPTIONS)
    for used in ((0, 1), (1,), (0, 1)):
        step(optimizer, lambda used=used: model(x, *used).square().mean())
    state = with_old_names(optimizer.state_dict(), {f"w.{first}": "w"})
    again = copy.deepcopy(model)
    resumed = KFAC(again, **OPTIONS)
    for _ in range(seen):
        step(resumed, lambda: again(x, 1, 0).square().mean())
        again.load_state_dict(model.state_dict())
    resumed.load_state_dict(state)
    for used in ((1,), (0,), (0, 1, 2)):
        for m, own in ((model, optimizer), (again, resumed)):
            step(own, lambda m=m, used=used: m(x, *used).square().mean())
    assert_same_parameters(again, model, rtol=0, atol=0)
    assert weights(resumed) == {"head": "head.weight", "w": f"w.{first}"} | {
        f"w.{k}": f"w.{k}" for k in range(3) if k != first
    }


def spec(name: str = "m", weight: str = "m.w", bias: str | None = None, **fields: Any) -> LayerSpec:
    made = make_spec(
        name=name,
        kind="linear",
        weight=weight,
        bias=bias,
        weight_shape=(4, 6),
        groups=1,
        in_dim=6,
        out_dim=4,
        config=KFACConfig(),
    )
    return dataclasses.replace(made, **fields)


def book(*specs: LayerSpec, settled: bool = True, seen: bool = True) -> dict[str, Entry]:
    return {s.name: Entry(s, settled, 0.0 if seen else None) for s in specs}


def test_layers_of_all_processes_in_one_order() -> None:
    a, b, c = spec("a", "a.w"), spec("b", "b.w"), spec("c", "c.w")
    books = [book(a, seen=False) | book(c), book(b)]
    assert list(common_layers(books).items()) == [("c", c), ("b", b), ("a", a)]
    assert list(common_layers([book(b, a)])) == ["b", "a"]
    unseen = book(b, settled=False, seen=False) | book(a, seen=False)
    assert list(common_layers([unseen | book(c)])) == ["c", "b", "a"]


def test_a_process_without_statistics_of_a_layer_takes_the_others() -> None:
    """A layer that was called without its bias elsewhere, and not at all here."""
    with_bias, without = spec(bias="m.b"), spec()
    for books in ([book(with_bias, settled=False, seen=False), book(without)], [book(without), {}]):
        assert common_layers(books) == {"m": without}


half = ((2, 6), (6, 1))
DISAGREEMENTS = {
    "another weight": (spec(weight="m.0"), spec(weight="m.1"), r"layer m has weight='m.0' and 'm.1'"),
    "other sizes": (spec(), spec(weight_shape=(4, 8), in_dim=8), r"weight_shape=\(4, 6\) and \(4, 8\), in_dim=6"),
    "another bias": (spec(bias="m.b"), spec(), r"layer m has bias='m.b' and None"),
    "two names": (spec(), spec("m.w"), r"layer m and layer m.w both have m.w"),
    "a part": (spec(), spec("m.w.0", out_dim=2, layout=(*half, (0,))), r"layer m and layer m.w.0 both have m.w"),
    "one bias of two": (spec(bias="m.b"), spec("n", "n.w", "m.b"), r"layer m and layer n both have m.b"),
}


@pytest.mark.parametrize("case", DISAGREEMENTS)
def test_different_readings_are_refused_on_all_processes(case: str) -> None:
    one, two, text = DISAGREEMENTS[case]
    with pytest.raises(RuntimeError, match=rf"processes 0 and 1 read a weight in different ways: .*{text}"):
        common_layers([book(one), book(two)])


def test_parts_beside_each_other_join() -> None:
    parts = [spec(f"m.w.{k}", bias="m.b", bias_start=2 * k, out_dim=2, layout=(*half, (12 * k,))) for k in range(2)]
    assert list(common_layers([book(parts[1]), book(parts[0])])) == ["m.w.1", "m.w.0"]
