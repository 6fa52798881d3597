"""Where K-FAC-expand and K-FAC-reduce are exact, and where they are not (arXiv 2311.00636, section 3), as cases.

Each is a small network, a loss and the layers that are compared with their exact Gauss-Newton block. The tests hold
every line to its bounds; `python -m benchmarks.paper exactness` writes the measured errors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from algoperf_kfac.pytorch import KFAC, Positions
from benchmarks.paper.ggn import ggn_blocks, kfac_blocks, relative_error

ZERO, LARGE = 1e-10, 0.1
SQUARED, SOFTMAX = "mean_squared_error", "softmax_cross_entropy"
N, R = 3, 4


class Net(nn.Module):
    """Layers that share their weight over positions, something that mixes positions, and a head."""

    def __init__(self, before: nn.Module, mix: Callable[[Tensor], Tensor], after: nn.Module | None = None) -> None:
        super().__init__()
        self.before = before
        self.mix = mix
        self.after = after or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.mix(self.before(x)))


class Whiten(nn.Module):
    """Multiply by a fixed root of a precision matrix: squared error then has the covariance of a Gaussian."""

    root: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        root = torch.randn(dim, dim)
        self.register_buffer("root", torch.linalg.cholesky(root @ root.T + 0.3 * torch.eye(dim)))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.root


class Attention(nn.Module):
    """Softmax attention with a single head; mixes positions in a way that depends on the input."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        scores = 2 * self.query(x) @ self.key(x).transpose(1, 2)
        return scores.softmax(-1) @ self.value(x)


def sharp(module: nn.Module, gain: float = 3.0) -> nn.Module:
    """Larger weights: predictions that are not all near uniform, so that L_n differs between examples."""
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(gain)
    return module


def deep_linear() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))


def identity(x: Tensor) -> Tensor:
    return x


def mean(x: Tensor) -> Tensor:
    return x.mean(1)


def total(x: Tensor) -> Tensor:
    return x.sum(1)


def average_pool(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def mixing(matrix: Tensor, then: Callable[[Tensor], Tensor] = identity) -> Callable[[Tensor], Tensor]:
    """Positions mixed by a fixed attention matrix."""
    return lambda x: then(torch.einsum("rs,nsd->nrd", matrix, x))


def doubly_stochastic() -> Tensor:
    shifts = torch.stack([torch.eye(R).roll(k, 1) for k in range(R)])
    return torch.einsum("k,kij->ij", torch.tensor([0.4, 0.3, 0.2, 0.1]), shifts)


def graph_readout(kind: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    ids = torch.tensor([0, 0, 1, 1, 1, 1, 1, 2])

    def readout(x: Tensor) -> Tensor:
        summed = x.new_zeros(N, x.shape[-1]).index_add(0, ids, x)
        return summed if kind == "sum" else summed / ids.bincount()[:, None]

    return readout, ids


def convolutions(padding_mode: Any) -> nn.Module:
    first = nn.Conv2d(2, 3, 3, padding=1, padding_mode=padding_mode, bias=False)
    return nn.Sequential(first, nn.Conv2d(3, 2, 3, padding=1, padding_mode=padding_mode, bias=False))


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the table: per approximation a bound, ZERO from above or any other from below."""

    model: nn.Module
    x: Tensor
    expand: float
    reduce: float | tuple[float, float]
    layers: tuple[str, ...] = ("before.0", "before.1")
    loss: str = SQUARED
    positions: Positions | None = None
    bias_only: bool = False


def per_position_gaussian() -> Case:
    return Case(Net(deep_linear(), identity, Whiten(3)), torch.randn(N, R, 4), ZERO, LARGE)


def reduce_gaussian(pool: Callable[[Tensor], Tensor]) -> Case:
    after = nn.Sequential(nn.Linear(3, 3), Whiten(3))
    return Case(Net(deep_linear(), pool, after), torch.randn(N, R, 4), LARGE, ZERO)


def weighted_sum() -> Case:
    weights = torch.tensor([1.0, 0.1, 0.5, 2.0])
    return Case(
        Net(deep_linear(), lambda x: torch.einsum("r,nrd->nd", weights, x)), torch.randn(N, R, 4), LARGE, LARGE
    )


def cross_entropy(pool: Callable[[Tensor], Tensor]) -> Case:
    x = 2 * torch.randn(N, R, 4)
    return Case(Net(sharp(deep_linear()), pool), x, LARGE, LARGE, loss=SOFTMAX)


def one_example(pool: Callable[[Tensor], Tensor], loss: str) -> Case:
    head = nn.Sequential(nn.Tanh(), nn.LayerNorm(3), nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 3))
    return Case(Net(deep_linear(), pool, head), torch.randn(1, R, 4), LARGE, ZERO, loss=loss)


def one_vector(loss: str) -> Case:
    before = nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.Tanh(), nn.Linear(3, 3)))
    return Case(Net(before, mean), torch.randn(1, 1, 4), ZERO, ZERO, ("before.0", "before.1.1"), loss)


def value_projection(matrix: Tensor, expand: float, reduce: float, then: Callable[[Tensor], Tensor]) -> Case:
    return Case(Net(deep_linear(), mixing(matrix, then), nn.Linear(3, 2)), torch.randn(N, R, 4), expand, reduce)


def bias_block(kind: str) -> Case:
    if kind == "convolution":
        before = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, stride=2))
        model = Net(sharp(before), average_pool, nn.Linear(3, 3))
        layers, x, loss = ("before.0", "before.2"), torch.randn(N, 2, 5, 5), SOFTMAX
    else:
        loss = SOFTMAX if kind == "softmax" else "sigmoid_cross_entropy"
        before = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), sharp(Attention(3)))
        model = Net(before, identity, nn.Sequential(nn.Tanh(), nn.Linear(3, 3)))
        # Not the query: it acts on its own position alone, so that expand is exact for its bias.
        layers, x = ("before.0", "before.2.value"), torch.randn(N, R, 4)
    return Case(model, x, LARGE, ZERO, layers, loss, bias_only=True)


def graph(kind: str, told: str) -> Case:
    readout, ids = graph_readout(kind)
    positions = Positions(segment_ids=ids, num_segments=N, readout=told)
    reduce = ZERO if kind == told else 0.05  # measured 0.13 and more
    return Case(Net(deep_linear(), readout, nn.Linear(3, 2)), torch.randn(8, 4), LARGE, reduce, positions=positions)


def first_convolution(padding_mode: str) -> Case:
    # The share of border pixels decides the error: about 0.2 for positive pixels on so small an image.
    reduce = (0.1, 0.3) if padding_mode == "zeros" else ZERO
    model = Net(convolutions(padding_mode), average_pool)
    return Case(model, torch.rand(N, 2, 5, 5), LARGE, reduce, ("before.0",))


def last_convolution(padding_mode: str) -> Case:
    model = Net(convolutions(padding_mode), average_pool)
    return Case(model, torch.randn(N, 2, 5, 5), LARGE, ZERO, ("before.1",))


def per_pixel(padding_mode: str) -> Case:
    model = Net(convolutions(padding_mode), identity)
    return Case(model, torch.randn(N, 2, 4, 4), ZERO, LARGE, ("before.1",))


UNIFORM = torch.full((R, R), 1 / R, dtype=torch.float64)
PERMUTATION = torch.eye(R, dtype=torch.float64)[[2, 0, 3, 1]]


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the table.

    Attributes:
        row: of the truth table; several lines may belong to one.
        what: the network and the loss, in words.
        setting: "expand", "reduce", "both" or "neither": what the paper calls the setting.
        make: the case.
    """

    row: int
    what: str
    setting: str
    make: Callable[[], Case]


GRAPH = "graphs of 1, 2 and 5 nodes"
TABLE: dict[str, Line] = {
    "expand-setting-gaussian": Line(
        1, "deep linear, a loss per position, Gaussian of any covariance", "expand", per_position_gaussian
    ),
    "sum-over-positions": Line(
        2, "deep linear, sum over positions, Gaussian", "reduce", lambda: reduce_gaussian(total)
    ),
    "mean-over-positions": Line(
        2, "deep linear, mean over positions, Gaussian", "reduce", lambda: reduce_gaussian(mean)
    ),
    "weighted-sum": Line(3, "deep linear, a sum over positions with unequal weights", "neither", weighted_sum),
    "cross-entropy-expand-setting": Line(
        4, "deep linear, softmax cross-entropy per position", "expand", lambda: cross_entropy(identity)
    ),
    "cross-entropy-reduce-setting": Line(
        4, "deep linear, mean over positions, softmax cross-entropy", "reduce", lambda: cross_entropy(mean)
    ),
    "one-example-softmax": Line(
        5, "one example, mean over positions, a deep head, softmax", "reduce", lambda: one_example(mean, SOFTMAX)
    ),
    "one-example-sigmoid": Line(
        5,
        "one example, sum over positions, a deep head, sigmoid",
        "reduce",
        lambda: one_example(total, "sigmoid_cross_entropy"),
    ),
    "one-example-squared": Line(
        5,
        "one example, mean over positions, a deep head, squared error",
        "reduce",
        lambda: one_example(mean, SQUARED),
    ),
    "one-vector-softmax": Line(6, "one example of one position, softmax", "both", lambda: one_vector(SOFTMAX)),
    "one-vector-squared": Line(
        6, "one example of one position, squared error", "both", lambda: one_vector(SQUARED)
    ),
    "uniform-attention": Line(
        7,
        "value projection under uniform attention, a loss per position",
        "neither",
        lambda: value_projection(UNIFORM, LARGE, ZERO, identity),
    ),
    "permutation-mixing": Line(
        8,
        "value projection, positions permuted, a loss per position",
        "expand",
        lambda: value_projection(PERMUTATION, ZERO, LARGE, identity),
    ),
    "doubly-stochastic-then-mean": Line(
        9,
        "value projection under doubly stochastic attention, then the mean",
        "reduce",
        lambda: value_projection(doubly_stochastic(), LARGE, ZERO, mean),
    ),
    "bias-attention-softmax": Line(
        10, "the bias alone, attention, softmax", "neither", lambda: bias_block("softmax")
    ),
    "bias-attention-sigmoid": Line(
        10, "the bias alone, attention, sigmoid", "neither", lambda: bias_block("sigmoid")
    ),
    "bias-convolution": Line(
        10, "the bias alone, convolutions, average pooling, softmax", "reduce", lambda: bias_block("convolution")
    ),
    "graph-sum-readout": Line(11, f"{GRAPH}, sum read-out, told so", "reduce", lambda: graph("sum", "sum")),
    "graph-sum-readout-told-mean": Line(
        11, f"{GRAPH}, sum read-out, told a mean", "reduce", lambda: graph("sum", "mean")
    ),
    "graph-mean-readout": Line(12, f"{GRAPH}, mean read-out, told so", "reduce", lambda: graph("mean", "mean")),
    "graph-mean-readout-told-sum": Line(
        12, f"{GRAPH}, mean read-out, told a sum", "reduce", lambda: graph("mean", "sum")
    ),
    "first-conv-zero-padding": Line(
        13,
        "the first of two convolutions, zero padding, average pooling",
        "neither",
        lambda: first_convolution("zeros"),
    ),
    "first-conv-circular-padding": Line(
        13,
        "the first of two convolutions, circular padding, average pooling",
        "reduce",
        lambda: first_convolution("circular"),
    ),
    "last-conv-zero-padding": Line(
        14, "the last convolution, zero padding, average pooling", "reduce", lambda: last_convolution("zeros")
    ),
    "last-conv-circular-padding": Line(
        14,
        "the last convolution, circular padding, average pooling",
        "reduce",
        lambda: last_convolution("circular"),
    ),
    "last-conv-per-position-zero-padding": Line(
        15, "the last convolution, zero padding, a loss per pixel", "expand", lambda: per_pixel("zeros")
    ),
    "last-conv-per-position-circular-padding": Line(
        15, "the last convolution, circular padding, a loss per pixel", "expand", lambda: per_pixel("circular")
    ),
}


def errors(case: Case, approximation: str) -> dict[str, float]:
    """Relative Frobenius error of the exact Fisher's approximation of each layer's block, by layer.

    Call it, and make the case, with float64 as torch's default dtype.
    """
    return {layer: relative_error(*blocks) for layer, blocks in pairs(case, approximation).items()}


def pairs(case: Case, approximation: str) -> dict[str, tuple[Tensor, Tensor]]:
    """The exact Fisher's approximation of each layer's block and the exact block, by layer.

    Call it, and make the case, with float64 as torch's default dtype.
    """
    blocks = exact(case)
    return {layer: (block, blocks[layer]) for layer, block in approximate(case, approximation).items()}


def approximate(case: Case, approximation: str) -> dict[str, Tensor]:
    """The exact Fisher's approximation of each layer's block; as `pairs`."""
    optimizer = KFAC(case.model, approximation=approximation, fisher="exact")
    with optimizer.capture(case.positions) as capture:
        capture.backward_fisher(case.model(case.x), case.loss)
    optimizer.step()
    factors = optimizer.factors(reduction="sum")
    out = {}
    for name in case.layers:
        a, b = factors[name]
        assert isinstance(a, Tensor)  # not in blocks: the layers are small
        assert isinstance(b, Tensor)
        out[name] = kfac_blocks(a[-1:, -1:] if case.bias_only else a, b)
    return out


def exact(case: Case) -> dict[str, Tensor]:
    """The exact block of each layer; as `pairs`."""
    out = {}
    for name in case.layers:
        block = ggn_blocks(case.model, case.x, case.loss, name)
        if case.bias_only:  # the last column of the rows, see `ggn`
            rows = case.model.get_parameter(f"{name}.weight").shape[0]
            p = block.shape[-1] // rows
            block = block[:, p - 1 :: p, p - 1 :: p]
        out[name] = block
    return out
