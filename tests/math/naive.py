"""Loops in place of unfolding: which input entry each weight multiplies at each output position."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd


def input_rows(layer: nn.Module, x: Tensor, out_size: Sequence[int]) -> Tensor:
    """(N, C, *in_size) -> (N, R, groups, P): what the layer's weight matrix is multiplied with."""
    if isinstance(layer, nn.Linear):
        return x.reshape(len(x), -1, 1, x.shape[-1])
    kernel = layer.kernel_size
    rows = x.new_zeros(len(x), len(list(_grid(out_size))), x.shape[1], len(list(_grid(kernel))))
    for (r, p), (k, i) in itertools.product(enumerate(_grid(out_size)), enumerate(_grid(kernel))):
        h = [_source(layer, dim, p[dim], i[dim], x.shape[2 + dim]) for dim in range(len(kernel))]
        if None not in h:
            rows[:, r, :, k] = x[(slice(None), slice(None), *h)]
    return rows.reshape(*rows.shape[:2], layer.groups, -1)


def _grid(sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*map(range, sizes))


def _source(layer: nn.Module, dim: int, p: int, i: int, size: int) -> int | None:
    """The input index that kernel offset `i` reads for output `p`; None where it reads a zero."""
    stride, dilation, padding = layer.stride[dim], layer.dilation[dim], layer.padding
    if isinstance(layer, _ConvTransposeNd):
        h, rest = divmod(p + padding[dim] - dilation * i, stride)
        return h if rest == 0 and 0 <= h < size else None
    if isinstance(padding, str):
        front = dilation * (layer.kernel_size[dim] - 1) // 2 if padding == "same" else 0
    else:
        front = padding[dim]
    h = stride * p + dilation * i - front
    if 0 <= h < size:
        return h
    if layer.padding_mode == "circular":
        return h % size
    if layer.padding_mode == "replicate":
        return 0 if h < 0 else size - 1
    if layer.padding_mode == "reflect":
        return -h if h < 0 else 2 * (size - 1) - h
    return None


def output_rows(layer: nn.Module, grad: Tensor) -> Tensor:
    """(N, C_out, *out_size), or (N, ..., P_out) for linear layers -> (N, R, groups, P_out)."""
    if isinstance(layer, nn.Linear):
        return grad.reshape(len(grad), -1, 1, grad.shape[-1])
    return grad.flatten(2).unflatten(1, (layer.groups, -1)).permute(0, 3, 1, 2)


def factors(
    inputs: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    bias: bool,
    approximation: str,
    readout: str = "mean",
) -> tuple[Tensor, Tensor]:
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
    a, b = torch.zeros(groups, p, p), torch.zeros(groups, q, q)
    terms = 0
    for inputs_n, grads_n in zip(inputs, grads, strict=True):
        if not len(inputs_n):
            continue
        for g in range(groups):
            vectors = [torch.cat([row[g], row.new_ones(int(bias))]) for row in inputs_n]
            gradients = [row[g] for row in grads_n]
            if approximation == "reduce":
                count = len(vectors)
                vectors, gradients = [sum(vectors)], [sum(gradients)]
                if readout == "mean":
                    vectors = [vectors[0] / count]
                else:
                    gradients = [gradients[0] / count]
            a[g] += sum(torch.outer(v, v) for v in vectors)
            b[g] += sum(torch.outer(v, v) for v in gradients)
        terms += 1 if approximation == "reduce" else len(inputs_n)
    return a / terms, b
