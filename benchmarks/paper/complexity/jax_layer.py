"""What a layer's statistics cost in JAX, through the library's own taps.

The layer is tapped as in a statistics step, and the backward pass run to the sums alone, from a given output
gradient. A program that returns only A holds nothing of B, which XLA takes out, and the other way round. Bytes
are those that XLA sets aside for a program's temporary and returned arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.jax.capture import value_grad_and_statistics
from algoperf_kfac.jax.discovery import discover
from algoperf_kfac.jax.statistics import Statistics
from algoperf_kfac.jax.tapped_model import TappedModel
from algoperf_kfac.jax.tracing import trace
from algoperf_kfac.positions import Positions, as_candidates
from benchmarks.paper.complexity.layers import Layer
from benchmarks.paper.complexity.timing import Timed, medians, whole

Params = dict[str, Array]
FACTORS = ("A", "B")


def measure(layer: Layer, curves: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """See `pytorch_layer.measure`."""
    keys = jax.random.split(jax.random.key(0), 5)
    params = {
        "w": jax.random.normal(keys[0], layer.weight_shape),
        "b": jnp.zeros(layer.outputs),
    }
    x = jax.random.normal(keys[1], layer.input_shape)
    gradient = jax.random.normal(keys[2], layer.output_shape) / layer.examples
    compiled: dict[str, dict[str, Any]] = {}
    for name, fields in curves.items():
        programs = _programs(layer, KFACConfig(**fields), params, x)
        compiled[name] = {
            part: jax.jit(program).lower(params, x, gradient).compile() for part, program in programs.items()
        }
    compiled["plain"] = {"step": jax.jit(_plain(layer)).lower(params, x, gradient).compile()}
    operations = {
        (name, part): _finished(program, params, x, gradient, again=part in FACTORS)
        for name, programs in compiled.items()
        for part, program in programs.items()
    }
    for name, rows in (("product", layer.rows), ("product of N rows", layer.examples)):
        for part, width, key in (("A", layer.in_dim, keys[3]), ("B", layer.out_dim, keys[4])):
            matrix = jax.random.normal(key, (layer.groups, rows, width))
            product = jax.jit(_product).lower(matrix).compile()
            operations[name, part] = _finished(product, matrix, again=part in FACTORS)
    for _ in range(2):
        for operation in operations.values():
            operation()
    found = medians({f"{name}/{part}": operation for (name, part), operation in operations.items()})
    seconds: dict[str, dict[str, float]] = {}
    for name, part in operations:
        seconds.setdefault(name, {})[part] = found[f"{name}/{part}"]["seconds"]
    peaks = {name: {part: _bytes(p) for part, p in programs.items()} for name, programs in compiled.items()}
    return {"seconds": seconds, "bytes": peaks}


def apply_of(layer: Layer) -> Callable[..., Array]:
    """The layer as a function of (params, x)."""

    def apply(params: Params, x: Array, *_: Array) -> Array:
        if not layer.dims:
            return x @ params["w"].T + params["b"]
        weight, edge = params["w"], (layer.kernel - 1) // 2
        transposed = layer.kind == "conv_transpose"
        if transposed:  # outputs first, and the kernel turned round
            assert layer.groups == 1
            weight = jnp.flip(jnp.swapaxes(weight, 0, 1), tuple(range(2, 2 + layer.dims)))
        out = lax.conv_general_dilated(
            x,
            weight,
            window_strides=[1 if transposed else layer.stride] * layer.dims,
            padding=[(edge, edge + layer.stride - 1 if transposed else edge)] * layer.dims,
            lhs_dilation=[layer.stride if transposed else 1] * layer.dims,
            feature_group_count=layer.groups,
        )
        return out + params["b"].reshape(-1, *[1] * layer.dims)

    return apply


def _inner(outputs: Array, _: Array, gradient: Array) -> Array:
    """A loss whose output gradient is the given one."""
    return jnp.vdot(outputs, gradient)


def _plain(layer: Layer) -> Callable[..., Any]:
    apply = apply_of(layer)

    def step(params: Params, x: Array, gradient: Array) -> Any:
        return jax.value_and_grad(lambda p: _inner(apply(p, x), x, gradient))(params)

    return step


def _programs(layer: Layer, config: KFACConfig, params: Params, x: Array) -> dict[str, Callable[..., Any]]:
    apply = apply_of(layer)
    layers = discover(apply, params, x, config=config)
    positions = _positions(layer)

    def statistics(params: Params, x: Array, gradient: Array) -> Statistics:
        traced = trace(apply, params, (x,))
        tapped = TappedModel(traced, layers, as_candidates(positions), rows=config.row_limit)
        _, backward = jax.vjp(lambda sums: tapped.run(params, (x,), sums), tapped.zeros())
        (sums,) = backward([gradient])
        return next(iter(tapped.statistics(sums, 1.0).values()))

    step = value_grad_and_statistics(apply, _inner, layers, config)

    return {
        "A": lambda *args: statistics(*args).a,
        "B": lambda *args: statistics(*args).b,
        "both": lambda *args: (statistics(*args).a, statistics(*args).b),
        "step": lambda p, x, gradient: step(p, x, gradient, positions=positions, loss_normalizer=1.0),
    }


def _positions(layer: Layer) -> Positions | None:
    if layer.kind != "graph":
        return None
    return Positions(segment_ids=jnp.repeat(jnp.arange(layer.examples), layer.size), num_segments=layer.examples)


def _product(matrix: Array) -> Array:
    return jnp.einsum("gmi,gmj->gij", matrix, matrix)


def _finished(program: Callable[..., Any], *arrays: Any, again: bool = False) -> Timed:
    """The program, waited for; with `again` it has run once more just before.

    XLA lets go of a program's memory after it has returned, in the time of what comes next: of a factor it is not
    to be that of a step, or of the other factor's patches, that is timed.
    """

    def run() -> Any:
        return jax.block_until_ready(program(*arrays))

    timed = whole(run)

    def twice() -> Mapping[str, float]:
        run()
        return timed()

    return twice if again else timed


def _bytes(program: Any) -> float:
    memory = program.memory_analysis()
    return float(memory.temp_size_in_bytes + memory.output_size_in_bytes)
