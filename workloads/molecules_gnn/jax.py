"""molecules_gnn in JAX: its graph network."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from submissions.common.api import Batch
from workloads.jax.activations import ACTIVATIONS
from workloads.jax.transformer import Dropout, Rate, norm
from workloads.jax.workload import JaxWorkload
from workloads.molecules_gnn import data
from workloads.molecules_gnn.data import GraphsTuple
from workloads.molecules_gnn.task import MoleculesGnnTask


class GNN(nn.Module):
    """Embeds nodes and edges, passes messages and reads each graph's globals out (Battaglia et al. 2018).

    Attributes:
        width, hops: sizes of all features and number of rounds of messages.
        activation: a name in `workloads.jax.activations`.
    """

    width: int
    hops: int
    activation: str

    @nn.compact
    def __call__(self, graph: GraphsTuple, dropout_rate: Rate = 0.0, *, train: bool = False) -> jax.Array:
        """Logits (graphs, tasks)."""
        numbers = jnp.arange(len(graph.n_node))
        node_graphs, edge_graphs = (
            jnp.repeat(numbers, counts, total_repeat_length=len(rows))
            for counts, rows in ((graph.n_node, graph.nodes), (graph.n_edge, graph.edges))
        )
        nodes = nn.Dense(self.width, name="node_embedding")(graph.nodes)
        edges = nn.Dense(self.width, name="edge_embedding")(graph.edges)
        # The globals start as zeros, one for each task, as AlgoPerf's do.
        globals_ = jnp.zeros((len(numbers), data.NUM_TASKS), nodes.dtype)
        for hop in range(self.hops):
            nodes, edges, globals_ = Block(self.width, self.activation, name=f"blocks_{hop}")(
                nodes,
                edges,
                globals_,
                graph.senders,
                graph.receivers,
                node_graphs,
                edge_graphs,
                dropout_rate,
                train=train,
            )
        return nn.Dense(data.NUM_TASKS, name="decoder")(globals_)


class Block(nn.Module):
    """One round: edges from their ends, nodes from their edges, globals from all; each sees the globals, too."""

    width: int
    activation: str

    @nn.compact
    def __call__(
        self,
        nodes: jax.Array,
        edges: jax.Array,
        globals_: jax.Array,
        senders: jax.Array,
        receivers: jax.Array,
        node_graphs: jax.Array,
        edge_graphs: jax.Array,
        dropout_rate: Rate,
        *,
        train: bool,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """New features of nodes (nodes, width), edges (edges, width) and graphs (graphs, width)."""

        def updated(name: str, *parts: jax.Array) -> jax.Array:
            return Mlp(self.width, self.activation, name=name)(parts, dropout_rate, train=train)

        edges = updated("edge", edges, nodes[senders], nodes[receivers], globals_[edge_graphs])
        messages = (jax.ops.segment_sum(edges, index, len(nodes)) for index in (senders, receivers))
        nodes = updated("node", nodes, *messages, globals_[node_graphs])
        sums = (
            jax.ops.segment_sum(rows, index, len(globals_))
            for rows, index in ((nodes, node_graphs), (edges, edge_graphs))
        )
        return nodes, edges, updated("graph", *sums, globals_)


class Mlp(nn.Module):
    """Dense, layer norm, activation and dropout over features laid side by side."""

    width: int
    activation: str

    @nn.compact
    def __call__(self, parts: tuple[jax.Array, ...], dropout_rate: Rate, *, train: bool) -> jax.Array:
        x = nn.Dense(self.width, name="linear")(jnp.concatenate(parts, axis=-1))
        x = ACTIVATIONS[self.activation](norm("norm")(x))
        return Dropout()(x, dropout_rate, train=train)


class MoleculesGnnWorkload(JaxWorkload, MoleculesGnnTask):
    """See `MoleculesGnnTask`."""

    def build_model(self) -> nn.Module:
        return GNN(self.width, self.hops, self.activation)

    def evaluation_of(self, logits: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        return {"scores": logits, "labels": batch["targets"], "weights": batch["weights"]}
