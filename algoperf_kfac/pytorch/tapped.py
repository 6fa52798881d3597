"""What torch.compile traces on statistics steps: functions of torch, with taps where they apply layers.

The output of a layer passes through an identity, the tap. Its backward pass sees input and output gradient, has the
layer's sums formed as uncompiled code forms them (`Recorder`), and hands them out as gradients of zeros of their
shapes. Nothing is written to while the graph runs, so that the graph does not break.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algoperf_kfac.pytorch.operations import LOOKUPS, RULES, Function, Operation
from algoperf_kfac.pytorch.sights import TURNED
from algoperf_kfac.pytorch.taps import COUNTS, TAPS, WEIGHTS, Products, Table, Tap, Turned

# What stands in for tensors of an operation that its sums do not read.
_NONE = torch.empty(0, device="meta")
# Functions that may transpose a weight, where dynamo sees them.
_TRANSPOSES: tuple[Function, ...] = (
    Tensor.t, torch.t, Tensor.transpose, torch.transpose, Tensor.permute, torch.permute, Tensor.swapaxes,
    torch.swapaxes, Tensor.swapdims, torch.swapdims, Tensor.adjoint, torch.adjoint,
)  # fmt: skip
# What taps take of torch's compiler, by module: older versions lack some of it, newer ones promise little of it.
_NEEDED = (
    ("torch.compiler", "allow_in_graph"),
    ("torch.compiler", "disable"),
    ("torch.compiler", "is_dynamo_compiling"),
    ("torch._dynamo.eval_frame", "skip_code"),
    ("torch._dynamo.variables.torch_function", "SymbolicTorchFunctionState"),  # modes entered outside are traced
)
_LISTS = (list, tuple)  # torch 2.9 does not trace `list | tuple`


class _Identity(torch.autograd.Function):
    """A layer's output; its backward pass takes the sums."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, input: Tensor, tap: Tap, operation: Operation, masks: int, *tensors: Tensor
    ) -> Tensor:
        ctx.tap, ctx.operation = tap, operation
        ctx.save_for_backward(input, *tensors[:masks])
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        input, *masks = ctx.saved_tensors
        sums = ctx.tap.sums(dataclasses.replace(ctx.operation, input=input), masks, grad)
        return grad, None, None, None, None, *[None] * len(masks), *sums


class _Reading(torch.autograd.Function):
    """What an operation makes of a layer's parameter that is not the layer; its backward pass counts it."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, zero: Tensor) -> Tensor:
        ctx.like = zero.dtype, zero.device
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        dtype, device = ctx.like
        ones = torch.ones(1, dtype=dtype, device=device)
        return grads[0], F.pad(ones, (COUNTS - 1, 0))


def _record(
    output: Tensor, number: int, masks: list[Tensor], zeros: list[Tensor], args: Any, kwargs: Mapping[str, Any]
) -> Tensor:
    """The output of a call to hand on in its place; in the graph one operation, which dynamo does not look into."""
    if not output.requires_grad or not output.numel():
        return output
    tap = TAPS[number]
    return _tap(output, tap, _rule(tap.sight.function)(*args, **kwargs), masks, zeros)


def _tap(output: Tensor, tap: Tap, operation: Operation, masks: list[Tensor], zeros: list[Tensor]) -> Tensor:
    bare = dataclasses.replace(operation, input=_NONE, weight=_NONE, bias=None)
    return _Identity.apply(output, operation.input.detach(), tap, bare, len(masks), *masks, *zeros)


def _record_turned(
    output: Tensor,
    input: Tensor,
    part: Tensor,
    number: int,
    weight: Tensor,
    masks: list[Tensor],
    zeros: list[Tensor],
) -> Tensor:
    """The same of a product with what may be the transpose of a layer's weight."""
    if part._base is not weight:
        return output
    if part.stride() != weight.stride()[::-1]:
        return _read(output, zeros[-1])
    if not output.requires_grad or not output.numel():
        return output
    return _tap(output, TAPS[number], Operation("linear", input, weight, None), masks, zeros)


def _read(output: Tensor, zero: Tensor) -> Tensor:
    """The same of what another operation makes of a layer's parameter.

    Where a graph runs as Python, an observer sees that by itself.
    """
    return output if type(output) is Tensor or not output.requires_grad else _Reading.apply(output, zero)


def _read_turned(output: Tensor, part: Tensor, weights: list[Tensor], zeros: list[Tensor]) -> Tensor:
    """The same where an operation has a matrix that may be the transpose of a layer's weight.

    Dynamo asks no mode for attributes of tensors, such as `weight.T`.
    """
    for weight, zero in zip(weights, zeros, strict=True):
        if part._base is weight and part.requires_grad:
            return _read(output, zero)
    return output


def _rule(function: Function) -> Callable[..., Operation]:
    return LOOKUPS[function] if function in LOOKUPS else RULES[function]


def tapped(
    table: Table,
    lookups: Table,
    readers: dict[int, Tensor],
    turned: Turned,
    products: Products,
    masks: list[Tensor],
    func: Function,
    args: Any,
    kwargs: Mapping[str, Any],
) -> Any:
    """Run a function of torch, with a tap where it applies a layer; traced by dynamo.

    Args:
        table, lookups, readers, turned, products, masks: of the step's `Taps`.
        func, args, kwargs: the call.
    """
    # Written in Python, with a call of its super's that torch 2.9 does not trace.
    func = torch.unflatten if func is Tensor.unflatten else func
    output = func(*args, **kwargs)
    weight = args[1] if len(args) > 1 else kwargs.get("weight")
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    leaves = [*args, *kwargs.values()]
    # The identity of anything that is made within the graph is not known to dynamo.
    if isinstance(weight, nn.Parameter):
        found = (lookups if func is F.embedding else table).get(id(weight))
        if found is not None and func is found[2]:
            own = None if found[3] is None else (id(bias) if isinstance(bias, nn.Parameter) else 0)
            if own == found[3]:
                output = _record(output, found[0], masks, found[1], args, kwargs)
                leaves = [args[0] if args else kwargs.get("input")]
    taken: list[int] = []  # numbers of taps that take the call if it is one of their layers
    if products and _multiplies(func) and len(args) == 2 and isinstance(weight, Tensor) and weight.dim() == 2:
        for rows, columns, number, zeros in products.values():
            if weight.shape[0] == rows and weight.shape[1] == columns and isinstance(args[0], Tensor):
                taken.append(number)
                output = _record_turned(output, args[0], weight, number, WEIGHTS[number], masks, zeros)
    turns = len(products) > 0 and _transposes(func)
    for leaf in leaves:
        for part in leaf if isinstance(leaf, _LISTS) else (leaf,):
            if isinstance(part, nn.Parameter):
                zero = readers.get(id(part))
                # Who reads the transpose of a layer's weight is seen where they do.
                if zero is not None and not (turns and id(part) in products):
                    output = _noted(output, zero)
            elif isinstance(part, Tensor) and isinstance(output, Tensor) and part.dim() == 2:
                for rows, columns, numbers, counts in turned:
                    if part.shape[0] == rows and part.shape[1] == columns:
                        others = [k for k, number in enumerate(numbers) if number not in taken]
                        weights = [WEIGHTS[numbers[k]] for k in others]
                        output = _read_turned(output, part, weights, [counts[k] for k in others])
    return output


def _multiplies(func: Function) -> bool:
    return any(func is product for product in TURNED)


def _transposes(func: Function) -> bool:
    return any(func is transposes for transposes in _TRANSPOSES)


def _noted(output: Any, zero: Tensor) -> Any:
    """The output of an operation to hand on where it is none of a layer, and reads the layer's parameters."""
    if isinstance(output, Tensor):
        return _read(output, zero)
    if type(output) is tuple:
        return tuple([_noted(item, zero) for item in output])
    return output


def lacking() -> str | None:
    """The first part of torch's compiler without which there are no taps, if this torch lacks one."""
    for module, name in _NEEDED:
        try:
            found = hasattr(importlib.import_module(module), name)
        except ImportError:
            found = False
        if not found:
            return f"{module}.{name}"
    return None


@functools.cache
def leave_whole() -> None:
    """Have dynamo take `_record` as one operation; it is loaded when a model that it compiled is seen."""
    torch.compiler.allow_in_graph(_record)
    torch.compiler.allow_in_graph(_record_turned)
    torch.compiler.allow_in_graph(_read)
    torch.compiler.allow_in_graph(_read_turned)


@functools.cache
def leave_uncompiled(function: Callable[..., Any]) -> None:
    """Have dynamo leave out the frames of a function, which it still traces within the graphs of others.

    Where a graph breaks, it would compile a mode's handler by itself, and torch 2.9 then takes the getter of one
    property for that of another.
    """
    from torch._dynamo import eval_frame

    eval_frame.skip_code(function.__code__)
