"""SOAP (arXiv 2409.11321) in PyTorch, from `pytorch_optimizer`.

The authors' own code is one file to copy, on no package index. Configured as they recommend: betas of 0.95, Adam
without a basis for parameters of one dimension and for sides above 10,000. Tables that are looked up have no
basis on the side of the vocabulary, as theirs of 32,000 tokens have none; at 4,096 it made a step twenty times as
dear. The basis is new every 5 steps instead of their 10: they train for thousands of steps, and find fewer steps
between bases to be better per step.
"""

from submissions.common.api import Tree
from submissions.common.from_torch import from_torch
from submissions.common.hyperparameters import COUNT, FRACTION, NON_NEGATIVE, POSITIVE, UNIT
from submissions.common.packages import Package
from submissions.common.parameters import Parameters

__all__ = [
    "DESCRIPTION",
    "data_selection",
    "get_batch_size",
    "init_optimizer_state",
    "prepare_for_eval",
    "update_params",
]


def make(parameters: Parameters, point: Tree) -> Tree:
    """SOAP for all parameters."""
    from pytorch_optimizer import SOAP

    rest = [*parameters.matrices, *parameters.head, *parameters.vectors]
    groups: list[dict[str, Tree]] = [{"params": rest}]
    groups += [{"params": [table], "max_precondition_dim": table.shape[-1]} for table in parameters.embeddings]
    return SOAP(
        groups,
        lr=point.learning_rate,
        betas=(1 - point.one_minus_beta1, point.beta2),
        weight_decay=point.weight_decay,
        precondition_frequency=point.precondition_frequency,
    )


DESCRIPTION, init_optimizer_state, update_params, prepare_for_eval, data_selection, get_batch_size = from_torch(
    title="SOAP",
    text=(
        "SOAP (Vyas et al., 2024, https://arxiv.org/abs/2409.11321): Adam in the eigenbasis of Shampoo's factors, "
        "which is renewed every 5 steps; plain Adam for parameters of one dimension. Linear warm-up, then cosine "
        "decay."
    ),
    hyperparameters={
        "learning_rate": (1e-2, POSITIVE),
        "one_minus_beta1": (0.05, UNIT),
        "beta2": (0.95, FRACTION),
        "weight_decay": (0.01, NON_NEGATIVE),
        "precondition_frequency": (5, COUNT),
    },
    training={"warmup_factor": 0.1, "grad_clip": 0.5},
    make=make,
    packages=[Package("pytorch_optimizer", "4.1.0", "its SOAP; the authors' code is no package")],
)
