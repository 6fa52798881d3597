"""The layers that are measured, and along which axes they grow. No framework."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from commands.errors import UserError

KINDS = ("linear", "graph", "conv", "conv_transpose")
FRAMEWORKS = ("pytorch", "jax")


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer with a bias, and the data it sees.

    Attributes:
        kind: "linear", "graph" (linear, the nodes of all graphs in one dimension), "conv" or "conv_transpose".
        examples: N; graphs of a batch.
        size: positions of an example (linear, graph), or the input's extent in each spatial dimension.
        inputs: features or channels.
        outputs: the same of the output.
        dims: spatial dimensions of a convolution.
        kernel: its extent in each; odd, padded so that the output has the input's extent but for the stride.
        stride: of it.
        groups: of its channels.
    """

    kind: str
    examples: int
    size: int
    inputs: int
    outputs: int
    dims: int = 0
    kernel: int = 1
    stride: int = 1
    groups: int = 1

    @property
    def out_size(self) -> int:
        """The output's extent in each spatial dimension."""
        return self.size * self.stride if self.kind == "conv_transpose" else -(-self.size // self.stride)

    @property
    def positions(self) -> int:
        """R."""
        return self.out_size**self.dims if self.dims else self.size

    @property
    def rows(self) -> int:
        """N R."""
        return self.examples * self.positions

    @property
    def in_dim(self) -> int:
        """Of A, per group: P_in with the bias."""
        return self.inputs // self.groups * self.kernel**self.dims + 1

    @property
    def out_dim(self) -> int:
        """Of B, per group: P_out."""
        return self.outputs // self.groups

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of its data."""
        if self.kind == "graph":
            return (self.rows, self.inputs)
        if self.kind == "linear":
            return (self.examples, self.size, self.inputs)
        return (self.examples, self.inputs, *[self.size] * self.dims)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Of its outputs."""
        if not self.dims:
            return (*self.input_shape[:-1], self.outputs)
        return (self.examples, self.outputs, *[self.out_size] * self.dims)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """As PyTorch stores it."""
        if not self.dims:
            return (self.outputs, self.inputs)
        kernel = [self.kernel] * self.dims
        if self.kind == "conv_transpose":
            return (self.inputs, self.outputs // self.groups, *kernel)
        return (self.outputs, self.inputs // self.groups, *kernel)

    @property
    def input_elements(self) -> int:
        """Entries of its data."""
        return math.prod(self.input_shape)

    @property
    def output_elements(self) -> int:
        """Entries of its outputs."""
        return math.prod(self.output_shape)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Layers that differ in one size.

    Attributes:
        name: of the kind of layer, for people.
        axis: what grows: "R", "N", "P" or "k".
        layers: by its value, in order.
    """

    name: str
    axis: str
    layers: Mapping[int, Layer]

    @property
    def key(self) -> tuple[str, str]:
        """What tells sweeps apart."""
        return self.name, self.axis


LINEAR = Layer("linear", 16, 64, 256, 256)
NARROW = Layer("linear", 256, 256, 64, 64)  # little to multiply, much to sum
SINGLE = Layer("linear", 4096, 1, 256, 256)  # nothing is shared: both are the same
GRAPH = Layer("graph", 16, 64, 256, 256)
CONV1 = Layer("conv", 8, 256, 64, 64, dims=1, kernel=5)
CONV2 = Layer("conv", 16, 16, 32, 32, dims=2, kernel=3)
CONV3 = Layer("conv", 4, 8, 16, 16, dims=3, kernel=3)
STRIDED = dataclasses.replace(CONV2, stride=2)
GROUPED = Layer("conv", 16, 16, 64, 64, dims=2, kernel=3, groups=4)
DEPTHWISE = Layer("conv", 16, 16, 64, 64, dims=2, kernel=3, groups=64)
TRANSPOSED = Layer("conv_transpose", 16, 16, 32, 32, dims=2, kernel=3, stride=2)


def _positions(layer: Layer, size: int) -> Layer:
    return dataclasses.replace(layer, size=size)


def _examples(layer: Layer, number: int) -> Layer:
    return dataclasses.replace(layer, examples=number)


def _width(layer: Layer, width: int) -> Layer:
    return dataclasses.replace(layer, inputs=width, outputs=width)


def _kernel(layer: Layer, kernel: int) -> Layer:
    return dataclasses.replace(layer, kernel=kernel)


def _sweep(name: str, axis: str, base: Layer, change: Callable[[Layer, int], Layer], *sizes: int) -> Sweep:
    changed = [change(base, size) for size in sizes]
    values = [layer.positions for layer in changed] if axis == "R" else sizes
    return Sweep(name, axis, dict(zip(values, changed, strict=True)))


# Every size is a few times the one before; where two sweeps share a layer, it is measured once.
GRID = (
    _sweep("linear", "R", LINEAR, _positions, 1, 4, 16, 64, 256, 1024, 4096),
    _sweep("linear", "N", LINEAR, _examples, 4, 16, 64, 256, 1024),
    _sweep("linear", "P", LINEAR, _width, 64, 128, 256, 512, 1024),
    _sweep("narrow linear", "R", NARROW, _positions, 256, 512, 1024, 2048),
    _sweep("narrow linear", "N", NARROW, _examples, 64, 256, 1024),
    _sweep("unshared linear", "P", SINGLE, _width, 128, 256, 512, 1024),
    _sweep("graph", "R", GRAPH, _positions, 4, 16, 64, 256, 1024),
    _sweep("1-d convolution", "R", CONV1, _positions, 16, 64, 256, 1024, 4096),
    _sweep("1-d convolution", "k", CONV1, _kernel, 1, 5, 9, 17),
    _sweep("2-d convolution", "R", CONV2, _positions, 4, 8, 16, 32, 64),
    _sweep("2-d convolution", "N", CONV2, _examples, 4, 16, 64, 128),
    _sweep("2-d convolution", "P", CONV2, _width, 8, 16, 32, 64),
    _sweep("2-d convolution", "k", CONV2, _kernel, 1, 3, 5, 7),
    _sweep("3-d convolution", "R", CONV3, _positions, 4, 8, 16),
    _sweep("strided convolution", "R", STRIDED, _positions, 8, 16, 32, 64),
    _sweep("grouped convolution (4)", "R", GROUPED, _positions, 8, 16, 32),
    _sweep("depthwise convolution", "R", DEPTHWISE, _positions, 8, 16, 32),
    _sweep("transposed convolution", "R", TRANSPOSED, _positions, 4, 8, 16),
)
QUICK = (
    _sweep("linear", "R", LINEAR, _positions, 1, 16, 256),
    _sweep("2-d convolution", "R", CONV2, _positions, 4, 8, 16),
)


def chosen(names: str | None, *, quick: bool) -> tuple[Sweep, ...]:
    """The sweeps of these kinds of layers.

    Args:
        names: separated by commas; None for all.
        quick: whether to take the small grid.

    Raises:
        UserError: there is no sweep of that name.
    """
    grid = QUICK if quick else GRID
    if names is None:
        return grid
    known = list(dict.fromkeys(sweep.name for sweep in grid))
    wanted = names.split(",")
    for name in wanted:
        if name not in known:
            raise UserError(f"There is no kind of layer '{name}' here. Known: {', '.join(known)}.")
    return tuple(sweep for sweep in grid if sweep.name in wanted)


def layers_of(sweeps: tuple[Sweep, ...]) -> list[Layer]:
    """All layers of some sweeps, each once, the cheapest first."""
    layers = dict.fromkeys(layer for sweep in sweeps for layer in sweep.layers.values())
    return sorted(layers, key=lambda layer: layer.rows * layer.groups * (layer.in_dim**2 + layer.out_dim**2))


def as_dict(layer: Layer) -> dict[str, Any]:
    """What is kept of it."""
    return dataclasses.asdict(layer)
