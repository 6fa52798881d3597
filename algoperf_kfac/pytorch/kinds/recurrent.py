"""LSTM, GRU and RNN as linear layers that share their weight over time steps.

The gates of one direction see

    s_t = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh

so W_ih and W_hh are two layers with the same output gradient delta_t = dL/ds_t and with inputs [x_t; 1] and
[h_{t-1}; 1]: each bias is the homogeneous coordinate of its own weight. Everything runs in one fused operation that
shows none of this. It is called on the gates' inputs u_t = W_ih x_t + b_ih instead of x_t, with the identity as its
W_ih: the outputs are the same, u_t is an ordinary linear layer, and the gradient of u_t is delta_t.

A GRU multiplies what the hidden state adds to its candidate by the reset gate r_t; so is that part of delta_t, for
W_hh. The reset gate is computed once more from what went into it. Layers run one by one: dropout between them is
drawn in its own operation, from the same distribution as in the fused one, not in the same numbers.

Cells are written out: what they apply are linear layers by themselves.
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
    from algoperf_kfac.pytorch.observer import Observer


FUSED = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})
CELLS = frozenset(f"{name}_cell" for name in FUSED)


class Recurrent(Kind):
    """Two layers for each direction of a `torch.nn.LSTM`, GRU or RNN, or a cell of these: on the inputs, and on the
    previous hidden state."""

    def cover(self, site: Site) -> Found | None:
        module, name = site.module, type(site.module).__name__
        if not isinstance(module, nn.RNNBase | nn.RNNCellBase):
            return None
        if isinstance(module, nn.RNNBase) and module.proj_size:
            return Found([], f"recurrent ({name}): its outputs are projected")
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
                parts=1 if len(weight) <= site.config.max_factor_dim else len(weight) // module.hidden_size,
            )
            if spec.has_factors:
                layers.append(CoveredLayer(spec, weight, bias))
        return Found(layers, f"recurrent ({name}): its weight is frozen, parametrised or above max_factor_dim")

    def watch(self, observer: Observer) -> Watch:
        return _RecurrentWatch(observer)


class _RecurrentWatch(Watch):
    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def called(self, called: Called) -> Any:
        if not torch.is_grad_enabled():
            return NotImplemented
        if called.name in CELLS and not called.kwargs and len(called.args) >= 4:
            if any(self._observer.spec_of(weight) for weight in called.args[2:4]):
                return self._observer.see(_CELLS[called.name], *called.args)
            return NotImplemented
        call = parse(called) if called.name in FUSED else None
        if call is None or not any(self._observer.spec_of(weight) for weight in call.weights):
            return NotImplemented
        self._note_uses(call)
        return run(call, self._record)

    def _note_uses(self, call: FusedCall) -> None:
        """Parameters that a call reads and no layer of it has: learned states, weights computed before."""
        uses, name = self._observer.uses, call.name
        uses.miss(call.input, f"{name} as its input")
        for state in call.states:
            uses.miss(state, f"{name} as its initial state")
        for d in (d for directions in call.layers for d in directions):
            for weight, bias in ((d.weight_ih, d.bias_ih), (d.weight_hh, d.bias_hh)):
                if self._observer.spec_of(weight) is None:
                    computed = "" if isinstance(weight, nn.Parameter) else " as a weight computed before its use"
                    uses.miss(weight, f"{name}{computed}")
                    uses.miss(bias, f"{name} as its bias")

    def _record(self, operation: Operation, output: Tensor, rows: Steps) -> Tensor:
        observer = self._observer
        spec = observer.spec_of(operation.weight)
        if spec is None:
            return output
        return observer.record(
            spec, operation, output, rows.positions(observer.candidates(spec, Rows(rows.leading)))
        )


@dataclasses.dataclass
class Direction:
    """The parameters of one direction of one layer with G gates: (G H, P_in), (G H, H), (G H,) and (G H,)."""

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
class FusedCall:
    """A call of the fused operation.

    Attributes:
        name: "lstm", "gru", "rnn_tanh" or "rnn_relu".
        input: (N, T, P), (T, N, P) or packed (rows, P).
        batch_sizes: (T,) on the host, of a packed input.
        states: initial h, and c of an LSTM, (layers x directions, N, H) each.
        layers: the directions of each layer.
        batch_first: whether the input is (N, T, P).
        dropout: share of the outputs of each layer but the last that is dropped.
    """

    name: str
    input: Tensor
    batch_sizes: Tensor | None
    states: tuple[Tensor, ...]
    layers: list[list[Direction]]
    batch_first: bool
    dropout: float

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
    steps, total, host = len(batch_sizes), int(batch_sizes.sum()), batch_sizes.device
    starts = batch_sizes.cumsum(0) - batch_sizes
    t = torch.arange(steps, device=host).repeat_interleave(batch_sizes, output_size=total)
    example = torch.arange(total, device=host) - starts[t]
    initial = total + example
    before = torch.where(t > 0, starts[(t - 1).clamp(min=0)] + example, initial)
    nxt = (t + 1).clamp(max=steps - 1)
    goes_on = (t + 1 < steps) & (example < batch_sizes[nxt])
    after = torch.where(goes_on, starts[nxt] + example, initial)
    index = torch.stack([before, after]).to(device, non_blocking=True)
    return Steps((total,), example.to(device, non_blocking=True), int(batch_sizes[0]), index)


def parse(called: Called) -> FusedCall | None:
    """Read the arguments of the fused operation; None for a form without a rule (projections, keywords)."""
    args = called.args
    if called.kwargs or len(args) != 9:
        return None
    packed = isinstance(args[1], Tensor) and args[1].dim() == 1
    data, batch_sizes = (args[0], args[1]) if packed else (args[0], None)
    states, params, has_biases, num_layers, dropout, train, bidirectional = args[1 + packed : 8 + packed]
    size = 4 if has_biases else 2
    if len(params) != num_layers * (1 + bidirectional) * size:
        return None
    directions = [Direction(*params[i : i + size]) for i in range(0, len(params), size)]
    step = 1 + bidirectional
    layers = [directions[i : i + step] for i in range(0, len(directions), step)]
    states = (states,) if isinstance(states, Tensor) else tuple(states)
    batch_first = False if packed else args[8]
    return FusedCall(called.name, data, batch_sizes, states, layers, batch_first, float(dropout) if train else 0.0)


def run(call: FusedCall, record: Callable[[Operation, Tensor, Steps], Tensor]) -> tuple[Tensor, ...]:
    """What the fused operation returns: outputs and final states.

    Args:
        call: the call.
        record: takes each linear layer inside with its output, and gives the output to go on with.
    """
    rows = call.rows()
    x, final = call.input, []
    fused = getattr(torch, call.name)
    for i, directions in enumerate(call.layers):
        if i and call.dropout:
            x = F.dropout(x, call.dropout)
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
            given = states if call.name == "lstm" else states[0]
            if call.batch_sizes is None:
                x, *last = fused(inputs, given, *settings, call.batch_first)
            else:
                x, *last = fused(inputs, call.batch_sizes, given, *settings)
        final.append(last)
        with torch.no_grad():
            outputs = x.detach().chunk(len(directions), -1)
            before = [
                call.previous(h, state.detach(), rows, reverse=bool(k))
                for k, (h, state) in enumerate(zip(outputs, states[0], strict=True))
            ]
        for d, h, u in zip(directions, before, gates, strict=True):
            operation = Operation("linear", h, d.weight_hh, d.bias_hh)
            if call.name == "gru":
                operation.arrange = _reset(h, u, d)
            record(operation, u, rows)
    return x, *(torch.cat(parts) for parts in zip(*final, strict=True))


def _reset(h: Tensor, u: Tensor, d: Direction) -> Callable[[Tensor], Tensor]:
    """Gradients of a GRU's gates (rows, 3 H) -> of what W_hh adds to them: the candidate's times the reset gate.

    Args:
        h: (rows, H) previous hidden states.
        u: (rows, 3 H) what the inputs add to the gates.
        d: the direction.
    """
    with torch.no_grad():
        weight, bias = d.weight_hh[: h.shape[1]], None if d.bias_hh is None else d.bias_hh[: h.shape[1]]
        gate = (u.detach()[:, : h.shape[1]] + F.linear(h, weight, bias)).sigmoid()

    def arrange(grad: Tensor) -> Tensor:
        r, z, n = grad.chunk(3, -1)
        return torch.cat([r, z, n * gate.to(n.dtype)], -1)

    return arrange


# The cells: inputs (N, P), states (N, H), weights and biases as in `Direction`.

Bias = Tensor | None


def _lstm_cell(
    x: Tensor, states: Sequence[Tensor], w_ih: Tensor, w_hh: Tensor, b_ih: Bias = None, b_hh: Bias = None
) -> tuple[Tensor, Tensor]:
    h, c = states
    i, f, g, o = (F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh)).chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru_cell(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Bias = None, b_hh: Bias = None) -> Tensor:
    (r, z, n), (of_r, of_z, of_n) = F.linear(x, w_ih, b_ih).chunk(3, 1), F.linear(h, w_hh, b_hh).chunk(3, 1)
    z = (z + of_z).sigmoid()
    n = (n + (r + of_r).sigmoid() * of_n).tanh()
    return n + z * (h - n)


def _rnn_cell(activation: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def cell(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Bias = None, b_hh: Bias = None) -> Tensor:
        return activation(F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh))

    return cell


_CELLS: Mapping[str, Callable[..., Any]] = {
    "lstm_cell": _lstm_cell,
    "gru_cell": _gru_cell,
    "rnn_tanh_cell": _rnn_cell(torch.tanh),
    "rnn_relu_cell": _rnn_cell(torch.relu),
}
