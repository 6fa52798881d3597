"""AlgoPerf's API around `algoperf_kfac.pytorch.KFAC`, for one approximation."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import nn

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.pytorch import KFAC, Positions
from algoperf_kfac.pytorch.discovery import unwrap
from submissions.common.api import Batch, Rng, Workload
from submissions.common.description import Description
from submissions.common.positions import graph_in, parts_of_types, rows_tell
from submissions.common.pytorch import Capture, first_part
from submissions.common.pytorch_submission import Submission

REHEARSED = (4, 2)  # of a batch one part in so many is gone through ahead of the first statistics step


def submission(description: Description[KFACConfig]) -> Submission[KFACConfig, KFAC]:
    """The submission API for one approximation; `submission.py` of each algorithm exports its methods."""

    # abs: AlgoPerf's seeds are int32 and may be negative.
    def make(model: nn.Module, config: KFACConfig, workload: Workload, rng: Rng) -> KFAC:
        return make_optimizer(model, config, workload, seed=abs(int(rng[0])))

    return Submission(description, make, capture, rehearsal, logged=logged)


def capture(optimizer: KFAC, batch: Batch) -> AbstractContextManager[Capture]:
    """The capture of curvature statistics, which does nothing on steps that take none."""
    return optimizer.capture(positions=positions(batch) if optimizer.is_statistics_step else None)


def rehearsal(optimizer: KFAC, batch: Batch) -> tuple[Batch, AbstractContextManager[Capture]] | None:
    """Ahead of the first statistics step of a compiled model, which would need the memory of an uncompiled one."""
    if not optimizer.wants_rehearsal:
        return None
    for parts in REHEARSED:
        if (part := first_part(batch, parts)) is not None:
            return part, optimizer.rehearsal(positions(part), parts=parts)
    return None


def logged(optimizer: KFAC) -> dict[str, float]:
    """The refresh interval in force, where a budget sets it."""
    return {} if optimizer.config.refresh_budget is None else {"refresh_interval": optimizer.refresh_interval}


def make_optimizer(model: nn.Module, config: KFACConfig, workload: Workload | None, *, seed: int) -> KFAC:
    """The submissions' optimizer for a model: fused attention projections are cut where the workload types them so.

    Args:
        workload: the model's; None for a model without one.
        seed: of a sampled Fisher.
    """
    try:
        types = {} if workload is None else workload.model_params_types
    except AttributeError:  # without types nothing is cut
        types = {}
    return KFAC(model, config=config, output_splits=output_splits(model, types), seed=seed)


def output_splits(model: nn.Module, types: dict[str, object]) -> dict[str, int]:
    """Module path -> number of parts of the fused attention projections among the model's linear layers."""
    model = unwrap(model)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    parts = {name.rpartition(".")[0]: count for name, count in parts_of_types(types, shapes).items()}
    return {path: n for path, n in parts.items() if isinstance(model.get_submodule(path), nn.Linear)}


def positions(batch: Batch) -> list[Positions]:
    """Which rows are positions of one example, and which of them count, from the batch's own structure.

    Everywhere a position counts if the loss depends on it: padding drops out layer by layer. In a batch of graphs,
    the rows of nodes and edges belong to graphs of different size. How a model reads graphs out does not show in
    the batch; "sum" is right for the sums over segments by which graph networks pass messages and fill globals
    unless told otherwise (Battaglia et al. 2018, arXiv 1806.01261), and for normalised sums it is off by a factor
    per graph.
    """
    graph = graph_in(batch["inputs"])
    if graph is None:
        return [Positions(mask="gradient")]
    graphs = torch.arange(len(graph.n_node), device=graph.n_node.device)
    sizes = [len(rows) for rows in (graph.nodes, graph.edges) if isinstance(rows, torch.Tensor)]
    if not rows_tell(len(graphs), sizes):
        return [Positions(mask="gradient")]
    counts = (graph.n_node, graph.n_edge)
    ids = [torch.repeat_interleave(graphs, n, output_size=size) for n, size in zip(counts, sizes, strict=True)]
    return [Positions("gradient", i, len(graphs), readout="sum") for i in (*ids, graphs)]
