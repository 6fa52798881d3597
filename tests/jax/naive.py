"""What the factors are made of, recorded in the model itself, and loops in place of everything clever.

The recorder adds a zero perturbation to the output of every weighted operation, so that its gradient is the output
gradient; the library's own way, a tap in the backward pass, is not used.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from algoperf_kfac.jax.geometry import ConvGeometry
from algoperf_kfac.jax.interpreter import Key, Visitor
from algoperf_kfac.jax.operations import Call
from algoperf_kfac.jax.tracing import trace


@dataclasses.dataclass
class Recorded:
    """One weighted operation: its input and output gradient as the primitive has them."""

    call: Call
    x: np.ndarray
    g: np.ndarray

    def input_rows(self) -> np.ndarray:
        """(N, R, groups, P_in)."""
        x = np.transpose(self.x, self.call.in_permutation)
        if self.call.conv is not None:
            return patches(self.call.conv, x)
        leading = len(self.call.leading)
        n = x.shape[0] if leading else 1
        return x.reshape(n, -1, self.call.groups, self.call.view.in_dim)

    def gradient_rows(self) -> np.ndarray:
        """(N, R, groups, P_out)."""
        g = np.transpose(self.g, self.call.out_permutation)
        if self.call.out_slice is not None:
            g = g[..., slice(*self.call.out_slice)]
        if self.call.conv is not None:
            return np.moveaxis(g.reshape(g.shape[0], self.call.groups, self.call.view.out_dim, -1), 3, 1)
        n = g.shape[0] if self.call.leading else 1
        return g.reshape(n, -1, self.call.groups, self.call.view.out_dim)


class _Recorder(Visitor):
    def __init__(self, perturbations: dict[Key, Array] | None) -> None:
        self.perturbations = perturbations
        self.calls: dict[Key, Call] = {}
        self.inputs: dict[Key, Array] = {}
        self.outputs: dict[Key, Any] = {}

    def operation(self, key: Key, call: Call, x: Array, out: Array) -> Array:
        self.calls[key], self.inputs[key] = call, x
        self.outputs[key] = jax.ShapeDtypeStruct(out.shape, out.dtype)
        return out if self.perturbations is None else out + self.perturbations[key]


def record(
    apply_fn: Callable[..., Any], loss_fn: Callable[..., Any], params: Any, *args: Any
) -> dict[str, list[Recorded]]:
    """Weight -> its operations, in order. For models without loops over layers."""
    model, survey = trace(apply_fn, params, args), _Recorder(None)
    model.show(survey)
    keys = list(survey.outputs)
    zeros = [jnp.zeros(s.shape, s.dtype) for s in survey.outputs.values()]

    def loss(perturbations: list[Array]) -> tuple[Array, list[Array]]:
        visitor = _Recorder(dict(zip(keys, perturbations, strict=True)))
        outputs = jax.tree.unflatten(jax.tree.structure(model.outputs), model.run(visitor, params, args))
        return loss_fn(outputs, *args), [visitor.inputs[key] for key in keys]

    gradients, inputs = jax.jit(jax.grad(loss, has_aux=True))(zeros)
    recorded: dict[str, list[Recorded]] = {}
    for key, x, g in zip(keys, inputs, gradients, strict=True):
        call = survey.calls[key]
        recorded.setdefault(call.view.source.name, []).append(Recorded(call, np.asarray(x), np.asarray(g)))
    return recorded


def _grid(sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*map(range, sizes))


def patches(conv: ConvGeometry, x: np.ndarray) -> np.ndarray:
    """(N, C, *in_size) -> (N, R, groups, C / groups x kernel positions), one entry at a time."""
    rows = np.zeros((len(x), int(np.prod(conv.out_size)), x.shape[1], int(np.prod(conv.kernel))))
    for (r, p), (k, i) in itertools.product(enumerate(_grid(conv.out_size)), enumerate(_grid(conv.kernel))):
        h = [_source(conv, dim, p[dim], i[dim]) for dim in range(len(conv.kernel))]
        if None not in h:
            rows[:, r, :, k] = x[(slice(None), slice(None), *h)]
    return rows.reshape(*rows.shape[:2], conv.groups, -1)


def _source(conv: ConvGeometry, dim: int, p: int, i: int) -> int | None:
    """The input index that kernel offset `i` reads for output `p`; None where it reads a zero."""
    place = conv.stride[dim] * p + conv.dilation[dim] * i - conv.padding[dim][0]
    h, rest = divmod(place, conv.in_dilation[dim])
    return h if rest == 0 and 0 <= h < conv.in_size[dim] else None


def factors(
    inputs: Sequence[np.ndarray],
    grads: Sequence[np.ndarray],
    *,
    bias: bool,
    approximation: str,
    readout: str = "mean",
) -> tuple[np.ndarray, np.ndarray]:
    """A and B (groups, P, P) by loops over examples, positions and groups.

    Args:
        inputs: per example the (R_n, groups, P_in) vectors that count.
        grads: per example the (R_n, groups, P_out) gradients of its loss.
        bias: append a homogeneous coordinate.
        approximation: "expand" or "reduce".
        readout: for reduce, whether inputs are averaged and gradients summed ("mean"), or the other way round.
    """
    groups, q = grads[0].shape[1:]
    p = inputs[0].shape[2] + bias
    a, b = np.zeros((groups, p, p)), np.zeros((groups, q, q))
    terms = 0
    for inputs_n, grads_n in zip(inputs, grads, strict=True):
        if not len(inputs_n):
            continue
        for g in range(groups):
            vectors = [np.append(row[g], np.ones(int(bias))) for row in inputs_n]
            gradients = [row[g] for row in grads_n]
            if approximation == "reduce":
                count = len(vectors)
                vectors, gradients = [sum(vectors)], [sum(gradients)]
                if readout == "mean":
                    vectors = [vectors[0] / count]
                else:
                    gradients = [gradients[0] / count]
            a[g] += sum(np.outer(v, v) for v in vectors)
            b[g] += sum(np.outer(v, v) for v in gradients)
        terms += 1 if approximation == "reduce" else len(inputs_n)
    return a / terms, b
