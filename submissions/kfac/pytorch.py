"""AlgoPerf's API around `algoperf_kfac.pytorch.KFAC`, for one approximation."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.pytorch import KFAC, Positions
from algoperf_kfac.pytorch.discovery import unwrap
from submissions.kfac.defaults import DEFAULTS
from submissions.training_step.positions import graph_in, parts_of_types
from submissions.training_step.pytorch import clip_gradient, compute_gradient, log_step
from submissions.training_step.schedule import learning_rate_factor


class KFACSubmission:
    """The submission API for one approximation; `submission.py` of each algorithm exports its methods.

    Args:
        approximation: "expand" or "reduce".
    """

    def __init__(self, approximation: str) -> None:
        self._approximation = approximation

    def _config(self, hyperparameters: Any) -> KFACConfig:
        defaults = DEFAULTS[self._approximation]
        return KFACConfig.from_hyperparameters(hyperparameters, **defaults, approximation=self._approximation)

    def init_optimizer_state(
        self, workload: Any, model_params: nn.Module, model_state: Any, hyperparameters: Any, rng: Any
    ) -> dict[str, Any]:
        """The optimizer.

        Raises:
            ValueError: a hyperparameter is unknown or out of range.
        """
        del model_state
        config = self._config(hyperparameters)
        try:
            types = workload.model_params_types
        except AttributeError:  # without types nothing is cut
            types = {}
        splits = output_splits(model_params, types)
        # abs: AlgoPerf's seeds are int32 and may be negative.
        optimizer = KFAC(model_params, config=config, output_splits=splits, seed=abs(int(rng[0])))
        return {"optimizer": optimizer}

    def update_params(
        self,
        workload: Any,
        current_param_container: nn.Module,
        current_params_types: Any,
        model_state: Any,
        hyperparameters: Any,
        batch: dict[str, Any],
        loss_type: Any,
        optimizer_state: dict[str, Any],
        eval_results: list[tuple[int, dict[str, float]]],
        global_step: int,
        rng: Any,
        train_state: Any = None,
    ) -> tuple[dict[str, Any], nn.Module, Any]:
        """One step; forward and backward pass run inside the capture of curvature statistics."""
        del hyperparameters, current_params_types, eval_results, train_state
        model, optimizer = current_param_container, optimizer_state["optimizer"]
        config = optimizer.config
        result = compute_gradient(
            workload,
            model,
            batch,
            model_state,
            rng,
            config.dropout_rate,
            config.label_smoothing,
            context=optimizer.capture(positions=positions(batch) if optimizer.is_statistics_step else None),
            loss_type=loss_type,
        )
        log_step(workload, model, result.loss, global_step)
        clip_gradient(model.parameters(), config.grad_clip)
        factor = learning_rate_factor(workload.step_hint, config.horizon_factor, config.warmup_factor, global_step)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * factor
        optimizer.step()
        return optimizer_state, model, result.new_model_state


def output_splits(model: nn.Module, types: dict[str, Any]) -> dict[str, int]:
    """Module path -> number of parts of the fused attention projections among the model's linear layers."""
    model = unwrap(model)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    parts = {name.rpartition(".")[0]: count for name, count in parts_of_types(types, shapes).items()}
    return {path: n for path, n in parts.items() if isinstance(model.get_submodule(path), nn.Linear)}


def positions(batch: dict[str, Any]) -> list[Positions]:
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
