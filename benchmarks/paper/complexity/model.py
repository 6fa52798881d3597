"""The constants of `algoperf_kfac.crossover`, from linear layers (the third: from one convolution); its errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.cost import Load
from algoperf_kfac.crossover import Rates, Work, work_of
from algoperf_kfac.layers import LayerSpec, make_spec
from benchmarks.paper.complexity.layers import CONV2, Layer, Sweep
from benchmarks.paper.complexity.records import Results, key_of
from commands.errors import UserError

FITTED_KIND = "linear"
LEAST = 2e-3  # seconds between expand and reduce: below, starting operations and noise are what is seen
FITTED = 1e-2  # seconds of expand, from which on constants are fitted


def spec_of(layer: Layer) -> LayerSpec:
    """The layer as the library describes it."""
    return make_spec(
        name="layer",
        kind="linear" if layer.kind == "graph" else layer.kind,
        weight="layer.weight",
        bias="layer.bias",
        weight_shape=layer.weight_shape,
        groups=layer.groups,
        in_dim=layer.in_dim - 1,
        out_dim=layer.out_dim,
        config=KFACConfig(max_factor_dim=2**14),
        kernel=layer.kernel**layer.dims,
    )


def load_of(layer: Layer) -> Load:
    """What it sees."""
    return Load(
        layer.examples,
        layer.positions,
        layer.rows,
        layer.input_elements,
        layer.output_elements,
        layer.kernel,
        in_segments=layer.kind == "graph",
    )


def work(layer: Layer, approximation: str) -> Work:
    """Of a statistics step."""
    return work_of(spec_of(layer), load_of(layer), reduces=approximation == "reduce")


def fit(framework: str, results: Results, layers: Sequence[Layer]) -> Rates:
    """The rates that make the relative errors on linear layers the least, in squares.

    Only layers of which expand takes `FITTED` seconds.

    Raises:
        UserError: there are not enough results.
    """
    rows = []
    for layer in layers:
        result = results.get(key_of(framework, layer))
        if layer.kind != FITTED_KIND or result is None or result["seconds"]["expand"]["both"] < FITTED:
            continue
        for approximation in ("expand", "reduce"):
            seconds, one = result["seconds"][approximation]["both"], work(layer, approximation)
            rows.append((one.flops / seconds, one.bytes / seconds))
    if len(rows) < 4:
        raise UserError(
            f"two linear layers at least have to be measured in {framework} before its constants are known: "
            "run python -m benchmarks.paper complexity"
        )
    each, *_ = np.linalg.lstsq(np.array(rows), np.ones(len(rows)), rcond=None)
    return Rates(1 / float(each[0]), 1 / float(each[1]))


def with_patches(framework: str, results: Results, rates: Rates) -> Rates | None:
    """The same with the third constant, which makes the seconds of expand on `CONV2` right.

    None where that is not measured, or takes no longer than its products.
    """
    result = results.get(key_of(framework, CONV2))
    if result is None:
        return None
    one = work(CONV2, "expand")
    left = result["seconds"]["expand"]["both"] - rates.seconds(dataclasses.replace(one, patch_bytes=0.0))
    return dataclasses.replace(rates, patch_bytes_per_second=one.patch_bytes / left) if left > 0 else None


@dataclasses.dataclass(frozen=True)
class Errors:
    """How far the model is off on some layers.

    Attributes:
        layers: how many there are.
        right: of how many it names the faster approximation.
        large: the relative errors of the seconds that expand takes more than reduce, where these are `LEAST`
            at least; positive where the model says too much.
    """

    layers: int
    right: int
    large: tuple[float, ...]

    @property
    def median(self) -> float | None:
        """Of the absolute errors."""
        return float(np.median(np.abs(self.large))) if self.large else None

    @property
    def worst(self) -> float | None:
        """The largest absolute one, with its sign."""
        return max(self.large, key=abs) if self.large else None

    @property
    def within(self) -> int:
        """How many are at most a quarter off."""
        return sum(abs(error) <= 0.25 for error in self.large)


def errors(framework: str, results: Results, layers: Sequence[Layer], rates: Rates) -> Errors:
    """The model beside what was measured."""
    count = right = 0
    large = []
    for layer in layers:
        result = results.get(key_of(framework, layer))
        if result is None:
            continue
        seconds = result["seconds"]
        expand, reduce = (seconds[approximation]["both"] for approximation in ("expand", "reduce"))
        predicted = rates.seconds(work(layer, "expand")) - rates.seconds(work(layer, "reduce"))
        count += 1
        right += (predicted > 0) == (expand > reduce)
        if abs(expand - reduce) >= LEAST:
            large.append(predicted / (expand - reduce) - 1)
    return Errors(count, right, tuple(large))


def unseen(sweeps: Sequence[Sweep]) -> dict[str, list[Layer]]:
    """By name of their sweeps, the layers that the constants are not fitted to, each in the first one it is in."""
    found: dict[str, list[Layer]] = {}
    seen: set[Layer] = set()
    for sweep in sweeps:
        new = [layer for layer in sweep.layers.values() if layer.kind != FITTED_KIND and layer not in seen]
        seen.update(new)
        if new:
            found.setdefault(sweep.name, []).extend(new)
    return found
