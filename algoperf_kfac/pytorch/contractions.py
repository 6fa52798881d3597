"""Products of data with a weight, however written: matmul, mm, addmm, bmm, einsum, tensordot, grouped_mm.

Each is an einsum of two operands, and comes down to linear layers: letters that both have and the output has not
run over input features, letters of weight and output over output features, letters of input and output over rows. A
letter of all three numbers weights of their own (experts, heads): each is a layer. Of its rows those count that are
not zero throughout; the others are tokens of other experts, and add nothing to its gradient.
"""

from __future__ import annotations

import dataclasses
import math
import string
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from algoperf_kfac.layers import Sizes
from algoperf_kfac.pytorch.operations import RULES, Called, Function, Operation, overloads
from algoperf_kfac.pytorch.views import View, Views, contiguous_strides

ViewOf = Callable[[object], View | None]


@dataclasses.dataclass(frozen=True)
class Product:
    """An einsum of two operands, and a bias.

    Attributes:
        operands: both.
        letters: of either.
        output: letters of the output.
        bias: added to the output, or None.
    """

    operands: tuple[object, object]
    letters: tuple[str, str]
    output: str
    bias: object = None

    def operations(self, view_of: ViewOf, name: str) -> list[Operation]:
        """The linear layers that it comes to; none if no operand or both are weights, or it has another form."""
        views = [view_of(operand) for operand in self.operands]
        which = next((k for k in (0, 1) if views[k] is not None and views[1 - k] is None), None)
        if which is None:
            return []
        view, weight, x = views[which], self.operands[which], self.operands[1 - which]
        if view is None or not isinstance(x, Tensor) or not isinstance(weight, Tensor) or not weight.requires_grad:
            return []
        found = self._of_weight(x.detach(), view, self.letters[1 - which], self.letters[which], name)
        for operation in found:
            operation.constant = not x.requires_grad
        return found

    def _of_weight(self, x: Tensor, view: View, of_x: str, of_w: str, name: str) -> list[Operation]:
        for letter in of_w:
            dim = of_w.index(letter)
            beside = x.shape[of_x.index(letter)] if letter in of_x else 1
            if (view.strides[dim] == 0 and view.sizes[dim] > 1) or view.sizes[dim] == 1 < beside:
                view, of_w = view.select(dim, 0), of_w.replace(letter, "")  # one weight for all rows
            elif letter in of_x and beside == 1 < view.sizes[dim]:
                x, of_x = x.select(of_x.index(letter), 0), of_x.replace(letter, "")  # one input for all weights
        numbers = [c for c in of_w if c in of_x and c in self.output]
        inputs = [c for c in of_w if c in of_x and c not in self.output]
        outputs = [c for c in of_w if c not in of_x and c in self.output]
        rows = [c for c in of_x if c not in of_w]
        sizes = dict(zip(of_x, x.shape, strict=True))
        if (
            any(len(set(letters)) < len(letters) for letters in (of_x, of_w, self.output))
            or len(numbers) > 1
            or not inputs
            or not outputs
            or set(self.output) != {*numbers, *outputs, *rows}
            or any(sizes[c] != size for c, size in zip(of_w, view.sizes, strict=True) if c in sizes)
        ):
            return []
        found = []
        x = x.to_dense() if numbers and x.layout is not torch.strided else x  # its rows are looked at
        for index in range(sizes[numbers[0]]) if numbers else (None,):
            part, letters_w, letters_x, letters_y = view, of_w, of_x, self.output
            data = x
            if index is not None:
                part = view.select(of_w.index(numbers[0]), index)
                data = x.select(of_x.index(numbers[0]), index)
                letters_w, letters_x = of_w.replace(numbers[0], ""), of_x.replace(numbers[0], "")
            layout = part.layout([letters_w.index(c) for c in outputs], [letters_w.index(c) for c in inputs])
            if layout is None:
                return []
            data = _ordered(data, letters_x, rows, inputs)
            wide = dict(zip(letters_w, part.sizes, strict=True))
            operation = Operation(
                "linear",
                data,
                part.param,
                None,
                shape=(math.prod(wide[c] for c in outputs), data.shape[-1]),
                layout=layout,
                arrange=_arrange(letters_y, numbers, index, rows, outputs),
                mask=None if index is None else (data != 0).any(-1),
                name=name,
            )
            if isinstance(self.bias, Tensor) and self.bias.shape == operation.shape[:1]:
                operation.bias = self.bias
            found.append(operation)
        return found


def _ordered(t: Tensor, letters: str, rows: Sequence[str], features: Sequence[str]) -> Tensor:
    """(*rows, P) from a tensor whose dimensions have these letters."""
    if t.layout is not torch.strided:
        if len(rows) == len(features) == 1:  # as it is: it may be too large to be made dense
            return t if letters == rows[0] + features[0] else t.t()
        t = t.to_dense()
    t = t.permute([letters.index(c) for c in (*rows, *features)])
    return t.reshape(*t.shape[: len(rows)], math.prod(t.shape[len(rows) :]))


def _arrange(
    letters: str, numbers: Sequence[str], index: int | None, rows: Sequence[str], outputs: Sequence[str]
) -> Callable[[Tensor], Tensor]:
    def arrange(grad: Tensor) -> Tensor:
        if index is None:
            return _ordered(grad, letters, rows, outputs)
        part = grad.select(letters.index(numbers[0]), index)
        return _ordered(part, letters.replace(numbers[0], ""), rows, outputs)

    return arrange


# How the functions of torch are written as einsums. None: not in this form.


def _matmul(input: Tensor, other: Tensor, *, bias: object = None) -> Product | None:
    """A dimension of rows is aligned from the right, and may be missing on either side."""
    x, w = input.dim(), other.dim()
    if not x or not w:
        return None
    rows = string.ascii_lowercase[: max(x, w) - 2] if max(x, w) > 2 else ""
    left = rows[len(rows) - max(x - 2, 0) :] + ("XI" if x > 1 else "I")
    right = rows[len(rows) - max(w - 2, 0) :] + ("IO" if w > 1 else "I")
    output = rows + ("X" if x > 1 else "") + ("O" if w > 1 else "")
    return Product((input, other), (left, right), output, bias)


def _mm(input: Tensor, mat2: Tensor) -> Product | None:
    return _matmul(input, mat2)


def _mv(input: Tensor, vec: Tensor) -> Product | None:
    return _matmul(input, vec)


def _rmatmul(input: Tensor, other: Tensor) -> Product | None:
    return _matmul(other, input)


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Product | None:
    return _matmul(mat1, mat2, bias=input) if alpha == 1 and beta == 1 else None


def _einsum(equation: object, *operands: object) -> Product | None:
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or equation.count(",") != 1 or len(operands) != 2:
        return None
    first, second = operands
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return None
    inputs, said, output = equation.replace(" ", "").partition("->")
    if not said:  # what is in one place alone, in the order of the alphabet
        once = sorted(c for c in set(inputs) - {",", "."} if inputs.count(c) == 1)
        output = "..." * ("..." in inputs) + "".join(once)
    spare = [c for c in string.ascii_letters if c not in equation]
    parts = inputs.split(",")
    hidden = [t.dim() - len(part.replace("...", "")) for t, part in zip((first, second), parts, strict=True)]
    # An ellipsis stands for dimensions aligned from the right.
    most = max(hidden)
    left, right = (
        part.replace("...", "".join(spare[most - n : most])) for part, n in zip(parts, hidden, strict=True)
    )
    return Product((first, second), (left, right), output.replace("...", "".join(spare[:most])))


def _inner(input: Tensor, other: Tensor) -> Product | None:
    x, w = input.dim(), other.dim()
    if not x or not w:
        return None
    left, right = string.ascii_lowercase[: x - 1], string.ascii_uppercase[1:w]
    return Product((input, other), (left + "A", right + "A"), left + right)


def _tensordot(a: Tensor, b: Tensor, dims: object = 2, out: object = None) -> Product | None:
    if isinstance(dims, int):
        pairs = [(a.dim() - dims + k, k) for k in range(dims)]
    elif isinstance(dims, list | tuple) and len(dims) == 2 and all(isinstance(d, list | tuple) for d in dims):
        pairs = [(i % a.dim(), j % b.dim()) for i, j in zip(*dims, strict=True)]
    else:
        return None
    left = string.ascii_lowercase[: a.dim()]
    right = list(string.ascii_uppercase[: b.dim()])
    for i, j in pairs:
        right[j] = left[i]
    output = [c for c in left if c not in right] + [c for c in right if c not in left]
    return Product((a, b), (left, "".join(right)), "".join(output))


PRODUCTS: dict[Function, Callable[..., Product | None]] = {
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.linalg.matmul), _matmul),
    Tensor.__rmatmul__: _rmatmul,
    **dict.fromkeys((torch.mm, Tensor.mm, torch.bmm, Tensor.bmm, torch.sparse.mm), _mm),
    **dict.fromkeys((torch.mv, Tensor.mv), _mv),
    **dict.fromkeys((torch.addmm, Tensor.addmm, torch.sparse.addmm), _addmm),
    **dict.fromkeys(overloads("matmul"), _matmul),
    **dict.fromkeys(overloads("mm", "bmm"), _mm),
    **dict.fromkeys(overloads("mv"), _mv),
    **dict.fromkeys(overloads("addmm"), _addmm),
    torch.einsum: _einsum,
    **dict.fromkeys((torch.inner, Tensor.inner), _inner),
    torch.tensordot: _tensordot,
}


def _grouped(
    view_of: ViewOf,
    name: str,
    mat_a: Tensor,
    mat_b: Tensor,
    *,
    offs: Tensor | None = None,
    bias: object = None,
    out_dtype: object = None,
) -> list[Operation]:
    """Rows sorted by expert, those of each up to its offset, times the experts' weights (E, P_in, P_out)."""
    view = view_of(mat_b)
    if view is None or offs is None or bias is not None or mat_a.dim() != 2 or not mat_b.requires_grad:
        return []
    found, start = [], 0
    for index, stop in enumerate(offs.tolist()):
        part = view.select(0, index)
        layout = part.layout([1], [0])
        if layout is None:
            return []
        rows = slice(start, stop)
        shape = (part.sizes[1], part.sizes[0])
        arrange = _slice(rows)
        x = mat_a.detach()[rows]
        found.append(
            Operation("linear", x, part.param, None, shape=shape, layout=layout, arrange=arrange, name=name)
        )
        start = stop
    return found


def _slice(rows: slice) -> Callable[[Tensor], Tensor]:
    return lambda grad: grad[rows]


GROUPED: frozenset[Function] = frozenset(
    function
    for function in (getattr(torch, "_grouped_mm", None), getattr(F, "grouped_mm", None))
    if function is not None
)


# Products of matrices, for which a model has to flatten its data.
FLAT: frozenset[Function] = frozenset({torch.mm, Tensor.mm, torch.addmm, Tensor.addmm, *overloads("mm", "addmm")})


def operations_of(called: Called, views: Views) -> list[Operation]:
    """The layers that a function of torch applies; none if it has no rule, or in this form has none."""
    rule, product = RULES.get(called.func), PRODUCTS.get(called.func)
    if rule is not None:
        operation = placed(rule(*called.args, **called.kwargs), views.of)
        if operation is not None:
            operation.constant = not operation.input.requires_grad
        return [] if operation is None else [operation]
    if product is not None and any(views.of(leaf) is not None for leaf in called.leaves()):
        try:
            found = product(*called.args, **called.kwargs)
        except TypeError:  # other keywords
            return []
        operations = [] if found is None else found.operations(views.of, called.name)
        for operation in operations:
            _with_bias(operation, views.of)
            leading = views.leading(found.operands[0]) if found is not None and called.func in FLAT else None
            if leading is not None and len(operation.input) == math.prod(leading):
                _unflatten(operation, leading)
        return operations
    if called.func in GROUPED:
        return _grouped(views.of, called.name, *called.args, **called.kwargs)
    return []


def _unflatten(operation: Operation, leading: Sizes) -> None:
    """Give the rows of an operation the dimensions that they had."""
    arrange = operation.arrange
    operation.input = operation.input.unflatten(0, leading)
    operation.arrange = lambda grad: (grad if arrange is None else arrange(grad)).unflatten(0, leading)


def placed(operation: Operation, view_of: ViewOf) -> Operation | None:
    """An operation with the parameter in place of its weight argument; None if that is no view of a parameter."""
    argument, view = operation.weight, view_of(operation.weight)
    if view is None:
        # A frozen parameter has no view, and a reader.
        return operation if isinstance(argument, torch.nn.Parameter) else None
    layout = view.layout([0], range(1, len(view.sizes)))
    if view.param is not argument:
        stored = operation.kind != "conv_transpose" or view.sizes == tuple(view.param.shape)
        if layout is None or not stored or not argument.requires_grad:
            return None
    if operation.kind == "conv_transpose" and layout != ():
        return None
    operation.weight, operation.shape, operation.layout = view.param, view.sizes, layout or ()
    return _with_bias(operation, view_of)


def _with_bias(operation: Operation, view_of: ViewOf) -> Operation:
    """The parameter in place of a bias argument that is a part of one."""
    view = view_of(operation.bias)
    if view is not None and view.param is not operation.bias and view.strides == contiguous_strides(view.sizes):
        whole = view.sizes == tuple(view.param.shape)
        operation.bias, operation.bias_start = view.param, None if whole else view.offset
    return operation
