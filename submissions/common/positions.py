"""What a batch's own structure says of the positions in it, whatever the framework and the workload."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence

from submissions.common.api import Tree

# The fields of a batched graph as `jraph.GraphsTuple` names them.
GRAPH_FIELDS = ("nodes", "edges", "senders", "receivers", "n_node", "n_edge", "globals")


def graph_in(inputs: Tree) -> Tree:
    """The batch of graphs that a model's inputs are or hold, or None.

    Args:
        inputs: of a batch: an array, or tuples, lists and mappings of them, or any object with a graph's fields.
    """
    if all(hasattr(inputs, field) for field in GRAPH_FIELDS):
        return inputs
    parts: Iterable[Tree] = ()
    if isinstance(inputs, Mapping):
        parts = inputs.values()
    elif isinstance(inputs, (tuple, list)):
        parts = inputs
    return next((graph for part in parts if (graph := graph_in(part)) is not None), None)


def graph_rows(inputs: Tree) -> dict[int, int]:
    """Rows of nodes and of edges -> the number of graphs, of inputs that hold a batch of graphs; else nothing."""
    graph = graph_in(inputs)
    return {} if graph is None else {len(rows): len(graph.n_node) for rows in (graph.nodes, graph.edges)}


def rows_tell(graphs: int, sizes: Sequence[int]) -> bool:
    """Whether the number of a layer's rows shows what they are, nodes, edges or graphs; warns if it does not.

    Args:
        graphs: in the batch.
        sizes: rows of its nodes and of its edges, of those that are arrays.
    """
    if len(sizes) == 2 and len({*sizes, graphs}) == 3:
        return True
    warnings.warn(
        f"K-FAC: a batch of {graphs} graphs with {sizes} nodes and edges does not tell which rows are which: "
        "each row counts as an example of its own",
        stacklevel=3,
    )
    return False


def parts_of_types(types: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Into how many layers a fused attention projection is to be cut, from the types of the parameters.

    A type is a hint made from names: it counts only where the shape agrees, a matrix of as many outputs as two
    (key, value) or three (query, key, value) layers from its inputs to its inputs have.

    Args:
        types: parameter name -> an enumeration's member; ATTENTION_QKV and ATTENTION_KV matter.
        shapes: parameter name -> shape, output dimension first.

    Returns:
        Parameter name -> number of parts.
    """
    parts = {}
    for name, kind in types.items():
        count = {"ATTENTION_QKV": 3, "ATTENTION_KV": 2}.get(getattr(kind, "name", ""))
        shape = tuple(shapes.get(name, ()))
        if count is not None and len(shape) == 2 and shape[0] == count * shape[1]:
            parts[name] = count
    return parts
