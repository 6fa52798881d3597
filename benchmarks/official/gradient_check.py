"""G^T A = dL/dW: the inputs and output gradients K-FAC captured give back the weight's gradient, by layer.

This finds every lost hook, every call that was missed and every wrong unfolding, on any model. It listens to what
the capture hands to its recorders, so it sees what the factors are made of and not a second measurement. Of layers
whose sums are formed within compiled graphs it has the graph hand on what these are formed of: an operation more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algoperf_kfac.layers import LayerSpec
from algoperf_kfac.pytorch import compiled, factors
from algoperf_kfac.pytorch.geometry import ConvGeometry
from algoperf_kfac.pytorch.recorder import Recorder
from benchmarks.official.replacing import replaced
from submissions.common.api import Tree

# Who listens to compiled graphs; and of what layers and calls they were made, by the number of their tap.
_LISTENERS: list[CapturedGradients] = []
_MADE_OF: dict[int, tuple[LayerSpec, Tree]] = {}
_TRACED = False  # whether a graph is being made


@torch.library.custom_op(
    "algoperf_kfac_official::hand_on", mutates_args=(), schema="(int tap, Tensor input, Tensor grad) -> Tensor"
)
def _hand_on(tap: int, input: Tensor, grad: Tensor) -> Tensor:
    """Zero, for the graph to add to something, lest it drop the operation."""
    for listener in _LISTENERS:
        spec, conv = _MADE_OF[tap]
        listener._add(spec, input, grad, conv)
    return grad.new_zeros(())


@_hand_on.register_fake
def _(tap: int, input: Tensor, grad: Tensor) -> Tensor:
    return grad.new_empty(())


@contextlib.contextmanager
def handing_on() -> Iterator[None]:
    """Graphs with statistics that are made in this context hand on what these are formed of."""
    form_sums = compiled.Tap.sums

    def sums(tap: Tree, operation: Tree, masks: Tree, grad: Tensor) -> list[Tensor]:
        global _TRACED
        _TRACED = True
        try:
            *blocks, numbers = form_sums(tap, operation, masks, grad)
        finally:
            _TRACED = False
        _MADE_OF[tap.number] = tap.spec, operation.geometry(grad)
        with torch.no_grad():
            return [*blocks, numbers + _hand_on(tap.number, operation.input, grad)]

    with replaced(compiled.Tap, "sums", sums):
        yield


class CapturedGradients:
    """For each captured layer, sum_n sum_r g a^T with the bias as last column, (groups, P_out, P_in [+ 1]).

    Summed in float64. The gradient it is compared with was summed in float32 by autograd and may have lost digits
    where terms cancel, so that each layer's rounding bound is kept, too: float32's epsilon times sum_n sum_r |g|
    |a|^T. That is what one rounding does to each term; sums of many terms may lose more. So of a convolution the
    gradient is formed a second and a third time, by PyTorch's own backward pass from what was captured: in float32,
    as autograd did, and in float64, where no digits are lost.
    """

    def __init__(self) -> None:
        self.again: dict[str, tuple[Tensor, Tensor]] = {}  # in float32 and float64
        self.sums: dict[str, Tensor] = {}
        self.magnitudes: dict[str, Tensor] = {}
        self.specs: dict[str, LayerSpec] = {}

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Listens to every capture made in this context, but to graphs only if they were made in `handing_on`."""
        record_input, record_gradient = Recorder.input, Recorder.output_gradient
        inputs: dict[int, tuple[Tree, Tree]] = {}

        def input_(recorder: Tree, operation: Tree, *rest: Tree) -> Tree:
            call = record_input(recorder, operation, *rest)
            if not _TRACED:
                # The call is kept, so its id stays its own.
                inputs[id(call)] = call, operation.input.detach().clone()
            return call

        def output_gradient(recorder: Tree, call: Tree, grad: Tensor) -> None:
            record_gradient(recorder, call, grad)
            if not _TRACED:
                self._add(recorder.spec, inputs.pop(id(call))[1], grad, call.conv)

        with replaced(Recorder, "input", input_), replaced(Recorder, "output_gradient", output_gradient):
            _LISTENERS.append(self)
            try:
                yield
            finally:
                _LISTENERS.remove(self)

    def _add(self, spec: LayerSpec, x: Tensor, grad: Tensor, conv: Tree) -> None:
        if x.dtype in (torch.int32, torch.int64):  # a lookup: the inputs are one-hot rows
            total = torch.zeros(1, spec.out_dim, spec.in_dim, dtype=torch.float64)
            total[0].index_add_(0, x.flatten(), grad.reshape(-1, spec.in_dim).double())
            self._sum(spec, total, total.abs())
            return
        if x.dim() == (1 if conv is None else len(conv.kernel) + 1):
            x, grad = x.unsqueeze(0), grad.unsqueeze(0)
        if conv is not None:
            before = self.again.get(spec.name, (0, 0))
            formed = [_backward(x.to(t), grad.to(t), conv, spec) for t in (x.dtype, torch.float64)]
            self.again[spec.name] = before[0] + formed[0], before[1] + formed[1]
        rows = factors.output_rows(grad, spec.groups, conv)
        total = torch.zeros(spec.groups, spec.out_dim, spec.factor_in_dim, dtype=torch.float64)
        magnitude = torch.zeros_like(total)
        for chunk, inputs in factors.input_chunks(x, spec.groups, conv):
            a = inputs.flatten(0, 1).transpose(0, 1).double()  # (groups, rows, P_in)
            g = rows[chunk].flatten(0, 1).transpose(0, 1).double()
            total[..., : spec.in_dim] += g.transpose(1, 2) @ a
            magnitude[..., : spec.in_dim] += g.transpose(1, 2).abs() @ a.abs()
            if spec.bias is not None:
                total[..., -1] += g.sum(1)
                magnitude[..., -1] += g.abs().sum(1)
        self._sum(spec, total, magnitude)

    def _sum(self, spec: LayerSpec, total: Tensor, magnitude: Tensor) -> None:
        if spec.name in self.sums:
            total, magnitude = total + self.sums[spec.name], magnitude + self.magnitudes[spec.name]
        self.sums[spec.name], self.magnitudes[spec.name], self.specs[spec.name] = total, magnitude, spec

    def errors(self, model: nn.Module) -> tuple[Mapping[str, float], Mapping[str, float]]:
        """Each layer's error against `.grad`, and its rounding bound, relative to the gradient's Frobenius norm."""
        errors, bounds = {}, {}
        for name, total in self.sums.items():
            norm = total.norm().clamp(min=1e-30)
            errors[name] = float((total - self._gradient(model, name)).norm() / norm)
            bounds[name] = float(torch.finfo(torch.float32).eps * self.magnitudes[name].norm() / norm)
        return errors, bounds

    def convolution_errors(self, model: nn.Module) -> Mapping[str, tuple[float, float]]:
        """Of each convolution, how far the gradients are that its backward pass makes of what was captured.

        In float32 from `.grad`, in float64 from sum_n sum_r g a^T; both relative to the norm of this.
        """
        errors = {}
        for name, (single, double) in self.again.items():
            total = self.sums[name]
            norm = total.norm().clamp(min=1e-30)
            off = (single - self._gradient(model, name)).norm() / norm, (double - total).norm() / norm
            errors[name] = float(off[0]), float(off[1])
        return errors

    def _gradient(self, model: nn.Module, name: str) -> Tensor:
        """A layer's `.grad`, (groups, P_out, P_in [+ 1])."""
        spec, parameters = self.specs[name], dict(model.named_parameters(remove_duplicate=False))
        weight = parameters[spec.weight].grad
        assert weight is not None
        return factors.to_matrix(weight, None if spec.bias is None else parameters[spec.bias].grad, spec)


def _backward(x: Tensor, grad: Tensor, conv: ConvGeometry, spec: LayerSpec) -> Tensor:
    """(groups, P_out, P_in [+ 1]): what PyTorch makes of a convolution's input and output gradient."""
    channels, left_over = (grad.shape[1], x.shape[1] // spec.groups), [0] * len(conv.kernel)
    sizes = zip(conv.in_size, conv.out_size, conv.stride, conv.dilation, conv.kernel, conv.padding, strict=True)
    if conv.transposed:
        channels = x.shape[1], grad.shape[1] // spec.groups
        left_over = [out - ((n - 1) * s + d * (k - 1) + 1 - 2 * p) for n, out, s, d, k, p in sizes]
    else:  # padding="same" may put one zero more behind than in front
        behind = [max(0, s * (out - 1) + d * (k - 1) + 1 - n - 2 * p) for n, out, s, d, k, p in sizes]
        x = F.pad(x, [pad for more in reversed(behind) for pad in (0, more)]) if any(behind) else x
    weight = x.new_empty(*channels, *conv.kernel)
    _, weight, bias = torch.ops.aten.convolution_backward(
        grad, x, weight, [grad.shape[1]], conv.stride, conv.padding, conv.dilation, conv.transposed, left_over,
        spec.groups, (False, True, spec.bias is not None),
    )  # fmt: skip
    return factors.to_matrix(weight, bias, spec)
