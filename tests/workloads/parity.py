"""The parameters of the embedded models in both frameworks: JAX trees made of PyTorch's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import torch
from torch import nn


def jax_params(module: nn.Module, template: Any) -> Any:
    """The weights of a PyTorch model as a tree like `template`, the parameters of the JAX model."""
    return from_named(dict(module.named_parameters()), template)


def from_named(named: Mapping[str, torch.Tensor], template: Any) -> Any:
    """Tensors by PyTorch's parameter names as a tree like `template`.

    Raises:
        AssertionError: a tensor has no place in the tree.
    """
    left = _by_gate(named)

    def take(path: Any, leaf: jax.Array) -> np.ndarray:
        *modules, kind = [entry.key for entry in path]
        name = ".".join(re.sub(r"_(\d+)$", r".\1", part) for part in modules)
        value = left.pop(f"{name}.{'bias' if kind == 'bias' else 'weight'}").detach().numpy()
        if kind == "kernel" and value.ndim == 4:
            value = _kernel(value, leaf.shape)
        elif kind == "kernel":
            value = value.T
        assert value.size == leaf.size, f"{name}: {value.shape} does not fill {leaf.shape}"
        return np.ascontiguousarray(value).reshape(leaf.shape)

    tree = jax.tree_util.tree_map_with_path(take, template)
    assert not left, f"JAX has no counterpart of {list(left)}"
    return tree


def _kernel(weight: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(out, in, height, width) as (height, width, in, out).

    A transposed convolution's is (in, out, height, width), told apart by its shape; in flax it is mirrored.
    """
    kernel = weight.transpose(2, 3, 1, 0)
    return kernel if kernel.shape == shape else weight.transpose(2, 3, 0, 1)[::-1, ::-1]


def _by_gate(named: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of LSTMs under the names of flax's: a layer for each gate, on inputs and on hidden states.

    Of PyTorch's two biases that of the hidden states is flax's only one; the other starts at 0 and has the same
    gradient.
    """
    found = {}
    for name, value in named.items():
        path, _, kind = name.rpartition(".")
        match = re.fullmatch(r"(weight|bias)_(i|h)h_l0(_reverse)?", kind)
        if match is None:
            found[name] = value
            continue
        role, side, is_reverse = match.groups()
        if (role, side) != ("bias", "i"):
            for gate, part in zip("ifgo", value.chunk(4), strict=True):
                found[f"{path}.{'backward' if is_reverse else 'forward'}.{side}{gate}.{role}"] = part
    return found
