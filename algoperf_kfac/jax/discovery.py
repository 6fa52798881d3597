"""Which layers of a JAX model K-FAC covers, and why it does not cover the other parameters."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import ClosedJaxpr

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.jax.interpreter import Interpreter, Key, Lookup, Visitor
from algoperf_kfac.jax.operations import Call, Source, WeightView
from algoperf_kfac.layers import Coverage, FallbackSpec, LayerSpec, split_blocks


@dataclasses.dataclass(frozen=True)
class CoveredLayer:
    """A layer with what turns its parameters into matrices.

    Attributes:
        spec: the layer.
        view: its weight's matrices.
        bias_shape: as the bias is stored, None without one.
        stack: number of stacked layers that one parameter holds (`nn.scan` over layers), 1 if none.
        calls: leading dimensions of the input at each call, of the example arguments.
    """

    spec: LayerSpec
    view: WeightView
    bias_shape: tuple[int, ...] | None
    stack: int
    calls: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Layers:
    """What K-FAC knows of a model; static, made once by `discover`.

    Attributes:
        covered: the covered layers by name, in the order of their first call.
        fallbacks: every other parameter.
        shapes: shape and dtype of every parameter by name.
    """

    covered: dict[str, CoveredLayer]
    fallbacks: tuple[FallbackSpec, ...]
    shapes: dict[str, tuple[tuple[int, ...], Any]]

    def coverage(self) -> Coverage:
        """The covered layers, and every other parameter with the reason why it is not covered."""
        return Coverage(tuple(layer.spec for layer in self.covered.values()), self.fallbacks)


def named_leaves(params: Any) -> dict[str, Any]:
    """The leaves of a parameter tree by path, e.g. "encoder/Dense_0/kernel"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {"/".join(_key(k) for k in path) or "params": leaf for path, leaf in leaves}


def _key(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


class Survey(Visitor):
    """Notes what reads the parameters."""

    def __init__(self) -> None:
        self.calls: dict[str, dict[Key, Call]] = {}
        self.biases: dict[Key, Source] = {}
        self.lookups: dict[str, dict[Key, Lookup]] = {}
        self.other_uses: dict[str, str] = {}

    def operation(self, key: Key, call: Call, x: Array, out: Array) -> Array:
        self.calls.setdefault(call.view.source.name, {})[key] = call
        return out

    def lookup(self, key: Key, lookup: Lookup, rows: Array, out: Array) -> Array:
        self.lookups.setdefault(lookup.source.name, {})[key] = lookup
        return out

    def bias(self, key: Key, call: Call, source: Source) -> None:
        self.biases[key] = source

    def other_use(self, key: Key, source: Source, what: str) -> None:
        self.other_uses.setdefault(source.name, what)


def trace(apply_fn: Callable[..., Any], params: Any, args: Sequence[Any]) -> tuple[ClosedJaxpr, Any]:
    """The model as primitives, and the shapes of what it returns.

    Raises:
        TypeError: if `apply_fn` is a module instead of a function of parameters.
    """
    if not callable(apply_fn) or _is_module(apply_fn):
        raise TypeError(
            f"apply_fn must be a function of (params, *args), got {type(apply_fn).__name__}: for a flax.linen "
            "module pass `lambda params, x: module.apply({'params': params}, x)`, for others (nnx, equinox) split "
            "the module into parameters and a function first"
        )
    return jax.make_jaxpr(apply_fn, return_shape=True)(params, *args)


def _is_module(apply_fn: Any) -> bool:
    """Whether it is a module of flax (linen or nnx), equinox or haiku; some can be called like a function."""
    libraries = (sys.modules.get(name) for name in ("flax.linen", "flax.nnx", "equinox", "haiku"))
    modules = tuple(library.Module for library in libraries if library is not None)
    return hasattr(apply_fn, "apply") or isinstance(apply_fn, modules)


def survey(closed: ClosedJaxpr, params: Any, args: Sequence[Any]) -> Survey:
    """Go through the model once, without computing anything."""
    notes = Survey()
    leaves = jax.tree.leaves((params, *args))
    tags = sources(params, args)
    jax.eval_shape(lambda *values: Interpreter(notes).run(closed, values, tags), *leaves)
    return notes


def sources(params: Any, args: Sequence[Any]) -> list[Source | None]:
    """Which of the flat arguments are parameters."""
    tags: list[Source | None] = [
        Source(name, tuple(leaf.shape)) if jnp.issubdtype(leaf.dtype, jnp.floating) else None
        for name, leaf in named_leaves(params).items()
    ]
    return tags + [None] * len(jax.tree.leaves(args))


def check_dtypes(params: Any) -> None:
    """Raises ValueError if single and double precision are mixed, or a leaf is no array."""
    seen: dict[Any, str] = {}
    for name, leaf in named_leaves(params).items():
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            raise ValueError(f"parameter {name} is no array but {type(leaf).__name__}")
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            seen.setdefault(jnp.dtype(leaf.dtype), name)
    wide = jnp.dtype("float64")
    if wide in seen and len(seen) > 1:
        other = next(name for dtype, name in seen.items() if dtype != wide)
        raise ValueError(
            f"parameter {seen[wide]} is float64 and parameter {other} is not: cast all parameters to one precision"
        )


def discover(
    apply_fn: Callable[..., Any],
    params: Any,
    *args: Any,
    config: KFACConfig,
    exclude: Iterable[str] = (),
) -> Layers:
    """Trace the model once; nothing is computed, and arguments may be `jax.ShapeDtypeStruct`s.

    Args:
        apply_fn: function of (params, *args).
        params: parameter tree.
        args: example arguments, of the shapes of a training step.
        config: decides the approximation and the block sizes.
        exclude: patterns (fnmatch) of layer or parameter names to leave to the fallback.

    Raises:
        TypeError: if `apply_fn` is a module.
        ValueError: for parameters of mixed precision, no parameters, or a pattern that matches nothing.
    """
    leaves = named_leaves(params)
    if not leaves:
        raise ValueError("params holds no parameter")
    check_dtypes(params)
    closed, _ = trace(apply_fn, params, args)
    notes = survey(closed, params, args)
    shapes = {name: (tuple(leaf.shape), jnp.dtype(leaf.dtype)) for name, leaf in leaves.items()}
    patterns = list(exclude)
    paths = {*shapes, *(name.rpartition("/")[0] for name in shapes)}
    for pattern in patterns:
        if not fnmatch.filter(paths, pattern):
            raise ValueError(f"exclude: no layer or parameter matches {pattern!r}")

    covered: dict[str, CoveredLayer] = {}
    reasons: dict[str, str] = {}
    biases = _biases(notes)
    taken: set[str] = set()
    for weight, calls in notes.calls.items():
        layer, reason = _cover(weight, calls, notes, biases, shapes, config, patterns, covered)
        if layer is None:
            reasons[weight] = reason
        else:
            covered[layer.spec.name] = layer
            taken |= {layer.spec.weight, layer.spec.bias or layer.spec.weight}
    fallbacks = [
        FallbackSpec(name, shape, reasons.get(name) or _reason(name, shape, dtype, notes, patterns))
        for name, (shape, dtype) in shapes.items()
        if name not in taken
    ]
    return Layers(covered, tuple(fallbacks), shapes)


def _biases(notes: Survey) -> dict[str, str]:
    """Weight -> its bias, where every call adds the same one and nothing else reads it."""
    owners: dict[str, set[str]] = {}
    of_weight: dict[str, set[str | None]] = {}
    for weight, calls in notes.calls.items():
        for key in calls:
            source = notes.biases.get(key)
            of_weight.setdefault(weight, set()).add(None if source is None else source.name)
            if source is not None:
                owners.setdefault(source.name, set()).add(weight)
    return {
        weight: name
        for weight, names in of_weight.items()
        if len(names) == 1 and (name := next(iter(names))) is not None
        if len(owners[name]) == 1 and name not in notes.other_uses and name not in notes.calls
    }


def _cover(
    weight: str,
    calls: dict[Key, Call],
    notes: Survey,
    biases: dict[str, str],
    shapes: dict[str, tuple[tuple[int, ...], Any]],
    config: KFACConfig,
    exclude: list[str],
    covered: dict[str, CoveredLayer],
) -> tuple[CoveredLayer | None, str]:
    """The covered layer of a weight, or the reason why it is not covered."""
    parent = weight.rpartition("/")[0] or weight
    name = weight if parent in covered else parent
    if _matches(weight, exclude):
        return None, "excluded by the user"
    if weight in notes.other_uses:
        return None, f"tied weight: {notes.other_uses[weight]} reads it too, and K-FAC would miss that use"
    first = next(iter(calls.values()))
    if any(call.view != first.view or call.kind != first.kind for call in calls.values()):
        return None, "tied weight: its calls read it in different layouts"
    if not all(shape for shape in shapes[weight][0]):
        return None, "empty"
    view = first.view
    tied = weight in notes.lookups
    if tied and (view.groups != 1 or (view.out_dim, view.in_dim) != shapes[weight][0]):
        return None, "tied weight: an embedding reads it too, in another layout than that of an output layer"
    bias = None if tied else biases.get(weight)
    if bias is not None and _matches(bias, exclude):
        bias = None
    blocks = [
        split_blocks(dim, config.max_factor_dim, config.large_factor)
        for dim in (view.in_dim + (bias is not None), view.out_dim)
    ]
    if tied:  # see tied.py
        blocks[1] = ()
    if not blocks[0] and not blocks[1]:
        return None, f"both factors above max_factor_dim={config.max_factor_dim}"
    kind = "embedding" if tied else first.kind
    spec = LayerSpec(
        name=name,
        kind=kind,
        weight=weight,
        bias=bias,
        weight_shape=shapes[weight][0],
        groups=view.groups,
        in_dim=view.in_dim,
        out_dim=view.out_dim,
        approximation=config.approximation_for(kind),
        in_blocks=blocks[0],
        out_blocks=blocks[1],
    )
    stack = math.prod(view.source.apply(jnp.zeros(shapes[weight][0], jnp.int8)).shape[: view.source.stack])
    bias_shape = None if bias is None else shapes[bias][0]
    return CoveredLayer(spec, view, bias_shape, stack, tuple(call.leading for call in calls.values())), ""


def _matches(name: str, patterns: list[str]) -> bool:
    paths = [name, name.rpartition("/")[0]]
    return any(fnmatch.fnmatchcase(path, pattern) for path in paths for pattern in patterns)


def _reason(name: str, shape: tuple[int, ...], dtype: Any, notes: Survey, exclude: list[str]) -> str:
    """Why a parameter without a weighted operation is not covered."""
    if _matches(name, exclude):
        return "excluded by the user"
    if not jnp.issubdtype(dtype, jnp.floating):
        return f"not differentiable ({jnp.dtype(dtype).name})"
    if name in notes.lookups:
        return "embedding: its inputs are one-hot, A would be a diagonal of counts"
    if any(source.name == name for source in notes.biases.values()):
        return "bias that several layers share, or of a layer that is not covered"
    if name in notes.other_uses:
        return f"read by {notes.other_uses[name]}, which has no rule"
    if len(shape) <= 1:
        return "scale or bias outside a layer with a rule (normalisation, query scaling)"
    return "no operation with a rule reads it"
