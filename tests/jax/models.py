"""Small models of one kind of layer, and the check that the library sees in them what their loops do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from algoperf_kfac.jax import KFAC
from tests.jax import naive
from tests.jax.support import applier, assert_equal, initialise, normal, observe

Apply = Callable[..., Any]


def wavy(outputs: Any, *args: Any) -> Array:
    """A loss whose gradient differs in every output."""
    return sum(jnp.sin(f + jnp.arange(f.size).reshape(f.shape)).sum() for f in jax.tree.leaves(outputs))


def of(module: nn.Module, *args: Any) -> tuple[Apply, Any, tuple[Any, ...]]:
    """A module's function, parameters and arguments."""
    return applier(module), initialise(module, *args), args


class Stack(nn.Module):
    """Modules one after the other."""

    layers: tuple[Any, ...]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for layer in self.layers:
            x = layer(x)
        return x


def stack(*layers: Any, x: Array) -> tuple[Apply, Any, tuple[Any, ...]]:
    return of(Stack(layers), x)


def conv(features: int, kernel: tuple[int, ...], *size: int, **options: Any) -> tuple[Apply, Any, tuple[Any, ...]]:
    return of(nn.Conv(features, kernel, **options), normal(1, 3, *size))


def transposed(features: int, kernel: tuple[int, ...], *size: int, **options: Any) -> Any:
    return of(nn.ConvTranspose(features, kernel, **options), normal(1, 3, *size))


def raw(function: Apply, *args: Any, **shapes: tuple[int, ...]) -> tuple[Apply, Any, tuple[Any, ...]]:
    """A function of parameters by name."""
    return function, {name: normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}, args


def check(apply: Apply, params: Any, args: tuple[Any, ...], rtol: float = 1e-10) -> KFAC:
    """Pairs of inputs and output gradients make the gradient, and the library's factors are those of the pairs."""
    recorded = naive.record(apply, wavy, params, *args)
    gradient = jax.tree.leaves(jax.jit(jax.grad(lambda p: wavy(apply(p, *args))))(params))
    for approximation in ("expand", "reduce"):
        optimizer = KFAC(apply, wavy, params, *args, approximation=approximation)
        number = {name: i for i, name in enumerate(optimizer.layers.shapes)}
        got, pairs = observe(optimizer, params, *args, loss_normalizer=1.0)
        for ours, theirs in zip(jax.tree.leaves(got), gradient, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=1e-12)
        assert pairs.keys() == optimizer.layers.covered.keys()
        for name, layer in optimizer.layers.covered.items():
            spec, calls = layer.spec, recorded[layer.spec.weight]
            inputs = np.concatenate([c.input_rows() for c in calls], 1)
            grads = np.concatenate([c.gradient_rows() for c in calls], 1)
            weight = gradient[number[spec.weight]]
            bias = None if spec.bias is None else gradient[number[spec.bias]]
            expected = np.einsum("nrgo,nrgi->goi", grads, inputs)
            if bias is not None:
                expected = np.concatenate([expected, grads.sum((0, 1))[..., None]], 2)
            matrix = layer.view.to_matrix(weight, bias)
            np.testing.assert_allclose(matrix, expected, rtol=0, atol=rtol * np.abs(expected).max())
            back = layer.view.from_matrix(matrix, layer.bias_shape)
            np.testing.assert_array_equal(back[0], weight)
            assert bias is None or np.array_equal(back[1], bias)
            want = naive.factors(inputs, grads, bias=bias is not None, approximation=approximation)
            assert_equal(pairs[name], want, rtol)
    return optimizer
