"""An LSTM's factors against a loop over its time steps, and its weight gradients rebuilt from what is captured."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from algoperf_kfac.pytorch import KFAC, Positions
from algoperf_kfac.pytorch.recorder import Recorder
from tests.math import naive
from tests.math.support import assert_equal

APPROXIMATIONS = pytest.mark.parametrize("approximation", ["expand", "reduce"])
LENGTHS = [3, 5, 1, 4]
PARTS = (("ih", 4), ("hh", 3))  # weight and number of inputs


@dataclasses.dataclass
class Trace:
    """What one direction of one layer saw of one example: (T, P) each; the gates' gradients are the deltas."""

    inputs: Tensor
    previous: Tensor
    gates: list[Tensor]


def direction(lstm: nn.LSTM, suffix: str, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Trace]:
    """One direction over one example (T, P), step by step; `suffix` as in the parameters' names."""
    weights = {k: getattr(lstm, f"{k}_{suffix}", None) for k in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    zero = torch.zeros(())
    outputs, previous, gates = [], [], []
    for x_t in reversed(x) if suffix.endswith("reverse") else x:
        previous.append(h.detach())
        s = weights["weight_ih"] @ x_t + weights["weight_hh"] @ h
        s = s + (zero if not lstm.bias else weights["bias_ih"] + weights["bias_hh"])
        gates.append(s)
        i, f, g, o = s.chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    if suffix.endswith("reverse"):
        outputs, previous, gates = outputs[::-1], previous[::-1], gates[::-1]
    for s in gates:
        s.retain_grad()
    return torch.stack(outputs), Trace(x.detach(), torch.stack(previous), gates)


def loop(lstm: nn.LSTM, x: Tensor, states: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Trace]]:
    """All layers and directions over one example."""
    traces: dict[str, Trace] = {}
    row = 0
    for layer in range(lstm.num_layers):
        outputs = []
        for end in ("", "_reverse")[: 1 + lstm.bidirectional]:
            suffix = f"l{layer}{end}"
            y, traces[suffix] = direction(lstm, suffix, x, states[0][row], states[1][row])
            outputs.append(y)
            row += 1
        x = torch.cat(outputs, -1)
    return x, traces


def by_loops(
    lstm: nn.LSTM, parts: list[Tensor], states: tuple[Tensor, Tensor], approximation: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors by layer name over examples of different length, each its own loss."""
    seen = []
    for n, x in enumerate(parts):
        outputs, traces = loop(lstm, x, (states[0][:, n], states[1][:, n]))
        loss(outputs).backward()
        seen.append(traces)
    factors = {}
    for suffix in seen[0]:
        grads = [torch.stack([s.grad for s in traces[suffix].gates]).unsqueeze(1) for traces in seen]
        for part, field in (("ih", "inputs"), ("hh", "previous")):
            inputs = [getattr(traces[suffix], field).unsqueeze(1) for traces in seen]
            factors[f"weight_{part}_{suffix}"] = naive.factors(
                inputs, grads, bias=lstm.bias, approximation=approximation
            )
    return factors


def loss(outputs: Tensor) -> Tensor:
    return (outputs.sin() + 3 * outputs**2).sum()


def captured(lstm: nn.LSTM, run, approximation: str, **options) -> dict:
    optimizer = KFAC(lstm, approximation=approximation, learning_rate=0.0)
    optimizer.zero_grad()
    with optimizer.capture(loss_normalizer=1.0, **options):
        loss(run(lstm)).backward()
    optimizer.step()
    return optimizer.factors()


def sequences(features: int = 4) -> Tensor:
    return torch.randn(len(LENGTHS), max(LENGTHS), features)


def initial(lstm: nn.LSTM) -> tuple[Tensor, Tensor]:
    shape = (lstm.num_layers * (1 + lstm.bidirectional), len(LENGTHS), lstm.hidden_size)
    return torch.randn(shape), torch.randn(shape)


SETTINGS = pytest.mark.parametrize(
    "setting",
    [
        {},
        {"bidirectional": True},
        {"bias": False},
        {"num_layers": 2, "bidirectional": True},
        {"num_layers": 3, "batch_first": False},
    ],
    ids=["plain", "bidirectional", "without bias", "deep bidirectional", "deep, time first"],
)


def make(setting: dict) -> nn.LSTM:
    return nn.LSTM(4, 3, **{"batch_first": True, **setting})


@APPROXIMATIONS
@SETTINGS
def test_factors_of_sequences_of_one_length(setting: dict, approximation: str) -> None:
    lstm, x = make(setting), sequences()
    states = initial(lstm)

    def run(m: nn.LSTM) -> Tensor:
        return m(x if m.batch_first else x.transpose(0, 1), states)[0]

    got, want = captured(lstm, run, approximation), by_loops(lstm, list(x), states, approximation)
    assert got.keys() == want.keys()
    for name in want:
        assert_equal(got[name], want[name])


@APPROXIMATIONS
@SETTINGS
def test_factors_of_packed_sequences(setting: dict, approximation: str) -> None:
    """Lengths in no order; a step of an example that has ended is no position."""
    lstm, x = make(setting), sequences()
    states = initial(lstm)

    def run(m: nn.LSTM) -> Tensor:
        data = x if m.batch_first else x.transpose(0, 1)
        packed = pack_padded_sequence(data, torch.tensor(LENGTHS), m.batch_first, enforce_sorted=False)
        return m(packed, states)[0].data

    want = by_loops(lstm, [x[n, :length] for n, length in enumerate(LENGTHS)], states, approximation)
    for options in ({}, {"positions": "gradient"}):
        got = captured(lstm, run, approximation, **options)
        assert got.keys() == want.keys()
        for name in want:
            assert_equal(got[name], want[name])


@APPROXIMATIONS
def test_masks_of_padded_sequences(approximation: str) -> None:
    """Padding behind the end, seen by a forward LSTM but not by the loss: by mask and by gradient as by packing."""
    lstm, x = make({}), sequences()
    states = initial(lstm)
    mask = torch.arange(x.shape[1]) < torch.tensor(LENGTHS)[:, None]
    want = by_loops(lstm, [x[n, :length] for n, length in enumerate(LENGTHS)], states, approximation)

    def run(m: nn.LSTM) -> Tensor:
        return m(x, states)[0][mask]

    for positions in ("gradient", mask, Positions(mask=mask), {"weight*": mask}):
        got = captured(lstm, run, approximation, positions=positions)
        for name in want:
            assert_equal(got[name], want[name])


@SETTINGS
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_outputs_and_gradients_are_those_of_the_fused_operation(setting: dict, packed: bool) -> None:
    lstm, x = make(setting), sequences()

    def run(m: nn.LSTM) -> tuple[Tensor, ...]:
        data = x if m.batch_first else x.transpose(0, 1)
        if not packed:
            outputs, states = m(data)
        else:
            outputs, states = m(pack_padded_sequence(data, torch.tensor(LENGTHS), m.batch_first, False))
            outputs, _ = pad_packed_sequence(outputs, m.batch_first)
        return outputs, *states

    want = run(lstm)
    sum(loss(t) for t in want).backward()
    grads = {name: p.grad.clone() for name, p in lstm.named_parameters()}
    optimizer = KFAC(lstm)
    optimizer.zero_grad()
    with optimizer.capture():
        got = run(lstm)
        sum(loss(t) for t in got).backward()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    for name, p in lstm.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], rtol=1e-11, atol=1e-12)


@SETTINGS
def test_every_weight_gradient_is_what_was_captured(setting: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """G^T A = dL/dW, bias column included: nothing is missing, nothing counts twice."""
    pairs: dict[str, list[list]] = {}  # the call, its input, its output gradient
    recorded, returned = Recorder.input, Recorder.output_gradient

    def record(self, operation, *rest):
        call = recorded(self, operation, *rest)
        pairs.setdefault(self.spec.name, []).append([call, operation.input.detach()])
        return call

    def gradient(self, call, grad):
        next(pair for pair in pairs[self.spec.name] if pair[0] is call).append(grad)
        returned(self, call, grad)

    monkeypatch.setattr(Recorder, "input", record)
    monkeypatch.setattr(Recorder, "output_gradient", gradient)
    lstm, x = make(setting), sequences()
    optimizer = KFAC(lstm)
    with optimizer.capture():
        data = x if lstm.batch_first else x.transpose(0, 1)
        loss(lstm(pack_padded_sequence(data, torch.tensor(LENGTHS), lstm.batch_first, False))[0].data).backward()
    assert len(pairs) == lstm.num_layers * (1 + lstm.bidirectional) * 2
    for name, ((_, a, g),) in pairs.items():
        torch.testing.assert_close(g.T @ a, getattr(lstm, name).grad, rtol=1e-11, atol=1e-12)
        if lstm.bias:
            torch.testing.assert_close(
                g.sum(0), getattr(lstm, name.replace("weight", "bias")).grad, rtol=1e-11, atol=1e-12
            )
