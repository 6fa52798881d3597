"""What the loss was divided by, as far as it shows: what B is multiplied by to belong to the per-example loss."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.positions import Rows
from algoperf_kfac.pytorch.covered_layer import CoveredLayer
from algoperf_kfac.pytorch.kinds import AnyRecorder
from algoperf_kfac.pytorch.loss_parts import LossParts, Slice, Slices
from algoperf_kfac.pytorch.operations import BY_EXAMPLE, Called
from algoperf_kfac.pytorch.statistics import Scalar


class LossScale:
    """Sees over one capture what loss functions took, and which layers see as many examples.

    Attributes:
        calls: by layer, the rows of its calls.
        gradient: what the mean of a loss function got in the latest backward pass, of several the largest; None if
            unknown.
        parts: of the batch, where loss functions took it part by part.
    """

    def __init__(self) -> None:
        self.calls: dict[str, list[Rows]] = {}
        self.gradient: Tensor | None = None
        self.parts = LossParts()
        self._in_parts: dict[str, list[Slices]] = {}  # by layer that saw the batch in parts
        self._sizes: set[int] = set()  # of dimension 0 of what loss functions took
        self._targets: list[tuple[int, ...]] = []  # of those whose rows are examples, how many these are
        self._inner: set[int] = set()  # of each row of what loss functions took, sizes
        self._sums: dict[int, Tensor] = {}  # what sums of loss functions got over all passes, by their rows
        self._first: dict[str, set[int]] = {}  # the same of what layers took

    def note_call(self, name: str, rows: Rows) -> None:
        """Remember a call of a layer."""
        self.calls.setdefault(name, []).append(rows)
        self._first.setdefault(name, set()).update(rows.leading[:1])

    def has_examples(self, name: str, number: int) -> bool:
        """Whether a layer was called on so many examples, as far as dimension 0 says."""
        return number in self._first.get(name, ())

    def note_loss(self, called: Called, loss: Tensor) -> Slice | None:
        """Remember the sizes of what a loss function took; of which targets, where it may be a part of them."""
        inputs_and_targets = [leaf for leaf in called.leaves() if isinstance(leaf, Tensor)][:2]
        self._sizes |= {tensor.shape[0] for tensor in inputs_and_targets if tensor.ndim}
        self._inner |= {size for tensor in inputs_and_targets for size in _products(tensor.shape[1:])}
        if called.func in BY_EXAMPLE:
            self._targets += [shape for target in inputs_and_targets[1:] if (shape := _examples(called, target))]
        return next((self.parts.note(target, loss) for target in inputs_and_targets[1:]), None)

    def take_parts(self, name: str, recorder: AnyRecorder) -> None:
        """See whether a layer's calls since the latest backward pass are those on the parts of a batch."""
        for use in recorder.uses:
            parts = next((parts for parts in self.parts.found if use.take_parts(parts)), None)
            if parts is not None:
                # A loss on parts of the batch, for layers that see these: for all others it is one on the whole.
                self._sizes = self._sizes - set(parts.rows) | {sum(parts.rows)}
                self._in_parts.setdefault(name, []).append(parts)

    def note_gradient(self, gradient: Tensor) -> None:
        """Remember the gradient that the mean of a loss function gets."""
        self.gradient = _largest(self.gradient, gradient)

    def note_sum(self, rows: int, gradient: Tensor) -> None:
        """Remember the gradient that the sum of a loss function over so many rows gets."""
        self._sums[rows] = _largest(self._sums.get(rows), gradient)

    @property
    def summed(self) -> Tensor | None:
        """The largest gradient of a sum over rows that layers see, too: others are of features, as moments have."""
        seen = {size for name in self.calls for size in self._row_counts(name)}
        return functools.reduce(_largest, [g for rows, g in self._sums.items() if rows in seen], None)

    @property
    def inner_sizes(self) -> set[int]:
        """What a mean over all elements or positions may be multiplied by to be one over examples."""
        positions = {rows.leading[1:] for calls in self.calls.values() for rows in calls}
        return self._inner.union(*map(_products, positions))

    def factor(self, recorders: Mapping[str, AnyRecorder], config: KFACConfig, normalizer: Scalar | None) -> Scalar:
        """What squares of output gradients are multiplied by to belong to the per-example loss.

        One number for all layers: by default the examples of the layer that was called first of those that see the
        batch. Others may see a part of it (experts) or cut it up (windows).

        Args:
            recorders: closed, by layer.
            config: the configuration.
            normalizer: what the summed loss was divided by, if the caller said so.
        """
        if config.fisher != "empirical":
            return 1.0 / config.fisher_samples if config.fisher == "mc" else 1.0
        scale = normalizer
        if scale is None:
            scale = next((recorders[name].examples for name in self.by_batch(recorders)), 1.0)
            parts = next(iter(self._in_parts.values()), [])
            scale = scale / parts[0].means if parts else scale
        return scale * scale

    def by_batch(self, recorders: Mapping[str, AnyRecorder]) -> list[str]:
        """The layers as they were called, but the first one that sees what a loss function does ahead of all."""
        seeing = [name for name in recorders if self._sees_the_batch(name)]
        # A layer that is called on fewer and fewer examples was taken to see as many as all calls together.
        whole = [name for name in seeing if recorders[name].rows in self._row_counts(name)]
        batch = next(iter(whole or seeing), None)
        return list(recorders) if batch is None else [batch, *(name for name in recorders if name != batch)]

    def _sees_the_batch(self, name: str) -> bool:
        """Whether a layer has rows in the number of those that a loss function took."""
        return not self._row_counts(name).isdisjoint(self._sizes)

    def _row_counts(self, name: str) -> set[int]:
        """Of each call of a layer, the sizes of its rows, and how many these are; of all where it sees parts."""
        sizes = {size for rows in self.calls.get(name, ()) for size in (*rows.leading, math.prod(rows.leading))}
        return sizes | {sum(parts.rows) for parts in self._in_parts.get(name, ())}

    def rows(self, recorders: Mapping[str, AnyRecorder], layers: Mapping[str, CoveredLayer]) -> dict[str, int]:
        """Examples that each layer was taken to see, the one that sees the batch first.

        Where it changes nothing but the scale of B how a layer's rows are put together (tokens of experts), the
        layer is left out.
        """

        def by_row(name: str) -> bool:
            spec = layers[name].spec
            return spec.is_part and spec.approximation == "expand"

        return {
            name: recorders[name].rows
            for number, name in enumerate(self.by_batch(recorders))
            if not number or not by_row(name)
        }

    def calls_on_the_same(self, name: str) -> int:
        """How many calls of a layer were taken to see the same examples, for nothing but their equal number.

        One, where some have other numbers: these were taken to see others.
        """
        sizes = [rows.leading[:1] for rows in self.calls.get(name, ())]
        return len(sizes) if name not in self._in_parts and len(set(sizes)) == 1 else 1

    def more_rows(self, recorders: Mapping[str, AnyRecorder]) -> tuple[str, int, int] | None:
        """Where all layers see more rows than the loss function: the first layer, its rows and the fewer ones."""
        seen = {name: recorder.rows for name, recorder in recorders.items()}
        numbers = {first for first, *_ in self._targets}
        if not seen or len(numbers) != 1 or any(map(self._sees_the_batch, self.calls)):
            return None
        (number,) = numbers
        # Layers may see as rows what has several dimensions in the loss (classes of pixels), or what several losses
        # take together (halves of a batch).
        firsts = (itertools.accumulate(sizes, operator.mul) for sizes in self._targets)
        all_rows = {number * len(self._targets)}.union(*firsts)
        if any(not all_rows.isdisjoint(self._row_counts(name)) for name in self.calls):
            return None
        name, rows = next(iter(seen.items()))
        return (name, rows, number) if min(seen.values()) > number > 0 else None

    def in_parts(self, recorders: Iterable[str]) -> dict[str, tuple[int, int]]:
        """Layers with several calls that have as many rows together as the loss, where no layer sees all of these.

        By layer, the number of calls and of rows.
        """
        if any(map(self._sees_the_batch, self.calls)):
            return {}
        calls = {name: [(rows.leading or (1,))[0] for rows in self.calls.get(name, ())] for name in recorders}
        found = {name: (len(sizes), sum(sizes)) for name, sizes in calls.items()}
        return {
            name: (number, rows) for name, (number, rows) in found.items() if number > 1 and rows in self._sizes
        }

    def batch_second(self, recorders: Mapping[str, AnyRecorder]) -> dict[str, tuple[int, int]]:
        """Layers taken to have examples first, where the loss has as many rows as their second dimension alone."""
        found = {}
        for name, recorder in recorders.items():
            for rows in self.calls.get(name, ()):
                first, second = (*rows.leading, 0, 0)[:2]
                elsewhere = self._sizes.isdisjoint((first, math.prod(rows.leading)))
                if second in self._sizes and elsewhere and recorder.rows == first and not rows.batch_first:
                    found[name] = (first, second)
        return found


def _products(sizes: Sequence[int]) -> set[int]:
    """Sizes of dimensions, and of neighbouring ones together."""
    return {size for first in range(len(sizes)) for size in itertools.accumulate(sizes[first:], operator.mul)}


def _examples(called: Called, target: Tensor) -> tuple[int, ...]:
    """How many examples a loss function takes, and the sizes of what it has of each; nothing if that is unknown."""
    if called.func is not F.ctc_loss:
        return tuple(target.shape)
    log_probs = next(leaf for leaf in called.leaves() if isinstance(leaf, Tensor))  # targets may be strung together
    return tuple(log_probs.shape[1:2]) if log_probs.ndim == 3 else ()


def _largest(before: Tensor | None, gradient: Tensor) -> Tensor:
    gradient = gradient.detach()
    return gradient if before is None else torch.maximum(before, gradient)
