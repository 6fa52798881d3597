"""Molecules of B3DB as graphs, in three fixed parts of different scaffolds, and the padded batches made of them.

B3DB (Meng et al. 2021, "A curated diverse molecular database of blood-brain barrier permeability with chemical
descriptors", Scientific Data 8:289) says of each molecule whether it passes the blood-brain barrier.
"""

from __future__ import annotations

import csv
import io
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from commands.errors import UserError
from submissions.common.api import Tree
from workloads import seeds
from workloads.data.source import Source, cached_arrays

if TYPE_CHECKING:
    from rdkit import Chem

SOURCE = Source(
    package="B3DB",
    requirement="qc-b3db==1.1.1",
    path="B3DB_classification.tsv",
    sha256="47a160aea1551423ead2aab70b301fb1646aea03cf151fd614eb37c78fa55b82",
)
READER = "rdkit==2026.9.1"  # which makes graphs of SMILES, once
MAX_ATOMS = 60
NUM_TASKS = 1
NODE_FEATURES, EDGE_FEATURES = 9, 3
NUM_EXAMPLES = {"validation": 768, "test": 128}  # the rest trains
# What a training batch has room for, a graph: a little more than the mean, 25.9 and 56.3.
NODES_PER_GRAPH, EDGES_PER_GRAPH = 26, 57
_MAX_EDGES = 160
_MULTIPLE = 64  # of the numbers of rows, so that several devices can share them
_MULTIPLE_OF_GRAPHS = 8
_LARGEST_HELD_OUT_GROUP = 20
_SPLIT_SEED = 20241

_CHIRALITIES = ("CHI_UNSPECIFIED", "CHI_TETRAHEDRAL_CW", "CHI_TETRAHEDRAL_CCW")
_HYBRIDISATIONS = ("SP", "SP2", "SP3", "SP3D", "SP3D2")
_BONDS = ("SINGLE", "DOUBLE", "TRIPLE", "AROMATIC")
_STEREO = ("STEREONONE", "STEREOZ", "STEREOE", "STEREOCIS", "STEREOTRANS", "STEREOANY")
_LOWEST_CHARGE = -5


class GraphsTuple(NamedTuple):
    """A batch of graphs, in the fields and the order of `jraph.GraphsTuple`.

    Attributes:
        nodes: features of all graphs' nodes, float32, (nodes, 9).
        edges: of all graphs' edges, two for each bond, float32, (edges, 3).
        receivers, senders: the nodes that an edge leads to and comes from, int64, (edges,).
        globals: empty; the model starts them.
        n_node, n_edge: of each graph, int64, (graphs,).
    """

    nodes: Tree
    edges: Tree
    receivers: Tree
    senders: Tree
    globals: Tree
    n_node: Tree
    n_edge: Tree


@dataclass(frozen=True)
class Part:
    """One part of the molecules.

    Attributes:
        nodes: features of all atoms, uint8, (atoms, 9).
        edges: of all edges, uint8, (edges, 3).
        senders, receivers: atoms by their number within the molecule, int64, (edges,).
        n_node, n_edge: of each molecule, int64, (N,).
        labels: 1 for a molecule that the barrier keeps out, float32, (N, 1).
        rows: of the molecules in the source file, int64, (N,).
        scaffolds: number of the group that was kept on one side, int64, (N,).
    """

    nodes: np.ndarray
    edges: np.ndarray
    senders: np.ndarray
    receivers: np.ndarray
    n_node: np.ndarray
    n_edge: np.ndarray
    labels: np.ndarray
    rows: np.ndarray
    scaffolds: np.ndarray

    def chosen(self, index: np.ndarray) -> Part:
        """The part with these molecules alone, in this order."""
        atoms, bonds = _ranges(self.n_node, index), _ranges(self.n_edge, index)
        return Part(
            self.nodes[atoms],
            self.edges[bonds],
            self.senders[bonds],
            self.receivers[bonds],
            *(values[index] for values in (self.n_node, self.n_edge, self.labels, self.rows, self.scaffolds)),
        )


def load() -> dict[str, Part]:
    """The parts 'train', 'validation' (768 molecules) and 'test' (128), the same on every machine.

    Molecules of one scaffold (Bemis and Murcko 1996) are on one side; those without rings count as one scaffold
    if they differ in their stereochemistry alone. Of such stereoisomers the parts that are held out have one.

    Raises:
        UserError: qc-b3db is not installed, its file is not the expected one, or rdkit is missing while there is no
            cache yet.
    """
    arrays = cached_arrays("b3db-v1", SOURCE, _parse)
    skeletons = arrays.pop("skeletons")
    dtypes = {"nodes": np.uint8, "edges": np.uint8, "labels": np.float32}
    whole = Part(**{name: values.astype(dtypes.get(name, np.int64)) for name, values in arrays.items()})
    groups = [np.flatnonzero(whole.scaffolds == group) for group in range(whole.scaffolds.max() + 1)]
    # Large groups train: a part that is held out should not be about a few scaffolds.
    small = [group for group, members in enumerate(groups) if len(members) <= _LARGEST_HELD_OUT_GROUP]
    order = list(seeds.generator(seeds.root(_SPLIT_SEED)).permutation(small))
    parts, used = {}, []
    for split, count in NUM_EXAMPLES.items():
        found: list[int] = []
        while len(found) < count:
            members = groups[order[-1]]
            used.append(order.pop())
            found.extend(members[np.unique(skeletons[members], return_index=True)[1]])
        parts[split] = whole.chosen(np.array(found[:count]))
    return {"train": whole.chosen(np.flatnonzero(~np.isin(whole.scaffolds, used))), **parts}


def train_batch(part: Part, rng: np.ndarray, index: int, batch_size: int) -> dict[str, Tree]:
    """Batch `index` of the endless, shuffled stream: a function of (rng, index).

    A batch has room for `batch_size` graphs and for nodes and edges a little over their mean; it ends before the
    first graph that does not fit. What is left out comes in another epoch, in another order.

    Returns:
        inputs, a `GraphsTuple` as `padded` makes it; targets and weights (graphs, 1) float32, 0 on padding.
    """
    per_epoch = len(part.n_node) // batch_size
    if per_epoch == 0:
        raise ValueError(f"batch size {batch_size} exceeds the {len(part.n_node)} training molecules")
    epoch, position = divmod(index, per_epoch)
    order = seeds.generator(seeds.fold_in(rng, epoch)).permutation(len(part.n_node))
    chosen = order[position * batch_size : (position + 1) * batch_size]
    nodes = max(MAX_ATOMS, NODES_PER_GRAPH * batch_size)
    edges = max(_MAX_EDGES, EDGES_PER_GRAPH * batch_size)
    fits = (part.n_node[chosen].cumsum() <= nodes) & (part.n_edge[chosen].cumsum() <= edges)
    return padded(part.chosen(chosen[fits]), nodes, edges, batch_size)


def eval_batch(part: Part, index: int, batch_size: int, room: tuple[int, int]) -> dict[str, Tree]:
    """Batch `index` of a part in fixed order, starting again at its end; see `train_batch`.

    Args:
        room: nodes and edges that are enough for every batch; see `room_for`.
    """
    per_epoch = -(-len(part.n_node) // batch_size)
    first = (index % per_epoch) * batch_size
    chosen = np.arange(first, min(first + batch_size, len(part.n_node)))
    return padded(part.chosen(chosen), *room, batch_size)


def room_for(parts: list[Part], batch_size: int) -> tuple[int, int]:
    """Nodes and edges of the largest evaluation batches of several parts, so that all have one shape."""

    def largest(counts: np.ndarray) -> int:
        return int(np.add.reduceat(counts, np.arange(0, len(counts), batch_size)).max())

    return max(largest(part.n_node) for part in parts), max(largest(part.n_edge) for part in parts)


def padded(part: Part, nodes: int, edges: int, graphs: int) -> dict[str, Tree]:
    """All molecules of a part as one batch of fixed shape, padded as `jraph.pad_with_graphs` pads.

    The first graph of padding has all its nodes and edges, and the edges lead from its first node to itself; the
    others are empty.

    Args:
        nodes, edges, graphs: room for what counts; the numbers of rows are larger, multiples of 64 and of 8, with
            a node and a graph of padding at least.

    Returns:
        As `train_batch`.
    """
    nodes, edges = _next_multiple(nodes + 1, _MULTIPLE), _next_multiple(edges, _MULTIPLE)
    graphs = _next_multiple(graphs + 1, _MULTIPLE_OF_GRAPHS)
    count, used_nodes, used_edges = len(part.n_node), int(part.n_node.sum()), int(part.n_edge.sum())
    offsets = np.repeat(part.n_node.cumsum() - part.n_node, part.n_edge)
    n_node, n_edge = (np.pad(counts, (0, graphs - count)) for counts in (part.n_node, part.n_edge))
    n_node[count], n_edge[count] = nodes - used_nodes, edges - used_edges
    missing_edges = (0, edges - used_edges)
    graph = GraphsTuple(
        nodes=np.pad(part.nodes.astype(np.float32), ((0, nodes - used_nodes), (0, 0))),
        edges=np.pad(part.edges.astype(np.float32), (missing_edges, (0, 0))),
        receivers=np.pad(part.receivers + offsets, missing_edges, constant_values=used_nodes),
        senders=np.pad(part.senders + offsets, missing_edges, constant_values=used_nodes),
        globals={},
        n_node=n_node,
        n_edge=n_edge,
    )
    missing = ((0, graphs - count), (0, 0))
    weights = np.pad(np.ones_like(part.labels), missing)
    return {"inputs": graph, "targets": np.pad(part.labels, missing), "weights": weights}


def share(batch: dict[str, Tree], rank: int, count: int) -> dict[str, Tree]:
    """The graphs of one of `count` processes, each with its nodes, edges, targets and weights.

    Graphs keep their order, and the padding goes to the last process. In place of padding of its own each share
    ends with a graph of one node and no edge.
    """
    graph = batch["inputs"]
    bounds = [len(graph.n_node) * process // count for process in (rank, rank + 1)]
    first, last = bounds
    nodes, edges = (slice(*np.pad(n.cumsum(), (1, 0))[bounds]) for n in (graph.n_node, graph.n_edge))
    part = GraphsTuple(
        nodes=np.pad(graph.nodes[nodes], ((0, 1), (0, 0))),
        edges=graph.edges[edges],
        receivers=graph.receivers[edges] - nodes.start,
        senders=graph.senders[edges] - nodes.start,
        globals=graph.globals,
        n_node=np.append(graph.n_node[first:last], 1),
        n_edge=np.append(graph.n_edge[first:last], 0),
    )
    rest = {key: np.pad(batch[key][first:last], ((0, 1), (0, 0))) for key in ("targets", "weights")}
    return {"inputs": part, **rest}


def _ranges(counts: np.ndarray, index: np.ndarray) -> np.ndarray:
    """The rows of some molecules in an array that holds `counts` rows of each, one molecule after the other."""
    ends = counts.cumsum()
    taken = counts[index]
    return np.arange(taken.sum()) + np.repeat(ends[index] - taken.cumsum(), taken)


def _next_multiple(value: int, step: int) -> int:
    return -(-value // step) * step


def _parse(content: bytes) -> dict[str, np.ndarray]:
    """The arrays of a `Part` with all molecules, and 'skeletons', which stereoisomers share."""
    try:
        from rdkit import Chem, rdBase
        from rdkit.Chem.Scaffolds import MurckoScaffold
    except ImportError:
        remedy = f"{sys.executable} -m pip install --no-deps '{READER}'"
        raise UserError(
            f"The package 'rdkit', which reads the molecules, is not installed. Run: {remedy}"
        ) from None
    seen: set[str] = set()
    groups: dict[str, int] = {}
    skeletons: dict[str, int] = {}
    found: dict[str, list[Tree]] = {}
    for row, entry in enumerate(csv.DictReader(io.StringIO(content.decode("utf-8")), delimiter="\t")):
        with rdBase.BlockLogs():  # two molecules cannot be read, and are left out
            molecule = Chem.MolFromSmiles(entry["SMILES"])
        if molecule is None or not 1 < molecule.GetNumAtoms() <= MAX_ATOMS:
            continue
        name = Chem.MolToSmiles(molecule)
        if name in seen or molecule.GetNumBonds() == 0:
            continue
        seen.add(name)
        skeleton = Chem.MolToSmiles(molecule, isomericSmiles=False)
        scaffold = MurckoScaffold.MurckoScaffoldSmiles(mol=molecule) or skeleton
        ends = np.array([[bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()] for bond in molecule.GetBonds()])
        values: dict[str, Tree] = {
            "nodes": np.array([_atom_features(atom) for atom in molecule.GetAtoms()]),
            "edges": np.repeat([_bond_features(bond) for bond in molecule.GetBonds()], 2, axis=0),
            "senders": ends.ravel(),  # a bond is an edge in each direction, one after the other
            "receivers": ends[:, ::-1].ravel(),
            "n_node": molecule.GetNumAtoms(),
            "n_edge": 2 * molecule.GetNumBonds(),
            "labels": [int(entry["BBB+/BBB-"] == "BBB-")],
            "rows": row,
            "scaffolds": groups.setdefault(scaffold, len(groups)),
            "skeletons": skeletons.setdefault(skeleton, len(skeletons)),
        }
        for key, value in values.items():
            found.setdefault(key, []).append(value)
    flat = {"nodes", "edges", "senders", "receivers"}
    small = {"nodes", "edges", "senders", "receivers", "labels"}
    return {
        key: (np.concatenate if key in flat else np.array)(items).astype(np.uint8 if key in small else np.int32)
        for key, items in found.items()
    }


def _atom_features(atom: Chem.Atom) -> list[int]:
    """What the Open Graph Benchmark says of an atom, as numbers of categories."""
    return [
        atom.GetAtomicNum() - 1,
        _number(_CHIRALITIES, atom.GetChiralTag()),
        atom.GetTotalDegree(),
        atom.GetFormalCharge() - _LOWEST_CHARGE,
        atom.GetTotalNumHs(),
        atom.GetNumRadicalElectrons(),
        _number(_HYBRIDISATIONS, atom.GetHybridization()),
        int(atom.GetIsAromatic()),
        int(atom.IsInRing()),
    ]


def _bond_features(bond: Chem.Bond) -> list[int]:
    """What the Open Graph Benchmark says of a bond, as numbers of categories."""
    return [
        _number(_BONDS, bond.GetBondType()),
        _number(_STEREO, bond.GetStereo()),
        int(bond.GetIsConjugated()),
    ]


def _number(names: tuple[str, ...], value: object) -> int:
    """The place of one of rdkit's values among the names, after them for another."""
    return names.index(str(value)) if str(value) in names else len(names)
