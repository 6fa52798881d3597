"""molecules_gnn in PyTorch: its graph network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from submissions.common.api import Batch, Tree
from workloads.molecules_gnn import data
from workloads.molecules_gnn.data import GraphsTuple
from workloads.molecules_gnn.task import MoleculesGnnTask
from workloads.pytorch.activations import ACTIVATIONS
from workloads.pytorch.initialisers import lecun_normal_
from workloads.pytorch.workload import PyTorchWorkload


class GNN(nn.Module):
    """Embeds nodes and edges, passes messages and reads each graph's globals out (Battaglia et al. 2018).

    Args:
        width, hops: sizes of all features and number of rounds of messages.
        activation: a name in `workloads.pytorch.activations`.
    """

    def __init__(self, width: int, hops: int, activation: str) -> None:
        super().__init__()
        self.node_embedding = nn.Linear(data.NODE_FEATURES, width)
        self.edge_embedding = nn.Linear(data.EDGE_FEATURES, width)
        # The globals start as zeros, one for each task, as AlgoPerf's do.
        self.blocks = nn.ModuleList(
            Block(width, data.NUM_TASKS if hop == 0 else width, activation) for hop in range(hops)
        )
        self.decoder = nn.Linear(width, data.NUM_TASKS)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                lecun_normal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, graph: GraphsTuple, dropout_rate: float = 0.0) -> torch.Tensor:
        """Logits (graphs, tasks)."""
        numbers = torch.arange(len(graph.n_node), device=graph.n_node.device)
        node_graphs, edge_graphs = (
            torch.repeat_interleave(numbers, counts, output_size=len(rows))
            for counts, rows in ((graph.n_node, graph.nodes), (graph.n_edge, graph.edges))
        )
        nodes, edges = self.node_embedding(graph.nodes), self.edge_embedding(graph.edges)
        globals_ = nodes.new_zeros(len(numbers), data.NUM_TASKS)
        for block in self.blocks:
            nodes, edges, globals_ = block(
                nodes, edges, globals_, graph.senders, graph.receivers, node_graphs, edge_graphs, dropout_rate
            )
        return self.decoder(globals_)


class Block(nn.Module):
    """One round: edges from their ends, nodes from their edges, globals from all; each sees the globals, too."""

    def __init__(self, width: int, global_width: int, activation: str) -> None:
        super().__init__()
        self.edge = Mlp(3 * width + global_width, width, activation)
        self.node = Mlp(3 * width + global_width, width, activation)
        self.graph = Mlp(2 * width + global_width, width, activation)

    def forward(
        self,
        nodes: torch.Tensor,
        edges: torch.Tensor,
        globals_: torch.Tensor,
        senders: torch.Tensor,
        receivers: torch.Tensor,
        node_graphs: torch.Tensor,
        edge_graphs: torch.Tensor,
        dropout_rate: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """New features of nodes (nodes, width), edges (edges, width) and graphs (graphs, width)."""
        ends = (_rows(nodes, senders), _rows(nodes, receivers))
        edges = self.edge((edges, *ends, _rows(globals_, edge_graphs)), dropout_rate)
        messages = (_sums(edges, senders, len(nodes)), _sums(edges, receivers, len(nodes)))
        nodes = self.node((nodes, *messages, _rows(globals_, node_graphs)), dropout_rate)
        sums = (_sums(nodes, node_graphs, len(globals_)), _sums(edges, edge_graphs, len(globals_)))
        return nodes, edges, self.graph((*sums, globals_), dropout_rate)


class Mlp(nn.Module):
    """Dense, layer norm, activation and dropout over features laid side by side."""

    def __init__(self, inputs: int, width: int, activation: str) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.activation = ACTIVATIONS[activation]

    def forward(self, parts: tuple[torch.Tensor, ...], dropout_rate: float) -> torch.Tensor:
        x = self.activation(self.norm(self.linear(torch.cat(parts, dim=-1))))
        return F.dropout(x, dropout_rate, self.training)


# On CPUs these two are twice as fast as index_select and index_add, backward too.
def _rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x[index]: (len(index), width) of (n, width)."""
    return x.gather(0, index[:, None].expand(-1, x.shape[1]))


def _sums(x: torch.Tensor, index: torch.Tensor, count: int) -> torch.Tensor:
    """Sums of the rows with the same number: (count, width) of (len(index), width)."""
    return x.new_zeros(count, x.shape[1]).scatter_add(0, index[:, None].expand(-1, x.shape[1]), x)


class MoleculesGnnWorkload(PyTorchWorkload, MoleculesGnnTask):
    """See `MoleculesGnnTask`."""

    def build_model(self) -> nn.Module:
        return GNN(self.width, self.hops, self.activation)

    def share_of(self, batch: dict[str, Tree], rank: int, count: int) -> dict[str, Tree]:
        """Whole graphs; see `workloads.molecules_gnn.data.share`."""
        return data.share(batch, rank, count)

    def evaluation_of(self, logits: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        return {"scores": logits, "labels": batch["targets"], "weights": batch["weights"]}
