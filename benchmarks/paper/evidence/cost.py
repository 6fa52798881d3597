"""What one evidence step takes, in a process of its own, whose peak memory is its own.

    python -m benchmarks.paper.evidence.cost '{"approximation": "reduce", "network": "wide"}'

Prints a line of JSON: CPU seconds of `fit_factors`, of a value of the evidence with its gradient, and of the passes
alone (forward, and a backward pass for each output); and the bytes that were resident at most beyond what was there
before.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
import time
from typing import Any

import torch
from torch import nn

import algoperf_kfac
from algoperf_kfac.evidence import evidence
from algoperf_kfac.pytorch.evidence import fit_factors
from benchmarks.paper.evidence import training
from benchmarks.paper.update.network import CLASSES, SIDE, wide_resnet

BATCHES, EXAMPLES = 2, {"small": 250, "wide": 64}


@dataclasses.dataclass(frozen=True)
class Cost:
    """What is measured.

    Attributes:
        approximation: "expand" or "reduce".
        network: "small" (of the training runs) or "wide" (WRN-10-2 on images of 16 x 16).
    """

    approximation: str
    network: str


def measure(cost: Cost) -> dict[str, Any]:
    """What is kept."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if cost.network == "small":
        model, shape = training.network(training.WIDTH), (1, 28, 28)
    else:
        model, shape = wide_resnet(), (3, SIDE, SIDE)
    examples = EXAMPLES[cost.network]
    loader = [(torch.randn(examples, *shape), torch.randint(CLASSES, (examples,))) for _ in range(BATCHES)]
    few = [(loader[0][0][:2], loader[0][1][:2])]
    fit_factors(model, few, "softmax_cross_entropy", approximation=cost.approximation)
    _passes(model, few)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    fitted = fit_factors(model, loader, "softmax_cross_entropy", approximation=cost.approximation)
    fit = time.process_time() - start
    peak = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    evidence(fitted, 1.0)
    start = time.process_time()
    evidence(fitted, 2.0)
    rest = time.process_time() - start
    start = time.process_time()
    _passes(model, loader)
    passes = time.process_time() - start
    seconds = {"fit": fit, "evidence": rest, "passes": passes}
    rounded = {name: float(f"{value:.4g}") for name, value in seconds.items()}
    return {"seconds": rounded, "peak_bytes": peak, "version": algoperf_kfac.__version__}


def _passes(model: nn.Module, loader: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    model.eval()
    parameters = list(model.parameters())
    for x, _ in loader:
        outputs = model(x).sum(0)
        for number in range(CLASSES):
            torch.autograd.grad(outputs[number], parameters, retain_graph=number + 1 < CLASSES)


if __name__ == "__main__":
    print(json.dumps(measure(Cost(**json.loads(sys.argv[1])))))
