"""The page of peers: the time that curvlinops and einconv take for the same factors, in the same process.

Who is not installed is a dash. Neither is part of an optimizer: curvlinops is written to be right on any model,
einconv to say any operation of a convolution as one einsum.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import algoperf_kfac
from algoperf_kfac.pytorch import KFAC
from benchmarks.paper.complexity import layers
from benchmarks.paper.complexity.layers import Layer
from benchmarks.paper.complexity.measure import describe
from benchmarks.paper.complexity.pytorch_layer import Step, build
from benchmarks.paper.complexity.timing import Timed, medians, whole
from benchmarks.paper.complexity.worker import WHOLE, device
from commands import atomic
from commands.errors import tell

LAYERS = (layers.LINEAR, layers.CONV1, layers.CONV2, layers.STRIDED, layers.GROUPED)
PACKAGES = {"curvlinops": "curvlinops-for-pytorch", "einconv": "einconv"}

HEAD = """# The same factors by others

Written by `python -m benchmarks.paper peers`. CPU milliseconds, medians of at least three rounds in turns.

*Factors*: forward pass, backward pass, A and B of one layer before a mean over positions and a cross-entropy, by
the library's capture and by curvlinops' `KFACLinearOperator` (`compute_kronecker_factors`, empirical Fisher). *A*:
by the library as part of a step, and by einconv's einsum, its expression made beforehand, of convolutions. A ratio
above 1 is how often the library's time goes into the other's.
"""


class Mean(nn.Module):
    """Of a linear layer's or a convolution's outputs over positions."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.dims = tuple(range(2, 2 + layer.dims)) if layer.dims else (1,)

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.dims)


def run(given: argparse.Namespace, output: Path) -> None:
    """Measures and writes the page; a minute of CPU time."""
    torch.set_num_threads(1)
    tell("==> about 60 s of CPU time")
    atomic.write_text(output, "\n".join([HEAD, _origin(), "", *_table(), ""]))


def _origin() -> str:
    known = [f"{name} {importlib.metadata.version(PACKAGES[name])}" for name in PACKAGES if _is_here(name)]
    others = ", ".join(known) or "no peer installed"
    return f"Measured with version {algoperf_kfac.__version__} on {device('pytorch')}; {others}."


def _is_here(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _table() -> Iterator[str]:
    yield "| layer | approximation | factors | curvlinops | ratio | A | einconv | ratio |"
    yield "|---" * 8 + "|"
    for layer in LAYERS:
        for approximation in ("expand", "reduce"):
            tell(f"    {describe(layer)}, {approximation}")
            found = medians(operations(layer, approximation))
            factors, a = found["library"]["seconds"], found["step"]["A"]
            cells = [f"{1e3 * factors:.2f}", *_beside(found, "curvlinops", factors)]
            cells += [f"{1e3 * a:.2f}", *_beside(found, "einconv", a)]
            yield f"| {describe(layer)}, {layer.groups} groups | {approximation} | {' | '.join(cells)} |"


def _beside(found: dict[str, dict[str, float]], name: str, mine: float) -> list[str]:
    if name not in found:
        return ["-", "-"]
    seconds = found[name]["seconds"]
    return [f"{1e3 * seconds:.2f}", f"{seconds / mine:.1f}"]


def operations(layer: Layer, approximation: str) -> dict[str, Timed]:
    """What is timed of a layer: "library" and "curvlinops", factors; "step", of the library, and "einconv", A."""
    torch.manual_seed(0)
    x, module = torch.randn(layer.input_shape), build(layer)
    y = torch.randint(layer.outputs, (layer.examples,))
    model, loss = nn.Sequential(module, Mean(layer)), nn.CrossEntropyLoss()
    kfac = KFAC(model, approximation=approximation, **WHOLE)

    def library() -> None:
        kfac.zero_grad()
        with kfac.capture(force=True):
            loss(model(x), y).backward()

    library()
    kfac.step()  # settles that what is captured is the gradient
    gradient = torch.randn(layer.output_shape) / layer.examples
    step = Step(layer, build(layer), x, gradient, kfac.config)
    found: dict[str, Timed] = {"library": whole(library), "step": step.timed}
    if _is_here("curvlinops") and layer.groups == 1 and layer.dims in (0, 2):  # what it has
        found["curvlinops"] = whole(_curvlinops(model, loss, x, y, approximation))
    if _is_here("einconv") and layer.dims:
        expression = einconv_of(layer, x, approximation)
        found["einconv"] = whole(expression)
    for operation in found.values():
        operation()
    return found


def _curvlinops(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor, approximation: str) -> Callable[[], None]:
    import curvlinops

    operator = curvlinops.KFACLinearOperator(
        model,
        loss,
        list(model.parameters()),
        [(x, y)],
        fisher_type="empirical",
        kfac_approx=approximation,
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    compute: Callable[[], None] = operator.compute_kronecker_factors
    return compute


def einconv_of(layer: Layer, x: Tensor, approximation: str) -> Callable[[], Tensor]:
    """A of a convolution without its bias, as einconv has it: (groups, P_in, P_in)."""
    from einconv.expressions import convNd_kfac_reduce, convNd_kfc

    module = convNd_kfac_reduce if approximation == "reduce" else convNd_kfc
    padding = (layer.kernel - 1) // 2
    equation, operands, shape = module.einsum_expression(
        x, layer.kernel, layer.stride, padding, groups=layer.groups
    )
    return lambda: torch.einsum(equation, *operands).reshape(shape)
