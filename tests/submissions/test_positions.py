"""What the K-FAC submissions read off a batch and off AlgoPerf's parameter types, and what comes of it."""

from __future__ import annotations

import enum
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from algoperf_kfac.pytorch import KFAC, Positions
from submissions.common.kfac.pytorch import output_splits, positions
from submissions.common.positions import graph_in, graph_rows, parts_of_types
from tests.math import naive


class Graphs(NamedTuple):
    nodes: Any
    edges: Any
    receivers: Any
    senders: Any
    globals: Any
    n_node: Any
    n_edge: Any


N_NODE, N_EDGE = [3, 1, 2, 4], [2, 0, 5, 6]  # the last graph is padding


def graphs() -> Graphs:
    senders = torch.tensor([0, 1, 4, 5, 4, 5, 4, 6, 7, 8, 9, 6, 7])
    return Graphs(
        torch.randn(10, 4),
        torch.randn(13, 3),
        senders.roll(1),
        senders,
        {},
        torch.tensor(N_NODE),
        torch.tensor(N_EDGE),
    )


class GraphNet(nn.Module):
    """Nodes and edges are embedded and summed into one vector per graph."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes, self.edges, self.head = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(6, 2)

    def parts(self, g: Graphs) -> tuple[Tensor, Tensor]:
        return self.nodes(g.nodes), self.edges(g.edges)

    def forward(self, g: Graphs) -> Tensor:
        sums = []
        for rows, n in zip(self.parts(g), (g.n_node, g.n_edge), strict=True):
            ids = torch.repeat_interleave(torch.arange(len(n)), n)
            sums.append(rows.new_zeros(len(n), rows.shape[-1]).index_add(0, ids, rows))
        return self.head(torch.cat(sums, -1).tanh())


def loss(outputs: Tensor) -> Tensor:
    return (outputs[:-1].sin() + outputs[:-1] ** 2).sum()


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize(
    "wrap", [lambda g: g, lambda g: (g, 1), lambda g: {"graph": g}], ids=["bare", "tuple", "mapping"]
)
def test_factors_of_a_batch_of_graphs(approximation, wrap):
    """As by loops over the graphs: nodes by graph, edges by graph, one row each in the head, no padding graph."""
    model, g = GraphNet(), graphs()
    optimizer = KFAC(model, approximation=approximation, learning_rate=0.0)
    with optimizer.capture(positions({"inputs": wrap(g)}), loss_normalizer=1.0):
        loss(model(g)).backward()
    optimizer.step()
    nodes, edges = (rows.detach().requires_grad_() for rows in model.parts(g))
    again = GraphNet()
    again.load_state_dict(model.state_dict())
    again.parts = lambda g: (nodes, edges)
    loss(again(g)).backward()
    for name, x, out, sizes in (("nodes", g.nodes, nodes, N_NODE), ("edges", g.edges, edges, N_EDGE)):
        per_graph = [t.unsqueeze(1) for t in x.split(sizes)], [t.unsqueeze(1) for t in out.grad.split(sizes)]
        keep = [i for i in range(3) if sizes[i]]  # a graph without edges is no example of theirs
        a, b = naive.factors(
            [per_graph[0][i] for i in keep],
            [per_graph[1][i] for i in keep],
            bias=True,
            approximation=approximation,
            readout="sum",
        )
        got = optimizer.factors()[name]
        torch.testing.assert_close(got.A, a[0])
        torch.testing.assert_close(got.B, b[0])
    assert float(optimizer._layers.states["head"].examples / optimizer._layers.states["head"].weight) == 3


def test_rows_that_are_neither_are_refused():
    g, layer = graphs(), nn.Linear(4, 2)
    with (
        pytest.raises(ValueError, match=r"has 7 rows in dimension 0, neither those of segment_ids \(10, 13, 4\)"),
        KFAC(layer).capture(positions({"inputs": g})),
    ):
        layer(torch.randn(7, 4)).sum().backward()


def test_as_many_nodes_as_edges_do_not_tell_which_is_which():
    """The library refuses; the submission says so, and takes rows as examples."""
    ids = [torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1])]
    layer = nn.Linear(4, 2)
    with (
        pytest.raises(ValueError, match="has 3 rows in dimension 0, which fits several of the segmentations"),
        KFAC(layer).capture([Positions(segment_ids=i, num_segments=2) for i in ids]),
    ):
        layer(torch.randn(3, 4)).sum().backward()
    g = graphs()._replace(nodes=torch.randn(13, 4), n_node=torch.tensor([3, 4, 2, 4]))
    with pytest.warns(UserWarning, match="a batch of 4 graphs with .13, 13. nodes and edges does not tell"):
        found = positions({"inputs": g})
    assert [p.segment_ids for p in found] == [None]


def test_other_batches_are_masked_by_their_gradients():
    (found,) = positions({"inputs": (torch.randn(2, 3), torch.zeros(2, 3)), "weights": torch.ones(2)})
    assert found.by_gradient
    assert found.segment_ids is None
    assert graph_in({"a": [torch.randn(2)], "b": None}) is None


def test_rows_of_a_batch_of_graphs():
    assert graph_rows((graphs(), 1)) == {10: 4, 13: 4}
    assert graph_rows(torch.randn(2, 3)) == {}


class Type(enum.Enum):
    WEIGHT, ATTENTION_QKV, ATTENTION_KV, ATTENTION_Q = range(4)


def test_fused_projections_are_cut_by_type_where_the_shape_agrees():
    model = nn.Module()
    model.one, model.two, model.off = nn.Linear(4, 12), nn.Linear(4, 8), nn.Linear(4, 7)
    types = {
        "one.weight": Type.ATTENTION_QKV,
        "two.weight": Type.ATTENTION_KV,
        "off.weight": Type.ATTENTION_QKV,
        "one.bias": Type.ATTENTION_QKV,
        "gone.weight": Type.ATTENTION_KV,
    }
    assert output_splits(model, types) == {"one": 3, "two": 2}
    assert parts_of_types({"q": Type.ATTENTION_Q}, {"q": (8, 4)}) == {}
    layers = {
        la.name: la.out_blocks for la in KFAC(model, output_splits=output_splits(model, types)).coverage().layers
    }
    assert layers == {"one": (4, 4, 4), "two": (4, 4), "off": (7,)}
    assert output_splits(model, SimpleNamespace().__dict__) == {}
