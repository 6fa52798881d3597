"""Sparse inputs (bags of words on a graph) are those of dense layers with many zeros."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algoperf_kfac import plan
from algoperf_kfac.pytorch import KFAC, operations
from tests.pytorch.toys import assert_finite, assert_same_factors, capture_once, covered, factors_of, mlp, reasons

Product = Callable[[Tensor, Tensor], Tensor]

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "coo": Tensor.to_sparse,
    "csr": Tensor.to_sparse_csr,
    "csc": Tensor.to_sparse_csc,
}
PRODUCTS: dict[str, Product] = {
    "mm": torch.mm,
    "@": lambda x, w: x @ w,
    "sparse.mm": torch.sparse.mm,
    "addmm": lambda x, w: torch.addmm(torch.zeros(w.shape[1]), x, w),
    "sparse.addmm": lambda x, w: torch.sparse.addmm(torch.zeros(len(x), w.shape[1]), x, w),
    "linear": lambda x, w: F.linear(x, w.t()),
    "transposed": lambda x, w: torch.mm(w.t(), x.t()).t(),
}


class GraphNet(nn.Module):
    """Kipf and Welling's: the graph's matrix times data, and data times raw weights."""

    def __init__(self, product: Product) -> None:
        super().__init__()
        self.product = product
        self.first, self.second = nn.Parameter(0.3 * torch.randn(6, 8)), nn.Parameter(0.3 * torch.randn(8, 3))

    def forward(self, graph: Tensor, x: Tensor) -> Tensor:
        h = torch.relu(torch.sparse.mm(graph, self.product(x, self.first)))
        return torch.sparse.mm(graph, h @ self.second)


def graph_and_words() -> tuple[Tensor, Tensor, Tensor]:
    graph = (torch.rand(16, 16) < 0.3).float() + torch.eye(16)
    return graph, torch.randn(16, 6).clamp(min=0), torch.randint(3, (16,))


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("product", PRODUCTS)
def test_the_factors_are_those_of_the_dense_input(product: str, layout: str, approximation: str) -> None:
    graph, x, y = graph_and_words()
    model = GraphNet(PRODUCTS[product])
    sparse = LAYOUTS[layout]

    def loss(data: Tensor, m: nn.Module) -> Tensor:
        return F.cross_entropy(m(sparse(graph), data), y)

    got = factors_of(model, partial(loss, sparse(x)), approximation=approximation)
    model.product = torch.mm
    want = factors_of(model, partial(loss, x), approximation=approximation)
    assert_same_factors(got, want)
    assert set(got) == {"first", "second"}


def test_a_module_trains_on_sparse_inputs() -> None:
    model, (_, x, y) = mlp(6, 8, 3), graph_and_words()
    optimizer = KFAC(model, lr=1e-2, factor_interval=1)
    dense = copy.deepcopy(model)
    for _ in range(3):
        optimizer.zero_grad()
        with optimizer.capture():
            F.cross_entropy(model(x.to_sparse()), y).backward()
        optimizer.step()
    assert covered(optimizer) == {"0", "2"}
    assert_finite(model, optimizer)
    want = factors_of(dense, lambda m: F.cross_entropy(m(x), y))
    assert_same_factors(factors_of(dense, lambda m: F.cross_entropy(m(x.to_sparse()), y)), want)


def test_a_graph_of_nodes_without_features() -> None:
    """Its matrix is the layer's input."""
    model = nn.ParameterDict({"nodes": 0.3 * torch.randn(16, 3)})
    graph, _, y = graph_and_words()
    got = factors_of(model, lambda m: F.cross_entropy(torch.sparse.mm(graph.to_sparse(), m["nodes"]), y))
    want = factors_of(model, lambda m: F.cross_entropy(graph @ m["nodes"], y))
    assert_same_factors(got, want)


def test_experts_read_one_sparse_input() -> None:
    model = nn.ParameterDict({"experts": 0.3 * torch.randn(2, 6, 3)})
    _, x, y = graph_and_words()

    def loss(data: Tensor, m: nn.Module) -> Tensor:
        return F.cross_entropy(torch.bmm(data, m["experts"]).mean(0), y)

    both = torch.stack([x, x * (torch.rand(16, 1) < 0.5)])
    assert_same_factors(factors_of(model, partial(loss, both.to_sparse())), factors_of(model, partial(loss, both)))


def test_one_that_is_too_large_leaves_its_layer_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "MAX_DENSE_ELEMENTS", 16 * 6 - 1)
    model, (_, x, y) = mlp(6, 8, 3), graph_and_words()
    with pytest.warns(
        UserWarning, match="layer 0 takes the fallback from now on: read by linear of a sparse input"
    ):
        optimizer = capture_once(model, lambda m: F.cross_entropy(m(x.to_sparse()), y))
    assert covered(optimizer) == {"2"}
    reason = "read by linear of a sparse input too large to be made dense, which has no rule"
    assert reasons(optimizer) == {"0.weight": reason, "0.bias": reason}
    net = GraphNet(torch.mm)
    optimizer = capture_once(net, lambda m: F.cross_entropy(m(torch.eye(16).to_sparse(), x.to_sparse()), y))
    assert reasons(optimizer) == {"first": reason.replace("linear", "mm")}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_plan_of_sparse_inputs(layout: str) -> None:
    """Autograd keeps indices and values of them."""
    graph, x, _ = graph_and_words()
    sparse = LAYOUTS[layout]
    planned = plan(GraphNet(torch.mm), (sparse(graph), sparse(x)))
    assert {layer.spec.name for layer in planned.layers} == {"first", "second"}
    dense = plan(GraphNet(torch.mm), (sparse(graph), x))
    assert planned.layers == dense.layers
