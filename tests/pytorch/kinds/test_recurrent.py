"""GRU, RNN and their cells beside the same recurrences written with nn.Linear."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from algoperf_kfac.pytorch import KFAC
from tests.pytorch.toys import assert_same_factors, capture_once, covered, reasons

FEATURES, HIDDEN, STEPS = 4, 3, 5
GATES = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1, nn.LSTMCell: 4, nn.GRUCell: 3, nn.RNNCell: 1}
APPROXIMATIONS = pytest.mark.parametrize("approximation", ["expand", "reduce"])


class Written(nn.Module):
    """One direction over (N, T, FEATURES), step by step; steps are kept as they would be in one call."""

    def __init__(self, like: nn.RNNBase | nn.RNNCellBase, end: str = "") -> None:
        super().__init__()
        gates = GATES[type(like)]
        self.kind, self.backwards = gates, end.endswith("reverse")
        self.relu = getattr(like, "nonlinearity", "tanh") == "relu"
        self.ih = nn.Linear(getattr(like, f"weight_ih{end}").shape[1], gates * HIDDEN)
        self.hh = nn.Linear(HIDDEN, gates * HIDDEN)
        with torch.no_grad():
            for part in ("ih", "hh"):
                getattr(self, part).weight.copy_(getattr(like, f"weight_{part}{end}"))
                getattr(self, part).bias.copy_(getattr(like, f"bias_{part}{end}"))

    def forward(self, x: Tensor) -> Tensor:
        h, c, outputs = x.new_zeros(len(x), HIDDEN), x.new_zeros(len(x), HIDDEN), []
        for x_t in reversed(x.unbind(1)) if self.backwards else x.unbind(1):
            u, s = self.ih(x_t), self.hh(h)
            if self.kind == 4:
                i, f, g, o = (u + s).chunk(4, 1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
            elif self.kind == 3:
                r, z = (u + s)[:, : 2 * HIDDEN].sigmoid().chunk(2, 1)
                n = (u[:, 2 * HIDDEN :] + r * s[:, 2 * HIDDEN :]).tanh()
                h = (1 - z) * n + z * h
            else:
                h = (u + s).relu() if self.relu else (u + s).tanh()
            outputs.append(h)
        return torch.stack(outputs[::-1] if self.backwards else outputs, 1)


class Deep(nn.Module):
    """Layers and directions of such."""

    def __init__(self, like: nn.RNNBase) -> None:
        super().__init__()
        ends = ("", "_reverse")[: 1 + like.bidirectional]
        self.layers = nn.ModuleList(
            nn.ModuleList(Written(like, f"_l{k}{end}") for end in ends) for k in range(like.num_layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for directions in self.layers:
            x = torch.cat([direction(x) for direction in directions], -1)
        return x


def loss(y: Tensor) -> Tensor:
    return (y.sin() + 3 * y**2).mean()


def names(module: nn.RNNBase) -> dict[str, str]:
    ends = ("", "_reverse")[: 1 + module.bidirectional]
    return {
        f"weight_{part}_l{k}{end}": f"layers.{k}.{i}.{part}"
        for part in ("ih", "hh")
        for k in range(module.num_layers)
        for i, end in enumerate(ends)
    }


@APPROXIMATIONS
@pytest.mark.parametrize(
    "module",
    [
        nn.GRU(FEATURES, HIDDEN, batch_first=True),
        nn.GRU(FEATURES, HIDDEN, num_layers=2, bidirectional=True, batch_first=True),
        nn.RNN(FEATURES, HIDDEN, bidirectional=True, batch_first=True),
        nn.RNN(FEATURES, HIDDEN, nonlinearity="relu", batch_first=True),
        nn.LSTM(FEATURES, HIDDEN, num_layers=2, batch_first=True),
    ],
    ids=["GRU", "deep GRU", "RNN", "RNN with relu", "LSTM"],
)
def test_factors_and_steps(module: nn.RNNBase, approximation: str) -> None:
    module = copy.deepcopy(module).double()
    twin, x = Deep(module), torch.randn(6, STEPS, FEATURES)
    mine = capture_once(module, lambda m: loss(m(x)[0]), approximation=approximation)
    theirs = capture_once(twin, lambda m: loss(m(x)), approximation=approximation)
    assert mine.coverage().fraction == 1
    assert_same_factors(mine.factors(), theirs.factors(), names(module), rtol=1e-9, atol=1e-12)
    after = dict(twin.named_parameters())
    for name, other in names(module).items():
        torch.testing.assert_close(module.get_parameter(name), after[f"{other}.weight"], rtol=1e-7, atol=1e-10)
        assert mine.metrics()[f"{name}/gradient_error"] < 1e-9


@pytest.mark.parametrize("kind", [nn.GRU, nn.RNN])
def test_packed_sequences_have_the_whole_gradient(kind: type[nn.RNNBase]) -> None:
    module, x = (
        kind(FEATURES, HIDDEN, num_layers=2, bidirectional=True, batch_first=True),
        torch.randn(4, 5, FEATURES),
    )
    packed = pack_padded_sequence(x, torch.tensor([3, 5, 1, 4]), True, enforce_sorted=False)
    want = pad_packed_sequence(module(packed)[0], True)[0].detach()

    def run(m: nn.Module) -> Tensor:
        y = pad_packed_sequence(m(packed)[0], True)[0]
        torch.testing.assert_close(y, want)
        return loss(y)

    optimizer = capture_once(module, run)
    assert all(optimizer.metrics()[f"{name}/gradient_error"] < 1e-9 for name in covered(optimizer))
    counts = {float(s.examples / s.weight) for s in optimizer._layers.states.values()}
    assert counts == {4.0}


@APPROXIMATIONS
@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells(cell: type[nn.RNNCellBase], approximation: str) -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = cell(FEATURES, HIDDEN)

        def forward(self, x: Tensor) -> Tensor:
            state, outputs = None, []
            for x_t in x.unbind(1):
                state = self.cell(x_t, state)
                outputs.append(state[0] if isinstance(state, tuple) else state)
            return torch.stack(outputs, 1)

    model, x = Loop(), torch.randn(6, STEPS, FEATURES)
    twin, want = Written(model.cell), model(x).detach()

    def run(m: nn.Module) -> Tensor:
        y = m(x)
        torch.testing.assert_close(y, want)
        return loss(y)

    mine, theirs = (capture_once(net, run, approximation=approximation) for net in (model, twin))
    assert mine.coverage().fraction == 1
    parts = {"cell.weight_ih": "ih", "cell.weight_hh": "hh"}
    assert_same_factors(mine.factors(), theirs.factors(), parts, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(model.cell.weight_hh, twin.hh.weight, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(model.cell.bias_ih, twin.ih.bias, rtol=1e-7, atol=1e-10)


def test_dropout_between_layers_has_the_right_share() -> None:
    """Drawn in an operation of its own; in evaluation there is none."""
    module, x = (
        nn.GRU(FEATURES, HIDDEN, num_layers=2, dropout=0.5, batch_first=True),
        torch.randn(64, STEPS, FEATURES),
    )
    optimizer = KFAC(module)
    with optimizer.capture():
        loss(module(x)[0]).backward()
    optimizer.step()
    assert all(optimizer.metrics()[f"{name}/gradient_error"] < 1e-9 for name in covered(optimizer))
    a = optimizer.factors()["weight_ih_l1"].A
    hidden = optimizer.factors()["weight_hh_l0"].A
    # Kept outputs are doubled: of a mean of squares over the same states a half, four times as large.
    assert 1.5 < float(a[:HIDDEN, :HIDDEN].trace() / hidden[:HIDDEN, :HIDDEN].trace()) < 3.5
    module.eval()
    want = module(x)[0]
    with KFAC(module).capture():
        got = module(x)[0]
        loss(got).backward()
    torch.testing.assert_close(got, want)


class Learned(nn.Module):
    """Initial states are learned, and what acts on the previous state loses some of its weights (AWD-LSTM)."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.recurrent, self.head = kind(FEATURES, HIDDEN, batch_first=True), nn.Linear(HIDDEN, 2)
        self.h, self.c = nn.Parameter(torch.randn(1, 1, HIDDEN)), nn.Parameter(torch.randn(1, 1, HIDDEN))
        weight = self.recurrent.weight_hh_l0
        del self.recurrent._parameters["weight_hh_l0"]
        self.raw = nn.Parameter(weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        module = self.recurrent
        module.weight_hh_l0 = nn.functional.dropout(self.raw, 0.5)
        module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
        h, c = (state.expand(-1, len(x), -1).contiguous() for state in (self.h, self.c))
        return self.head(module(x, (h, c) if isinstance(module, nn.LSTM) else h)[0][:, -1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_what_is_read_beside_the_layers_is_said(kind: type[nn.RNNBase]) -> None:
    optimizer = capture_once(Learned(kind), lambda m: m(torch.randn(8, STEPS, FEATURES)).square().mean())
    assert covered(optimizer) == {"recurrent.weight_ih_l0", "head"}
    name, frozen = kind.__name__.lower(), "its weight is frozen, parametrised or above max_factor_dim"
    state = f"read by {name} as its initial state, which has no rule"
    assert reasons(optimizer) == {
        "h": state,
        "c": state if kind is nn.LSTM else "no operation with a rule reads it",
        "raw": f"read by {name} as a weight computed before its use, which has no rule",
        "recurrent.bias_hh_l0": f"recurrent ({kind.__name__}): {frozen}",
    }
