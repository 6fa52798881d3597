"""An LSTM as linear layers that share their weight over time steps.

The gates of one direction see

    s_t = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh

so W_ih and W_hh are two layers with the same output gradient delta_t = dL/ds_t and with inputs [x_t; 1] and
[h_{t-1}; 1]: each bias is the homogeneous coordinate of its own weight. Everything runs in one fused operation that
shows none of this. It is called on the gates' inputs u_t = W_ih x_t + b_ih instead of x_t, with the identity as its
W_ih: the outputs are the same, u_t is an ordinary linear layer, and the gradient of u_t is delta_t.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algoperf_kfac.layers import make_spec
from algoperf_kfac.positions import BY_GRADIENT, Positions, Rows
from algoperf_kfac.pytorch.covered_layer import CoveredLayer
from algoperf_kfac.pytorch.kinds._base import Found, Kind, Site, Watch
from algoperf_kfac.pytorch.operations import Called, Operation

if TYPE_CHECKING:
    from algoperf_kfac.pytorch.capture import Capture


class LSTM(Kind):
    """Two layers for each direction of a `torch.nn.LSTM`: on the inputs, and on the previous hidden state."""

    def cover(self, site: Site) -> Found | None:
        if not isinstance(site.module, nn.LSTM):
            return None
        why = uncovered(site.module)
        if why:
            return Found([], why)
        layers = []
        for key, weight in site.params.items():
            if not key.startswith("weight") or site.is_shared(weight):
                continue
            bias = site.params.get(key.replace("weight", "bias"))
            if bias is not None and site.is_shared(bias):
                bias = None
            spec = make_spec(
                name=f"{site.path}.{key}" if site.path else key,
                kind="linear",
                weight=site.name_of(weight),
                bias=None if bias is None else site.name_of(bias),
                weight_shape=tuple(weight.shape),
                groups=1,
                in_dim=weight.shape[1],
                out_dim=weight.shape[0],
                config=site.config,
                # A block for each gate where all are too large.
                parts=1 if len(weight) <= site.config.max_factor_dim else 4,
            )
            if spec.has_factors:
                layers.append(CoveredLayer(spec, weight, bias))
        return Found(layers, "recurrent (LSTM): its weight is frozen, or above max_factor_dim")

    def watch(self, capture: Capture) -> Watch:
        return _LSTMWatch(capture)


class _LSTMWatch(Watch):
    def __init__(self, capture: Capture) -> None:
        self._capture = capture

    def called(self, called: Called) -> Any:
        if called.name != "lstm" or not torch.is_grad_enabled():
            return NotImplemented
        call = parse(called.args, called.kwargs)
        if call is None or not any(self._capture.spec_of(weight) for weight in call.weights):
            return NotImplemented
        return run(call, self._record)

    def _record(self, operation: Operation, output: Tensor, rows: Steps) -> Tensor:
        capture = self._capture
        spec = capture.spec_of(operation.weight)
        if spec is None:
            return output
        return capture.record(spec, operation, output, rows.positions(capture.candidates(spec, Rows(rows.leading))))


@dataclasses.dataclass
class Direction:
    """The parameters of one direction of one layer: (4 H, P_in), (4 H, H), (4 H,) and (4 H,)."""

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None = None
    bias_hh: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Steps:
    """How the rows of a flattened sequence belong together.

    Attributes:
        leading: the sequence's leading dimensions: (N, T), (T, N), or (rows,) where it is packed.
        segment_ids: (rows,): the example of each row.
        num_segments: N.
        index: packed only: (2, rows): for either direction, where the previous state lies among the rows and,
            behind them, the N initial states.
    """

    leading: tuple[int, ...]
    segment_ids: Tensor
    num_segments: int
    index: Tensor | None = None

    def positions(self, given: Sequence[Positions]) -> Positions:
        """What the user's description of positions comes to for the rows; masks that do not fit are left out."""
        mask: Tensor | str | None = None
        for p in given:
            if p.by_gradient:
                mask = BY_GRADIENT
            elif isinstance(p.mask, Tensor) and self.index is None:
                if tuple(p.mask.shape) == self.leading:
                    mask = p.mask.reshape(-1)
                elif tuple(p.mask.shape) == (self.num_segments,):
                    mask = p.mask[self.segment_ids]
            if mask is not None:
                break
        readout = given[0].readout if given else "mean"
        return Positions(mask, self.segment_ids, self.num_segments, readout=readout)


@dataclasses.dataclass
class LSTMCall:
    """A call of the fused operation.

    Attributes:
        input: (N, T, P), (T, N, P) or packed (rows, P).
        batch_sizes: (T,) on the host, of a packed input.
        states: initial h and c, (layers x directions, N, H) each.
        layers: the directions of each layer.
        batch_first: whether the input is (N, T, P).
    """

    input: Tensor
    batch_sizes: Tensor | None
    states: tuple[Tensor, Tensor]
    layers: list[list[Direction]]
    batch_first: bool

    @property
    def weights(self) -> Iterator[Tensor]:
        for directions in self.layers:
            for d in directions:
                yield from (d.weight_ih, d.weight_hh)

    def rows(self) -> Steps:
        leading, device = tuple(self.input.shape[:-1]), self.input.device
        if self.batch_sizes is not None:
            return _packed_rows(self.batch_sizes, device)
        n, steps = leading if self.batch_first else leading[::-1]
        examples = torch.arange(n, device=device)
        ids = examples.repeat_interleave(steps) if self.batch_first else examples.repeat(steps)
        return Steps(leading, ids, n)

    def previous(self, output: Tensor, state: Tensor, rows: Steps, *, reverse: bool) -> Tensor:
        """(rows, H): the hidden state that each step of one direction started from.

        Args:
            output: the direction's hidden states, like `input`.
            state: (N, H) initial state.
            rows: of `rows()`.
            reverse: whether the direction runs backwards in time.
        """
        if rows.index is not None:
            return torch.cat([output, state])[rows.index[int(reverse)]]
        time = 1 if self.batch_first else 0
        length, first = output.shape[time], state.unsqueeze(time)
        parts = (
            [output.narrow(time, 1, length - 1), first] if reverse else [first, output.narrow(time, 0, length - 1)]
        )
        return torch.cat(parts, time).reshape(-1, output.shape[-1])


def _packed_rows(batch_sizes: Tensor, device: torch.device) -> Steps:
    """Step t of a packed sequence holds the examples 0 to batch_sizes[t] - 1; all on the host, where they are."""
    steps, total = len(batch_sizes), int(batch_sizes.sum())
    starts = batch_sizes.cumsum(0) - batch_sizes
    t = torch.arange(steps).repeat_interleave(batch_sizes, output_size=total)
    example = torch.arange(total) - starts[t]
    initial = total + example
    before = torch.where(t > 0, starts[(t - 1).clamp(min=0)] + example, initial)
    nxt = (t + 1).clamp(max=steps - 1)
    goes_on = (t + 1 < steps) & (example < batch_sizes[nxt])
    after = torch.where(goes_on, starts[nxt] + example, initial)
    index = torch.stack([before, after]).to(device, non_blocking=True)
    return Steps((total,), example.to(device, non_blocking=True), int(batch_sizes[0]), index)


def uncovered(module: nn.LSTM) -> str:
    """Why the layers of an LSTM cannot be covered; empty if they can."""
    if module.proj_size:
        return "recurrent (LSTM): its outputs are projected"
    if module.num_layers > 1 and module.dropout:
        return "recurrent (LSTM): dropout between its layers is drawn inside the fused operation"
    return ""


def parse(args: Sequence[Any], kwargs: Mapping[str, Any]) -> LSTMCall | None:
    """Read the arguments of `torch.lstm`; None for a form without a rule (projections, dropout, keywords)."""
    if kwargs or len(args) != 9:
        return None
    packed = isinstance(args[1], Tensor)
    data, batch_sizes = (args[0], args[1]) if packed else (args[0], None)
    states, params, has_biases, num_layers, dropout, train, bidirectional = args[1 + packed : 8 + packed]
    size = 4 if has_biases else 2
    if len(params) != num_layers * (1 + bidirectional) * size or (dropout and train and num_layers > 1):
        return None
    directions = [Direction(*params[i : i + size]) for i in range(0, len(params), size)]
    step = 1 + bidirectional
    layers = [directions[i : i + step] for i in range(0, len(directions), step)]
    return LSTMCall(data, batch_sizes, tuple(states), layers, False if packed else args[8])


def run(call: LSTMCall, record: Callable[[Operation, Tensor, Steps], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What the fused operation returns: outputs and final states.

    Args:
        call: the call.
        record: takes each linear layer inside with its output, and gives the output to go on with.
    """
    rows = call.rows()
    x, final = call.input, []
    for i, directions in enumerate(call.layers):
        span = slice(i * len(directions), (i + 1) * len(directions))
        states = [s[span] for s in call.states]
        flat = x.reshape(-1, x.shape[-1])
        gates = []
        for d in directions:
            u = F.linear(flat, d.weight_ih, d.bias_ih).to(x.dtype)  # autocast narrows it
            u = u if u.requires_grad else u.requires_grad_()
            gates.append(record(Operation("linear", flat, d.weight_ih, d.bias_ih), u, rows))
        inputs = torch.cat(gates, 1).reshape(*x.shape[:-1], -1)
        params: list[Tensor] = []
        identities = torch.eye(inputs.shape[-1], dtype=x.dtype, device=x.device).chunk(len(directions))
        for d, identity in zip(directions, identities, strict=True):
            params += [identity, d.weight_hh]
            if d.bias_hh is not None:
                params += [torch.zeros_like(d.bias_hh), d.bias_hh]
        settings = (params, directions[0].bias_hh is not None, 1, 0.0, True, len(directions) > 1)
        with warnings.catch_warnings():
            # cuDNN copies weights that do not lie in one piece, and says so.
            warnings.filterwarnings("ignore", message=".*not part of single contiguous chunk.*")
            if call.batch_sizes is None:
                x, *last = torch.lstm(inputs, states, *settings, call.batch_first)
            else:
                x, *last = torch.lstm(inputs, call.batch_sizes, states, *settings)
        final.append(last)
        with torch.no_grad():
            outputs = x.detach().chunk(len(directions), -1)
            before = [
                call.previous(h, state.detach(), rows, reverse=bool(k))
                for k, (h, state) in enumerate(zip(outputs, states[0], strict=True))
            ]
        for d, h, u in zip(directions, before, gates, strict=True):
            record(Operation("linear", h, d.weight_hh, d.bias_hh), u, rows)
    h, c = (torch.cat(parts) for parts in zip(*final, strict=True))
    return x, h, c
