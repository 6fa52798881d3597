"""A model's parameters by their roles, as optimizers for matrices tell them apart; by no name of a workload's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import nn

from submissions.common.api import Workload
from submissions.common.spec import ParameterType

_TABLES = (nn.Embedding, nn.EmbeddingBag)


@dataclasses.dataclass(frozen=True)
class Parameters:
    """The trainable parameters of a model, each in one list.

    Attributes:
        matrices: weights of hidden layers: two dimensions or more (a convolution's four, outputs first).
        embeddings: tables that are looked up, a table that is tied to the output among them.
        head: weights and biases of the output layer.
        vectors: biases, scales of norms, and what else has one dimension or is broadcast over the batch (tokens,
            tables of positions: a first dimension of 1).
    """

    matrices: list[nn.Parameter]
    embeddings: list[nn.Parameter]
    head: list[nn.Parameter]
    vectors: list[nn.Parameter]

    @property
    def others(self) -> list[nn.Parameter]:
        """All but the matrices."""
        return [*self.embeddings, *self.head, *self.vectors]

    @property
    def all(self) -> list[nn.Parameter]:
        """All, in this order of the lists."""
        return [*self.matrices, *self.others]


def parameters_of(model: nn.Module, workload: Workload) -> Parameters:
    """Sorts the parameters of a model.

    The output layer is what `is_output_params` says; a table is known by its module or by its type in
    `model_params_types`.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        model = model.module
    tables = {id(module.weight) for module in model.modules() if isinstance(module, _TABLES)}
    types: Mapping[str, object] = workload.model_params_types
    sorted_ = Parameters([], [], [], [])
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in tables or types.get(name) is ParameterType.EMBEDDING:
            sorted_.embeddings.append(parameter)
        elif workload.is_output_params(name):
            sorted_.head.append(parameter)
        elif parameter.dim() > 1 and len(parameter) > 1:
            sorted_.matrices.append(parameter)
        else:
            sorted_.vectors.append(parameter)
    return sorted_
