"""One network part of the way through its training: the spectra of its factors, what one step by them is worth.

NadamW trains the network, so that no approximation has chosen where it stands. Factors and gradient are those of
one batch, with the exact Fisher; what a step is worth is measured on other batches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import algoperf_kfac
from algoperf_kfac.pytorch import KFAC
from benchmarks.step_time import Run
from submissions.registry import path_of
from workloads import registry
from workloads.pytorch import batch_norm
from workloads.runner.submission import load

APPROXIMATIONS = ("expand", "reduce", "mixed")
DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # relative to the mean of the products of eigenvalues
LENGTHS = tuple(2.0**power for power in range(-6, 7))  # of the whole step, over a hundredth of the weights' norm
OTHER_BATCHES = 4
Direction = dict[str, Tensor]  # by layer, (P_out, P_in [+ 1])
Factors = dict[str, tuple[Tensor, Tensor]]


@dataclasses.dataclass(frozen=True)
class Start:
    """Where it is measured.

    Attributes:
        workload: one with a softmax cross-entropy and one label for an example.
        steps: how many NadamW has made.
        seed: of weights and batches.
    """

    workload: str
    steps: int
    seed: int


def measure(start: Start) -> dict[str, Any]:
    """What is kept: "worth" by approximation, "layers" by name of convolutions with kernels."""
    torch.set_num_threads(1)
    model, batches = _trained(start)
    x, y = next(batches)
    others = [next(batches) for _ in range(OTHER_BATCHES)]
    with batch_norm.frozen(model.train()):
        factors = {name: _factors(model, x, name) for name in APPROXIMATIONS}
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        gradient = {name: _matrix(_layer(model, name)) for name in factors["expand"]}
        before = _loss(model, others)
        worth = {"gradient": _best(model, others, {0.0: gradient}, before)}
        for approximation, found in factors.items():
            directions = {damping: preconditioned(gradient, found, damping) for damping in DAMPINGS}
            worth[approximation] = _best(model, others, directions, before)
    layers = {
        name: spectra(gradient[name], factors["expand"][name], factors["reduce"][name], kernel)
        for name in gradient
        if (kernel := _kernel(_layer(model, name))) > 1
    }
    return {"before": before, "worth": worth, "layers": layers, "version": algoperf_kfac.__version__}


def preconditioned(gradient: Direction, factors: Factors, damping: float) -> Direction:
    """B^-1 G A^-1 of each layer, its products of eigenvalues damped by this share of their mean."""
    found = {}
    for name, matrix in gradient.items():
        (a_values, a_basis), (b_values, b_basis) = (torch.linalg.eigh(factor.double()) for factor in factors[name])
        values = torch.outer(b_values.clamp(min=0), a_values.clamp(min=0))
        rotated = b_basis.T @ matrix.double() @ a_basis
        direction = b_basis @ (rotated / (values + damping * values.mean()).clamp(min=1e-30)) @ a_basis.T
        found[name] = direction.to(matrix.dtype)
    return found


def spectra(gradient: Tensor, expand: tuple[Tensor, Tensor], reduce: tuple[Tensor, Tensor], kernel: int) -> Any:
    """Of one convolution, by approximation.

    Args:
        gradient: (P_out, P_in).
        expand: A and B by expand.
        reduce: A and B by reduce.
        kernel: k^2, the positions of the kernel.

    Returns:
        "eigenvalues": of A, falling, over the greatest; "rank": (sum of eigenvalues)^2 / sum of their squares over
        P_in; "flat": the share of the update's squared norm, with a damping of 1e-3, in the P_in (k^2 - 1) / k^2
        directions in which reduce's A is smallest. "gradient": this share of the gradient; "trace": of expand's A.
    """
    flat = gradient.shape[1] * (kernel - 1) // kernel
    basis = torch.linalg.eigh(reduce[0].double()).eigenvectors[:, :flat]

    def share(matrix: Tensor) -> float:
        return _digits(float((matrix.double() @ basis).square().sum() / matrix.double().square().sum()))

    found: dict[str, Any] = {"gradient": share(gradient)}
    trace = (basis * (expand[0].double() @ basis)).sum() / expand[0].double().trace()
    found["trace"] = _digits(float(trace))
    for name, factors in (("expand", expand), ("reduce", reduce)):
        values = torch.linalg.eigvalsh(factors[0].double()).clamp(min=0).flip(0)
        update = preconditioned({"": gradient}, {"": factors}, 1e-3)[""]
        found[name] = {
            "eigenvalues": [_digits(float(value)) for value in values / values[0]],
            "rank": _digits(float(values.sum().square() / values.square().sum() / len(values))),
            "flat": share(update),
        }
    return found


def _trained(start: Start) -> tuple[nn.Module, Iterator[tuple[Tensor, Tensor]]]:
    submission, workload = load(str(path_of("nadamw", "pytorch"))), registry.load(start.workload, "pytorch")
    rng = np.array([start.seed, 0])
    params, model_state = workload.init_model_fn(rng)
    state = submission.init_optimizer_state(workload, params, model_state, {}, rng)
    queue = workload._build_input_queue(rng, "train", "", workload.batch_size)
    run = Run(submission, workload, queue, state, params, model_state)
    for step in range(start.steps):
        run.step(step, np.array([start.seed, step]))
    return run.params, ((batch["inputs"], batch["targets"].long()) for batch in queue)


def _factors(model: nn.Module, x: Tensor, approximation: str) -> Factors:
    model.zero_grad()
    optimizer = KFAC(model, learning_rate=0.0, approximation=approximation, fisher="exact", max_factor_dim=4096)
    with optimizer.capture() as capture:
        capture.backward_fisher(model(x), "softmax_cross_entropy")
    optimizer.step()  # of length zero
    factors = {}
    for name, (a, b) in optimizer.factors(reduction="mean").items():
        assert isinstance(a, Tensor)  # not in blocks: no side is above the limit
        assert isinstance(b, Tensor)
        factors[name] = a, b
    return factors


def _layer(model: nn.Module, name: str) -> nn.Linear | nn.Conv2d:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear | nn.Conv2d)  # both workloads have no others
    return layer


def _matrix(layer: nn.Linear | nn.Conv2d) -> Tensor:
    assert layer.weight.grad is not None
    columns = [layer.weight.grad.flatten(1)]
    if layer.bias is not None:
        assert layer.bias.grad is not None
        columns.append(layer.bias.grad[:, None])
    return torch.cat(columns, 1)  # a copy


def _best(
    model: nn.Module, others: list[tuple[Tensor, Tensor]], directions: dict[float, Direction], before: float
) -> dict[str, float]:
    """The most that one step along one of the directions lowers the loss of other batches."""
    found = (
        {"decrease": before - after, "damping": damping, "length": length}
        for damping, direction in directions.items()
        for length in LENGTHS
        if np.isfinite(after := _after(model, others, direction, length))
    )
    best = max(found, key=lambda one: one["decrease"])
    return {name: _digits(value) for name, value in best.items()}


def _after(model: nn.Module, others: list[tuple[Tensor, Tensor]], direction: Direction, length: float) -> float:
    weights = sum(float(_layer(model, name).weight.detach().square().sum()) for name in direction) ** 0.5
    norm = sum(float(step.square().sum()) for step in direction.values()) ** 0.5
    with _moved(model, direction, -0.01 * length * weights / norm):
        return _loss(model, others)


@contextmanager
def _moved(model: nn.Module, direction: Direction, by: float) -> Iterator[None]:
    layers = {name: _layer(model, name) for name in direction}
    kept = {name: [p.detach().clone() for p in layer.parameters(recurse=False)] for name, layer in layers.items()}
    try:
        with torch.no_grad():
            for name, layer in layers.items():
                step = by * direction[name]
                columns = layer.weight[0].numel()
                layer.weight.add_(step[:, :columns].reshape(layer.weight.shape))
                if layer.bias is not None:
                    layer.bias.add_(step[:, columns])
        yield
    finally:
        with torch.no_grad():
            for name, layer in layers.items():
                for parameter, old in zip(layer.parameters(recurse=False), kept[name], strict=True):
                    parameter.copy_(old)


@torch.no_grad()
def _loss(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    losses = [float(nn.functional.cross_entropy(model(x), y)) for x, y in batches]
    return sum(losses) / len(losses)


def _kernel(layer: nn.Module) -> int:
    return int(np.prod(layer.kernel_size)) if isinstance(layer, nn.Conv2d) else 1


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
