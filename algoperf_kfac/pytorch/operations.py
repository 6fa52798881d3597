"""The operations that take a parameter as weight, and how to read their arguments."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from algoperf_kfac.layers import LayerSpec, Layout
from algoperf_kfac.positions import BY_GRADIENT, Candidates, Positions, Rows, candidates_for, choose
from algoperf_kfac.pytorch.geometry import ConvGeometry

# Sparse inputs are made dense up to so many numbers.
MAX_DENSE_ELEMENTS = 2**28

# What `+=` and its like call.
IN_PLACE = frozenset({"__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__", "__imod__", "__ifloordiv__"})

Function = Callable[..., Any]
Sizes = int | Sequence[int]


@dataclasses.dataclass
class Called:
    """A function of torch as it was called, to be run at most once.

    Attributes:
        func: the function.
        args, kwargs: its arguments.
    """

    func: Function
    args: list[Any]
    kwargs: Mapping[str, Any]
    _outputs: list[Any] = dataclasses.field(default_factory=list)

    @functools.cached_property
    def name(self) -> str:
        """The function's name; for properties such as `Tensor.T` that of the property."""
        packet = getattr(self.func, "overloadpacket", self.func)  # of what torch.export made: aten.linear.default
        name = getattr(packet, "__name__", str(packet))
        if name != "__get__":
            return str(name)
        return str(getattr(getattr(self.func, "__self__", None), "__name__", name))

    @property
    def in_place(self) -> bool:
        """Whether it writes to its first argument, by its name."""
        return (self.name.endswith("_") and not self.name.endswith("__")) or self.name in IN_PLACE

    def run(self) -> Any:
        """What the function returns."""
        if not self._outputs:
            self._outputs.append(self.func(*self.args, **self.kwargs))
        return self._outputs[0]

    def replace(self, output: Any) -> Any:
        """Take another value for what the function returned."""
        self._outputs[:] = [output]
        return output

    def leaves(self) -> Iterator[Any]:
        """The arguments, lists and tuples among them taken apart."""
        for arg in (*self.args, *self.kwargs.values()):
            yield from arg if isinstance(arg, list | tuple) else (arg,)


@dataclasses.dataclass
class Operation:
    """A weighted operation as it was called.

    Attributes:
        kind: layer kind: "linear", "conv", "conv_transpose", or "embedding" for a lookup.
        input: its input, batch first for convolutions; (*positions, 1) token ids for a lookup.
        weight: the parameter.
        bias: the bias argument, or None.
        groups: channel groups.
        hyper: stride, padding, dilation of convolutions; padding_idx of a lookup.
        shape: of the weight as the operation has it; that of the parameter if not given.
        layout, bias_start: where both lie in the parameters; see `LayerSpec`.
        arrange: brings the gradient of the output into the order of the rows, (*leading, P_out).
        sequence_first: whether the function says that its rows are (T, N).
        segments: which example each row belongs to, where the input is a nested tensor.
        mask: (*leading) of zeros and ones: which rows are this weight's, or None.
        name: what the operation is called.
        constant: whether no gradient goes through its input.
    """

    kind: str
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    groups: int = 1
    hyper: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shape: tuple[int, ...] = ()
    layout: Layout = ()
    bias_start: int | None = None
    arrange: Callable[[Tensor], Tensor] | None = None
    mask: Tensor | None = None
    sequence_first: bool = False
    segments: Positions | None = None
    name: str = ""
    constant: bool = False

    def __post_init__(self) -> None:
        self.shape = self.shape or tuple(self.weight.shape)
        self.name = self.name or self.kind

    def as_computed(self, dtype: torch.dtype) -> Operation:
        """With the input that autograd keeps, where autocast computes in a type of its own: a copy, to which the
        model does not write any more."""
        x = self.input
        if not (x.is_floating_point() and dtype.is_floating_point) or x.dtype == dtype:
            return self
        with torch.no_grad():
            return dataclasses.replace(self, input=x.to(dtype))

    @property
    def is_conv(self) -> bool:
        return self.kind in ("conv", "conv_transpose")

    def is_of(self, spec: LayerSpec) -> bool:
        """Whether it multiplies by the matrix that the layer has of the weight.

        A convolution, and a linear layer on its patches, do; what reads the same numbers as another matrix
        (transposed, in other groups, in another shape) does not.
        """
        if spec.kind not in PLAIN:
            return True
        transposed = "conv_transpose"
        sizes = matrix_sizes(self.kind, self.shape, self.groups)
        same = (self.kind == transposed) == (spec.kind == transposed) and self.groups == spec.groups
        return same and sizes == (spec.out_dim, spec.in_dim)

    def rows(self, output: Tensor) -> Rows:
        """The rows of the operation: its output, or its input, without features."""
        if not self.is_conv:
            return Rows(_numbers((output if self.arrange is None else self.input).shape[:-1]))
        dims = len(self.shape) - 2
        examples = output.shape[:1] if output.dim() == dims + 2 else (1,)
        return Rows(_numbers((*examples, *output.shape[-dims:])), batch_first=True)

    def flatten(self, positions: Positions, rows: Rows) -> Positions | None:
        """Take rows in several dimensions as rows in one, where segment ids have these dimensions, too.

        Args:
            positions: with segment ids of the sizes of the first dimensions, in the operation's own order.
            rows: the operation's.

        Returns:
            The description of the rows as they are then; None, and nothing is changed, if it does not apply.
        """
        ids, mask = positions.segment_ids, positions.array_mask
        if not isinstance(ids, Tensor) or ids.dim() < 2 or self.is_conv or self.mask is not None:
            return None
        dims = ids.dim()
        if rows.leading[:dims] != tuple(ids.shape):
            return None
        flat: Tensor | str | None = BY_GRADIENT if positions.by_gradient else None
        if isinstance(mask, Tensor):
            if rows.leading[: mask.dim()] != tuple(mask.shape):
                return None
            missing = ids.shape[mask.dim() :]
            flat = mask.reshape(*mask.shape, *[1] * len(missing)).expand(*mask.shape, *missing).flatten(0, dims - 1)
        earlier = self.arrange
        self.input = self.input.flatten(0, dims - 1)
        self.arrange = lambda grad: (grad if earlier is None else earlier(grad)).flatten(0, dims - 1)
        return dataclasses.replace(positions, mask=flat, segment_ids=ids.flatten(), batch_dim=0)

    def unnest(self) -> bool:
        """Take the rows of a nested input for rows in segments; whether that can be done.

        It can if examples come first, and their positions second and one after the other.
        """
        x: Any = self.input.detach()  # stubs know no nested tensors
        if x.layout != torch.jagged or x.lengths() is not None or isinstance(x.shape[-1], torch.SymInt):
            return False
        if self.kind != "linear" or self.arrange is not None or not isinstance(x.shape[1], torch.SymInt):
            return False
        offsets, number = x.offsets(), int(x.shape[0])
        ids = torch.repeat_interleave(torch.arange(number, device=offsets.device), offsets.diff())
        self.input, self.arrange = x.values(), lambda grad: grad.values()
        self.segments = Positions(segment_ids=ids, num_segments=number)
        return True

    def densify(self) -> bool:
        """Take the rows of a sparse input as dense ones; whether these are not too large."""
        if self.input.numel() > MAX_DENSE_ELEMENTS:
            return False
        self.input = self.input.detach().to_dense()
        return True

    def positions(
        self, name: str, output: Tensor, candidates: Candidates, *, sequence_first: bool
    ) -> Positions | None:
        """The description of positions that the operation takes; may change it as `flatten` does.

        Args:
            name: the layer's.
            output: of the operation, or a tensor of its shape.
            candidates: what is given.
            sequence_first: whether the module says that sequences come first; a mask or segments of the user's,
                fitted to rows, say more.
        """
        rows = self.rows(output)
        for given in candidates_for(name, candidates):
            if (flat := self.flatten(given, rows)) is not None:
                return flat
        chosen = choose(name, candidates, rows)
        if self.segments is not None and (chosen is None or chosen.segment_ids is None):
            ids, number = self.segments.segment_ids, self.segments.num_segments
            return dataclasses.replace(chosen or Positions(), segment_ids=ids, num_segments=number)
        unsaid = chosen is None or (chosen.by_gradient and chosen.segment_ids is None)
        if unsaid and (sequence_first or self.sequence_first):
            chosen = dataclasses.replace(chosen or Positions(), batch_dim=1)
        if self.mask is None or (chosen is not None and chosen.by_gradient):
            return chosen
        mask = self.mask
        if chosen is not None and isinstance(chosen.mask, Tensor):
            mask = mask * chosen.mask.reshape(*chosen.mask.shape, *[1] * (mask.dim() - chosen.mask.dim()))
        return dataclasses.replace(chosen or Positions(), mask=mask)

    def geometry(self, output: Tensor) -> ConvGeometry | None:
        """The geometry of a convolution, None for other operations."""
        if not self.is_conv:
            return None
        kernel = self.shape[2:]
        dims = len(kernel)
        dilation = _tuple(self.hyper["dilation"], dims)
        padding = self.hyper["padding"]
        if padding == "same":
            # As torch does it: of an odd total, the larger half goes behind.
            padding = tuple(d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True))
        elif padding == "valid":
            padding = 0
        return ConvGeometry(
            kernel=kernel,
            stride=_tuple(self.hyper["stride"], dims),
            dilation=dilation,
            padding=_tuple(padding, dims),
            in_size=_numbers(self.input.shape[-dims:]),
            out_size=_numbers(output.shape[-dims:]),
            transposed=self.kind == "conv_transpose",
        )


PLAIN = ("linear", "conv", "conv_transpose")


def matrix_sizes(kind: str, shape: Sequence[int], groups: int) -> tuple[int, int]:
    """Output and input features per group, the latter times kernel positions, of a weight of this shape."""
    if kind == "conv_transpose":
        return shape[1], shape[0] // groups * math.prod(shape[2:])
    return shape[0] // groups, math.prod(shape[1:])


def _numbers(sizes: Sequence[int]) -> tuple[int, ...]:
    """Sizes as plain numbers: where a graph is compiled for any batch size, one with statistics is for its own."""
    return tuple(int(size) for size in sizes)


def _tuple(value: Sizes, dims: int) -> tuple[int, ...]:
    values = (value,) * dims if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Operation:
    return Operation("linear", input, weight, bias)


def _conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> Operation:
    hyper = {"stride": stride, "padding": padding, "dilation": dilation}
    return Operation("conv", input, weight, bias, groups, hyper)


def _conv_transpose(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,  # seen in the output's size
    groups: int = 1,
    dilation: Sizes = 1,
) -> Operation:
    hyper = {"stride": stride, "padding": padding, "dilation": dilation}
    return Operation("conv_transpose", input, weight, bias, groups, hyper)


def _embedding(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, *_: object, **__: object
) -> Operation:
    return Operation("embedding", input.unsqueeze(-1), weight, None, hyper={"padding_idx": padding_idx})


def _torch_embedding(weight: Tensor, indices: Tensor, padding_idx: int = -1, *_: object, **__: object) -> Operation:
    return _embedding(indices, weight, None if padding_idx < 0 else padding_idx)


# Functions that models are written in.
FUNCTIONS: dict[Function, Callable[..., Operation]] = {
    F.linear: _linear,
    torch.conv1d: _conv,
    torch.conv2d: _conv,
    torch.conv3d: _conv,
    torch.conv_transpose1d: _conv_transpose,
    torch.conv_transpose2d: _conv_transpose,
    torch.conv_transpose3d: _conv_transpose,
}


def overloads(*names: str) -> list[Function]:
    """Operators that the modules of torch.export call in place of functions."""
    return [
        getattr(packet, kind)
        for name in names
        for packet in [getattr(torch.ops.aten, name)]
        for kind in packet.overloads()
        if not kind.endswith("out")
    ]


RULES: dict[Function, Callable[..., Operation]] = {
    **FUNCTIONS,
    **dict.fromkeys(overloads("linear"), _linear),
    **dict.fromkeys(overloads("conv1d", "conv2d", "conv3d"), _conv),
    **dict.fromkeys(overloads("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _conv_transpose),
}

# Lookups in a table; a rule only where the table is the output layer, too.
LOOKUPS: dict[Function, Callable[..., Operation]] = {
    F.embedding: _embedding,
    torch.embedding: _torch_embedding,
    **dict.fromkeys(overloads("embedding"), _torch_embedding),
}

# Loss functions that average by default: the gradient they get says how a loss was scaled before backward().
LOSSES: frozenset[Function] = frozenset(
    {
        F.cross_entropy,
        F.nll_loss,
        F.binary_cross_entropy,
        F.binary_cross_entropy_with_logits,
        F.mse_loss,
        F.l1_loss,
        F.smooth_l1_loss,
        F.huber_loss,
        F.ctc_loss,
        F.kl_div,
        F.gaussian_nll_loss,
        F.poisson_nll_loss,
    }
)

# Those of them whose rows are examples. Errors are also taken of moments and correlations, with features for rows.
BY_EXAMPLE = LOSSES & {
    F.cross_entropy,
    F.nll_loss,
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    F.ctc_loss,
}


def is_mean(called: Called) -> bool:
    """Whether a loss function of `LOSSES` was asked for its mean."""
    return called.kwargs.get("reduction", "mean") in ("mean", "batchmean")


def summed_rows(called: Called) -> int:
    """How many rows a loss function of `LOSSES` sums over; 0 if it was not asked for the sum."""
    outputs = next((leaf for leaf in called.leaves() if isinstance(leaf, Tensor)), None)
    if outputs is None or not outputs.ndim or called.kwargs.get("reduction") != "sum":
        return 0
    return outputs.shape[0]
