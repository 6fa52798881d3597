"""Parameters seen through pure views: which of its elements a tensor holds, in which order.

A view, transpose, slice or copy of a parameter is the parameter itself as far as gradients go. Where an operation
takes one as its weight, the sizes and strides of that view say how the weight's matrix is read off what is stored.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from algoperf_kfac.layers import LayerSpec, Layout, Sizes
from algoperf_kfac.pytorch.operations import Called

# Operations whose results are views of their first argument.
MOVES = frozenset(
    """
    view view_as reshape reshape_as flatten unflatten squeeze unsqueeze transpose t T mT H mH adjoint permute
    swapaxes swapdims movedim moveaxis narrow select unbind split split_with_sizes chunk tensor_split
    __getitem__ __iter__ expand expand_as broadcast_to
    """.split()  # noqa: SIM905
)
# Operations whose result has the elements of their first argument in the same order.
COPIES = frozenset("contiguous clone to float double half bfloat16 type type_as".split())  # noqa: SIM905
# Operations that put tensors together, one behind the other where it is along the first dimension.
JOINS = frozenset({"cat", "concat", "concatenate", "stack"})
# Operations that flatten data for products that take matrices only.
FLATTENS = frozenset({"view", "reshape", "flatten"})


@dataclasses.dataclass(frozen=True)
class View:
    """A tensor whose elements are those of a parameter.

    Attributes:
        param: the parameter.
        sizes: of the tensor.
        strides: by how many elements of the parameter, stored in one piece, its dimensions step; 0 where expanded.
        offset: where it begins among them.
    """

    param: Tensor
    sizes: Sizes
    strides: Sizes
    offset: int = 0

    @classmethod
    def whole(cls, param: Tensor) -> View:
        sizes = tuple(param.shape)
        return cls(param, sizes, contiguous_strides(sizes))

    def select(self, dim: int, index: int) -> View:
        """Entry `index` of dimension `dim`."""
        rest = [d for d in range(len(self.sizes)) if d != dim]
        return View(
            self.param,
            tuple(self.sizes[d] for d in rest),
            tuple(self.strides[d] for d in rest),
            self.offset + index * self.strides[dim],
        )

    def layout(self, out_dims: Sequence[int], in_dims: Sequence[int]) -> Layout | None:
        """How a (P_out, P_in) matrix is read off the stored parameter; () if as it is stored.

        Args:
            out_dims: dimensions of the view that run over output features, in the order of the matrix' rows.
            in_dims: those that run over input features.

        Returns:
            Sizes, strides and offset, of a view whose dimensions run over outputs, then inputs. None where elements
            are read several times (expanded).
        """
        merged: list[tuple[int, int]] = []
        for dims in (out_dims, in_dims):
            merged += self._merged(dims)
        sizes, strides = tuple(size for size, _ in merged), tuple(stride for _, stride in merged)
        if 0 in strides:
            return None
        whole = math.prod(sizes) == self.param.numel()
        if whole and self.offset == 0 and strides == contiguous_strides(sizes):
            return ()
        return sizes, strides, (self.offset,)

    def _merged(self, dims: Sequence[int]) -> list[tuple[int, int]]:
        """Sizes and strides, neighbours that run on taken as one dimension, so that equal views compare equal."""
        merged: list[tuple[int, int]] = []
        for size, stride in ((self.sizes[d], self.strides[d]) for d in dims):
            if size == 1:
                continue
            if merged and merged[-1][1] == size * stride:
                merged[-1] = (merged[-1][0] * size, stride)
            else:
                merged.append((size, stride))
        return merged


class Views:
    """The views of parameters that exist, within one capture; and which data had leading dimensions before."""

    def __init__(self) -> None:
        self._views: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._joined: WeakIdKeyDictionary = WeakIdKeyDictionary()  # of what was put together: its pieces
        self._leading: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def of(self, value: object) -> View | None:
        """What a value is of a parameter that is to be trained; None if it is anything else."""
        if type(value) is Tensor and not self._views.data:
            return None  # most of what a model computes, and by far the quickest to tell
        if isinstance(value, torch.nn.Parameter):
            return View.whole(value) if value.requires_grad else None
        return self._views.get(value) if isinstance(value, Tensor) else None

    def leading(self, value: object) -> Sizes | None:
        """The leading dimensions of data that was flattened to (rows, features); None if it was not."""
        return self._leading.get(value) if isinstance(value, Tensor) else None

    def flatten(self, called: Called, output: object) -> None:
        """Remember the leading dimensions of data that is being flattened."""
        if called.name not in FLATTENS or not isinstance(output, Tensor) or output.dim() != 2:
            return
        before = called.args[0] if called.args else None
        if isinstance(before, Tensor) and before.dim() > 2 and before.shape[-1] == output.shape[-1]:
            self._leading[output] = tuple(before.shape[:-1])

    def move(self, called: Called, output: object) -> bool:
        """Follow a parameter through an operation that only moves its elements; whether it is one."""
        source = self.of(called.args[0]) if called.args else None
        results = list(tensors(output))
        if source is None:
            seen = self._cut(called, output)
            if not seen:
                self._join(called, output)
                return False
        elif called.name in COPIES:
            seen = [source] * len(results)
        elif called.name in MOVES:
            seen = list(_moved(called, source))
        else:
            return False
        if len(seen) != len(results) or any(
            view.sizes != tuple(result.shape) for view, result in zip(seen, results, strict=True)
        ):
            return False
        for view, result in zip(seen, results, strict=True):
            self._views[result] = view
        return True

    def _join(self, called: Called, output: object) -> None:
        """Remember parameters that are put together, one behind the other."""
        if called.name not in JOINS or not called.args or not isinstance(output, Tensor):
            return
        dims = [*called.args[1:2], *(called.kwargs[key] for key in ("dim", "axis") if key in called.kwargs)]
        first = not dims or dims[0] == 0 or (dims[0] == -1 and output.dim() == 1)
        pieces = [self.of(item) for item in called.args[0]] if isinstance(called.args[0], list | tuple) else []
        whole = [piece for piece in pieces if piece and piece.strides == contiguous_strides(piece.sizes)]
        if first and pieces and len(whole) == len(pieces):
            self._joined[output] = whole

    def _cut(self, called: Called, output: object) -> list[View]:
        """Take what was put together apart again: the views, none where a result is not of a single piece."""
        first = called.args[0] if called.args and self._joined.data else None
        if not isinstance(first, Tensor) or first not in self._joined:
            return []
        pieces: list[View] = self._joined[first]
        if output is first:  # changed in place
            del self._joined[first]
        if output is first or called.name not in MOVES:
            return []
        starts = [0, *itertools.accumulate(math.prod(piece.sizes) for piece in pieces)]
        found = []
        for view in _moved(called, View.whole(first)):
            stop = view.offset + _span(view.sizes, view.strides)
            number = bisect.bisect_right(starts, view.offset) - 1
            if number == len(pieces) or stop > starts[number + 1]:
                return []
            piece = pieces[number]
            offset = view.offset - starts[number] + piece.offset
            found.append(View(piece.param, view.sizes, view.strides, offset))
        return found

    def forget(self, param: Tensor) -> None:
        """A view or a copy of a parameter was changed in place: none is what it was."""
        for tensor in [t for t, view in self._views.items() if view.param is param]:
            del self._views[tensor]
        for tensor in [t for t, pieces in self._joined.items() if any(piece.param is param for piece in pieces)]:
            del self._joined[tensor]


def _moved(called: Called, source: View) -> Iterator[View]:
    """What a move makes of a view, found by making it on the meta device; nothing where it is none."""
    args = list(called.args[1:])
    if called.name == "__getitem__":
        index = args[0] if isinstance(args[0], tuple) else (args[0],)
        # A number on the device selects as a number does; other tensors, lists and masks gather.
        index = tuple(int(i) if _is_number(i) else i for i in index)
        if not all(i is None or i is Ellipsis or type(i) in (int, slice) for i in index):
            return
        args = [index]
    if any(isinstance(arg, Tensor) for arg in args):
        args = [arg.to("meta") if isinstance(arg, Tensor) else arg for arg in args]
    whole = torch.empty(source.param.numel(), device="meta")
    hollow = whole.as_strided(source.sizes, source.strides, source.offset)
    try:
        output = list(hollow.unbind()) if called.name == "__iter__" else called.func(hollow, *args, **called.kwargs)
    except RuntimeError:  # a view of a copy, whose elements lie in another order than the parameter's
        return
    for result in tensors(output):
        if result._base is not whole or result.dtype != whole.dtype:
            return
        yield View(source.param, tuple(result.shape), tuple(result.stride()), int(result.storage_offset()))


def _is_number(index: object) -> bool:
    return (
        isinstance(index, Tensor)
        and index.dim() == 0
        and not index.is_floating_point()
        and index.dtype != torch.bool
    )


def overlap(spec: LayerSpec, other: LayerSpec) -> bool:
    """Whether two layers of one weight may have elements in common."""
    if not spec.layout or not other.layout:
        return True
    (sizes, strides, (start,)), (other_sizes, other_strides, (other_start,)) = spec.layout, other.layout
    step = max(*strides, *other_strides, 1)
    # Parts that step over whole rows lie beside each other within the rows.
    if any(size > 1 for size, stride in zip(sizes, strides, strict=True) if stride == step) and any(
        size > 1 for size, stride in zip(other_sizes, other_strides, strict=True) if stride == step
    ):
        mine, theirs = _span(sizes, strides, below=step), _span(other_sizes, other_strides, below=step)
        begin, other_begin = start % step, other_start % step
        within = begin + mine <= step and other_begin + theirs <= step
        if within and (begin + mine <= other_begin or other_begin + theirs <= begin):
            return False
    mine, theirs = _span(sizes, strides), _span(other_sizes, other_strides)
    return start < other_start + theirs and other_start < start + mine


def _span(sizes: Sizes, strides: Sizes, below: float = math.inf) -> int:
    """How many elements lie between the first and the last, both included; of steps below a number."""
    return 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True) if stride < below)


def contiguous_strides(sizes: Sequence[int]) -> Sizes:
    """The strides of a tensor of these sizes that lies in one piece."""
    return tuple(math.prod(sizes[d + 1 :]) for d in range(len(sizes)))


def tensors(output: object) -> Iterator[Tensor]:
    """The tensors among the results of an operation."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, list | tuple):
        for item in output:
            yield from tensors(item)
