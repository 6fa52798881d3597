"""What K-FAC knows of a model: its layers, and the parameters they must come with."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import DTypeLike

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.errors import listed
from algoperf_kfac.jax.mistakes import Mistakes
from algoperf_kfac.jax.operations import WeightView
from algoperf_kfac.jax.sources import Source
from algoperf_kfac.jax.tracing import Leaf, named_leaves
from algoperf_kfac.jax.trained import dtype_of
from algoperf_kfac.jax.types import Sizes, Tree
from algoperf_kfac.layers import Coverage, FallbackSpec, LayerSpec


@dataclasses.dataclass(frozen=True)
class CoveredLayer:
    """A layer with what turns its parameters into matrices.

    Attributes:
        spec: the layer.
        view: its weight's matrices.
        bias: how the bias is stored, None without one; see `operations.bias_of`.
        slices: number of layers that one parameter holds, a slice for each (`nn.scan` over layers); 1 if none.
        calls: leading dimensions of the input at each call, of the example arguments.
        examples: of each use that counts, the number of leading dimensions, and which of them runs over examples.
        dtype: of its factors, at least float32.
        rounding: the coarsest eps among the dtypes of its inputs and outputs.
        conditional: whether only branches (`lax.cond`) call it, so that a step may go by without it.
    """

    spec: LayerSpec
    view: WeightView
    bias: Source | None
    slices: int
    calls: tuple[Sizes, ...]
    examples: tuple[tuple[int, int], ...]
    dtype: DTypeLike
    rounding: float
    conditional: bool = False

    def noise_level(self, config: KFACConfig) -> float:
        """See `KFACConfig.noise_level`; rounding of the factors themselves is part of it."""
        return config.noise_level(max(self.rounding, float(jnp.finfo(self.dtype).eps)))

    @property
    def bias_shape(self) -> Sizes | None:
        """The shape of the bias as its entries follow the output features, None without one."""
        return None if self.bias is None else self.bias.seen_shape

    @property
    def scans(self) -> int:
        """How many leading dimensions of its parameters run over layers; 0 where they stand elsewhere."""
        weight, own = self.view.source, [s for s in (self.view.source, self.bias) if s is not None]
        alike = all(s.keeps_slices and s.shape[: weight.scans] == weight.shape[: weight.scans] for s in own)
        return weight.scans if alike else 0

    def matrix(self, weight: Array, bias: Array | None) -> Array:
        """Parameters, gradients or momenta as (groups, P_out, P_in [+ 1]) in the dtype of the factors."""
        wide = None if bias is None or self.bias is None else self.bias.apply(bias.astype(self.dtype))
        return self.view.to_matrix(weight.astype(self.dtype), wide)

    def parameters(self, matrix: Array) -> tuple[Array, Array | None]:
        """The inverse of `matrix`: weight and bias in the shapes the model stores."""
        weight, bias = self.view.from_matrix(matrix, self.bias_shape)
        return weight, None if bias is None or self.bias is None else self.bias.invert(bias)


@dataclasses.dataclass(frozen=True)
class Layers:
    """The layers of a model; static, made once by `discover`. Nothing changes but what was said.

    Attributes:
        covered: the covered layers by name, in the order of their first call.
        fallbacks: every other parameter.
        shapes: shape and dtype of every parameter by name.
        mistakes: what warnings were given so far by optimizers of these layers, which optax may make anew at each
            trace (`optax.inject_hyperparams`).
    """

    covered: dict[str, CoveredLayer]
    fallbacks: tuple[FallbackSpec, ...]
    shapes: dict[str, tuple[Sizes, jnp.dtype]]
    mistakes: Mistakes = dataclasses.field(default_factory=Mistakes, compare=False, repr=False)

    def coverage(self) -> Coverage:
        """The covered layers, and every other parameter with the reason why it is not covered."""
        return Coverage(tuple(layer.spec for layer in self.covered.values()), self.fallbacks)

    def only(self, names: Collection[str]) -> Layers:
        """The same with some of the covered layers only."""
        return dataclasses.replace(self, covered={n: layer for n, layer in self.covered.items() if n in names})

    def parameters_of(self, names: Collection[str]) -> set[str]:
        """The parameters of some of the covered layers, by name."""
        specs = [layer.spec for name, layer in self.covered.items() if name in names]
        return {name for spec in specs for name in (spec.weight, spec.bias) if name is not None}

    def without_second_moment(self, config: KFACConfig) -> set[str]:
        """The parameters, by name, whose NadamW direction nothing needs: covered ones, by their length's rule."""
        return self.parameters_of(self.covered) if config.length_rule == "rms" else set()

    def within(self, params: Tree) -> Layers:
        """The layers whose parameters are in a tree, which may be masked (`optax.masked`, `optax.multi_transform`).

        Raises:
            ValueError: naming a layer of whose weight and bias one is masked.
        """
        present, here = named_leaves(params).keys(), []
        for name, layer in self.covered.items():
            spec = layer.spec
            if spec.weight not in present:
                continue
            if spec.bias is not None and spec.bias not in present:
                raise ValueError(
                    f"parameter {spec.bias} is masked and {spec.weight} of the same layer is not: mask both, or "
                    f"make K-FAC with exclude=[{spec.bias!r}]"
                )
            here.append(name)
        return self if len(here) == len(self.covered) else self.only(here)


def paths(name: str) -> tuple[str, str]:
    """A parameter's name, and that of the layer it belongs to."""
    return name, name.rpartition("/")[0]


def check_params(layers: Layers, params: Tree) -> None:
    """Raises ValueError, naming the parameter, unless `params` has the leaves of `layers`."""
    leaves = named_leaves(params)
    check_dtypes(leaves)
    masked = [f"{name}/" for name in named_leaves(params, is_leaf=_is_masked) if name not in leaves]
    missing = {name for name in layers.shapes if not f"{name}/".startswith(tuple(masked))}
    if missing and leaves.keys().isdisjoint(layers.shapes):
        raise ValueError(
            f"params is not the tree that K-FAC was made with: it has {listed(leaves) or 'no leaf'}, and none of "
            f"{listed(layers.shapes)}. Under optax.flatten, which hands over one vector, no layer can be told: "
            "leave it out. In place of optax.tree_map_params take jax.tree_util.tree_map_with_path: moments have "
            "their parameter's path within mu and nu"
        )
    for name in sorted(missing ^ leaves.keys()):
        what = "missing" if name in layers.shapes else "unknown: K-FAC was made without it"
        raise ValueError(f"parameter {name} is {what}")
    for name, leaf in leaves.items():
        shape, dtype = layers.shapes[name]
        if (tuple(leaf.shape), dtype_of(leaf)) != (shape, dtype):
            raise ValueError(
                f"parameter {name} has shape {tuple(leaf.shape)} and dtype {dtype_of(leaf)}; when K-FAC was made "
                f"it had {shape} and {dtype.name}"
            )


def _is_masked(node: object) -> bool:
    return isinstance(node, optax.MaskedNode)


def check_dtypes(leaves: Mapping[str, Leaf]) -> None:
    """Raises ValueError if single and double precision are mixed, or a leaf is nothing that can be trained.

    Whole numbers are no obstacle: they stay as they are.
    """
    seen: dict[jnp.dtype, str] = {}
    for name, leaf in leaves.items():
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            remedy = (
                f"make it one, jnp.asarray({leaf!r})"
                if isinstance(leaf, int | float | complex)
                else "split what is trained from the rest (params, static = equinox.partition(model, "
                "equinox.is_inexact_array), or nnx.split)"
            )
            raise ValueError(f"parameter {name} is no array but {type(leaf).__name__}: {remedy}")
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise ValueError(
                f"parameter {name} is a random key: hand it to apply_fn as an argument, not among the parameters"
            )
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            seen.setdefault(dtype_of(leaf), name)
    wide = jnp.dtype("float64")
    if wide in seen and len(seen) > 1:
        other = next(name for dtype, name in seen.items() if dtype != wide)
        raise ValueError(
            f"parameter {seen[wide]} is float64 and parameter {other} is not: cast all parameters to one precision"
        )


def check_real(leaves: Mapping[str, Leaf]) -> None:
    """Raises ValueError, naming it, for a complex parameter: NadamW and K-FAC are for real ones."""
    for name, leaf in leaves.items():
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise ValueError(
                f"parameter {name} is complex: train its real and imaginary parts as two parameters "
                "(real + 1j * imaginary in the model), or exclude it and leave it to another optimizer "
                "(optax.multi_transform)"
            )


def check_known(layers: Layers, names: set[str]) -> None:
    """Raises ValueError, naming the layer, unless statistics of `names` are those of all covered layers."""
    for name in sorted(layers.covered.keys() ^ names):
        what = "missing" if name in layers.covered else "of a layer that K-FAC does not know"
        raise ValueError(f"statistics of {name} are {what}: they must come from the same Layers")


def put_in(tree: Tree, other: Tree, names: Collection[str]) -> Tree:
    """A tree with some leaves, by the names of parameters, taken from another one."""
    if not names:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    given = zip(named_leaves(tree), leaves, jax.tree.leaves(other), strict=True)
    return jax.tree.unflatten(structure, [new if name in names else old for name, old, new in given])
