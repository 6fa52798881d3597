"""A digest of a run's parameters, model state and optimizer state."""

from __future__ import annotations

import dataclasses
import hashlib

from submissions.common.api import Tree


def digest(*trees: Tree) -> str:
    """Of trees of containers, tensors, arrays and plain values, bit for bit."""
    hasher = hashlib.sha256()
    for tree in trees:
        _feed(hasher, tree)
    return hasher.hexdigest()


def _feed(hasher: hashlib._Hash, tree: Tree) -> None:
    """Everything in a tree of containers, tensors, arrays and plain values.

    None counts as an empty dictionary: flax gives back one for the other (the model state of imagenet_vit).
    """
    if tree is None:
        return
    if isinstance(tree, dict):
        for key in sorted(tree, key=str):
            hasher.update(str(key).encode())
            _feed(hasher, tree[key])
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for field in dataclasses.fields(tree):
            hasher.update(field.name.encode())
            _feed(hasher, getattr(tree, field.name))
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            _feed(hasher, item)
    elif hasattr(tree, "detach"):
        import torch

        hasher.update(str((tree.dtype, tuple(tree.shape))).encode())
        hasher.update(tree.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif hasattr(tree, "shape"):
        import numpy as np

        array = np.ascontiguousarray(tree)
        hasher.update(str((str(array.dtype), array.shape)).encode() + array.tobytes())
    else:
        hasher.update(repr(tree).encode())
