"""Sizes of AlgoPerf's training batches beside the number of examples."""

from __future__ import annotations

from collections.abc import Iterable

from commands.errors import UserError

AUDIO_SAMPLES = 320_000  # 20 seconds at 16 kHz, what utterances are padded to
SENTENCE = 256  # tokens of a packed row
GRAPH_NODES, GRAPH_EDGES = 26, 56  # batches of molecules are padded to these averages


def graph_rows(graphs: int) -> dict[int, int]:
    """Rows of nodes and of edges in a batch of molecules -> the number of graphs, the padding graph included."""
    return {GRAPH_NODES * graphs + 1: graphs + 1, GRAPH_EDGES * graphs: graphs + 1}


def base_of(name: str, known: Iterable[str]) -> str:
    """The workload of which `name` is a variant, or `name` itself.

    Raises:
        UserError: none of those known.
    """
    for base in known:
        if name == base or name.startswith(f"{base}_"):
            return base
    raise UserError(
        f"no batch shapes are known for workload '{name}'; known: {', '.join(known)} and their variants"
    )
