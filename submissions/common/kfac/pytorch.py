"""AlgoPerf's API around `algoperf_kfac.pytorch.KFAC`, for one approximation."""

from __future__ import annotations

import warnings
from typing import TypedDict

import torch
from torch import nn

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.pytorch import KFAC, Positions
from algoperf_kfac.pytorch.discovery import unwrap
from submissions.common.api import Batch, EvalResults, Hyperparameters, Rng, Tree, Workload
from submissions.common.description import Description
from submissions.common.positions import graph_in, parts_of_types
from submissions.common.pytorch import clip_gradient, compute_gradient, log_step
from submissions.common.schedule import learning_rate_factor
from submissions.common.spec import LossType


class OptimizerState(TypedDict):
    """What AlgoPerf's runner keeps in its checkpoints, by `state_dict`."""

    optimizer: KFAC


class KFACSubmission:
    """The submission API for one approximation; `submission.py` of each algorithm exports its methods.

    Args:
        description: the submission's.
    """

    def __init__(self, description: Description[KFACConfig]) -> None:
        self._description = description

    def init_optimizer_state(
        self,
        workload: Workload,
        model_params: nn.Module,
        model_state: Tree,
        hyperparameters: Hyperparameters,
        rng: Rng,
    ) -> OptimizerState:
        """The optimizer.

        Raises:
            ValueError: a hyperparameter is unknown or out of range.
        """
        del model_state
        _, config = self._description.configure(hyperparameters)
        # abs: AlgoPerf's seeds are int32 and may be negative.
        return {"optimizer": make_optimizer(model_params, config, workload, seed=abs(int(rng[0])))}

    def update_params(
        self,
        workload: Workload,
        current_param_container: nn.Module,
        current_params_types: Tree,
        model_state: Tree,
        hyperparameters: Hyperparameters,
        batch: Batch,
        loss_type: LossType,
        optimizer_state: OptimizerState,
        eval_results: EvalResults,
        global_step: int,
        rng: Rng,
        train_state: Tree = None,
    ) -> tuple[OptimizerState, nn.Module, Tree]:
        """One step; forward and backward pass run inside the capture of curvature statistics."""
        del current_params_types, eval_results, train_state
        model, optimizer = current_param_container, optimizer_state["optimizer"]
        training = self._description.training(hyperparameters)
        result = compute_gradient(
            workload,
            model,
            batch,
            model_state,
            rng,
            training.dropout_rate,
            training.label_smoothing,
            context=optimizer.capture(positions=positions(batch) if optimizer.is_statistics_step else None),
            loss_type=loss_type,
        )
        log_step(workload, model, result.loss, global_step)
        clip_gradient(model.parameters(), training.grad_clip)
        factor = learning_rate_factor(
            workload.step_hint, training.horizon_factor, training.warmup_factor, global_step
        )
        for group in optimizer.param_groups:
            group["lr"] = optimizer.config.learning_rate * factor
        optimizer.step()
        return optimizer_state, model, result.new_model_state


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
    if len(sizes) < 2 or len({*sizes, len(graphs)}) < 3:
        # Which rows a layer has would not show in their number.
        warnings.warn(
            f"K-FAC: a batch of {len(graphs)} graphs with {sizes} nodes and edges does not tell which rows are "
            "which: each row counts as an example of its own",
            stacklevel=2,
        )
        return [Positions(mask="gradient")]
    counts = (graph.n_node, graph.n_edge)
    ids = [torch.repeat_interleave(graphs, n, output_size=size) for n, size in zip(counts, sizes, strict=True)]
    return [Positions("gradient", i, len(graphs), readout="sum") for i in (*ids, graphs)]
