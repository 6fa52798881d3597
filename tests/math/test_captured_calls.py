"""Backward passes that reach a layer's calls only in part, and positions that fit a layer only in part."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from algoperf_kfac.pytorch import KFAC, FactorPair, MissingStatisticsError, Positions
from benchmarks.paper.ggn import ggn_blocks, kfac_blocks, relative_error
from tests.math.support import assert_equal, empirical_factors, fisher_factors

APPROXIMATIONS = pytest.mark.parametrize("approximation", ["expand", "reduce"])
FISHERS = pytest.mark.parametrize("fisher", ["empirical", "mc", "exact"])


class Split(torch.autograd.Function):
    """Two matrices side by side; the gradient of a part that is zero stays undefined."""

    @staticmethod
    def forward(ctx: object, left: Tensor, right: Tensor) -> Tensor:
        return torch.cat([left, right], 1)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(part if part.any() else None for part in grad.chunk(2, 1))


class TwoHeads(nn.Module):
    """One layer called on two inputs, whose outputs stay apart."""

    def __init__(self, use_second: bool = True) -> None:
        super().__init__()
        self.layer, self.use_second, self.join = nn.Linear(3, 2), use_second, Split.apply

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.layer(x[:, 0]), self.layer(x[:, 1])
        return self.join(left, right) if self.use_second else left


@APPROXIMATIONS
def test_a_call_that_one_pass_does_not_reach_has_gradient_zero(approximation: str) -> None:
    """Each column of the exact Fisher belongs to one of the two calls; expand is exact here, reduce is not."""
    model, x = TwoHeads(), torch.randn(4, 2, 3)
    pair = fisher_factors(model, x, "mean_squared_error", approximation)["layer"]
    model.join = lambda left, right: torch.cat([left, right], 1)  # the same, for the oracle
    error = relative_error(kfac_blocks(*pair), ggn_blocks(model, x, "mean_squared_error", "layer"))
    assert error < 1e-10 if approximation == "expand" else error > 0.1
    # Column by column each example has the gradient sqrt(2) e_i from one call alone, in both approximations.
    torch.testing.assert_close(pair.B, 2 * 2 * 4 * torch.eye(2))


@APPROXIMATIONS
@FISHERS
def test_a_call_that_no_pass_reaches_has_no_part(approximation: str, fisher: str) -> None:
    """Pseudo-labels, a teacher's outputs: the factors are those of the other call alone."""
    x, both = torch.randn(4, 2, 3), TwoHeads(use_second=False)

    def factors(model: nn.Module, inputs: Tensor) -> FactorPair:
        optimizer = KFAC(model, approximation=approximation, fisher=fisher, seed=3)
        with optimizer.capture() as capture:
            outputs = model(inputs)
            capture.backward_fisher(outputs, "mean_squared_error")
            outputs.square().sum().backward()
        optimizer.step()
        (pair,) = optimizer.factors().values()
        return pair

    alone = copy.deepcopy(both.layer)
    assert_equal(factors(both, x), factors(alone, x[:, 0]))


def test_a_layer_whose_calls_all_stay_without_gradient_is_reported() -> None:
    model = TwoHeads(use_second=False)
    optimizer = KFAC(model)
    extra = nn.Parameter(torch.ones(2))

    def run() -> None:
        with optimizer.capture():
            (model(torch.randn(4, 2, 3)).detach() * extra).sum().backward()

    with pytest.raises(MissingStatisticsError, match="missed its output gradients"):
        run()


@APPROXIMATIONS
def test_a_mask_of_examples_with_the_batch_elsewhere(approximation: str) -> None:
    """Given for the whole model, it applies to layers with and without the length dimension."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).tanh().mean(0))

    model, x = Pooled(), torch.randn(5, 3, 4)  # (length, batch, features)
    keep = torch.tensor([True, False, True])

    def loss(outputs: Tensor) -> Tensor:
        return outputs.square().sum()

    whole = Positions(mask=keep, batch_dim=1)
    got = empirical_factors(model, x, loss, approximation, positions=whole)
    expected = empirical_factors(model, x[:, keep], loss, approximation, positions=Positions(batch_dim=1))
    for name, pair in got.items():
        assert_equal(pair, expected[name])


class Graph(nn.Module):
    """A layer on nodes, one on edges, one on whole graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.node, self.edge, self.readout = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: tuple[Tensor, ...]) -> Tensor:
        nodes, node_ids, edges, edge_ids = x
        pooled = torch.zeros(3, 3).index_add(0, node_ids, self.node(nodes))
        return self.readout(pooled.index_add(0, edge_ids, self.edge(edges)))


def graphs() -> tuple[Tensor, ...]:
    ids = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 0, 0, 1, 2, 2, 2])
    return torch.randn(5, 4), ids[0], torch.randn(7, 4), ids[1]


def test_segment_ids_for_nodes_are_refused_for_edges() -> None:
    """Edges taken as examples with one position each would turn reduce into expand without a word."""
    x = graphs()
    nodes = Positions(segment_ids=x[1], num_segments=3, readout="sum")
    with pytest.raises(ValueError, match="layer edge has 7 rows"):
        empirical_factors(Graph(), x, lambda f: f.square().sum(), "reduce", positions=nodes)


def test_nodes_and_edges_each_with_their_segment_ids() -> None:
    """Sum read-out: the factors of each part are exact, and whole graphs need no segment ids."""
    model, x = Graph(), graphs()
    positions = {
        "node": Positions(segment_ids=x[1], num_segments=3, readout="sum"),
        "edge": Positions(segment_ids=x[3], num_segments=3, readout="sum"),
    }
    pairs = fisher_factors(model, x, "mean_squared_error", "reduce", positions=positions)
    for name, pair in pairs.items():
        exact = ggn_blocks(model, x, "mean_squared_error", name)
        assert relative_error(kfac_blocks(*pair), exact) < 1e-10, name
