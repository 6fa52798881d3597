"""Small networks whose layers are compared with their exact Gauss-Newton block, as in `exactness_cases`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.paper.exactness_cases import SOFTMAX, SQUARED, Attention, Case, pairs, sharp

EXAMPLES, STEPS = 4, 5
WIDTH, CLASSES = 3, 3


class Recurrent(nn.Module):
    """h' = f(U x + W h), from h = 0; a head on each state, or on the last.

    Args:
        activation: f.
        last: whether the head sees the last state alone.
    """

    def __init__(self, activation: Callable[[Tensor], Tensor], *, last: bool) -> None:
        super().__init__()
        self.input, self.recurrent = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.activation, self.last = activation, last

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), WIDTH)
        states = []
        for inputs in x.unbind(1):
            state = self.activation(self.input(inputs) + self.recurrent(state))
            states.append(state)
        return self.head(state if self.last else torch.stack(states, 1))


class LSTM(nn.Module):
    """A long short-term memory of two linear layers of four gates each (Hochreiter and Schmidhuber 1997)."""

    def __init__(self, *, last: bool) -> None:
        super().__init__()
        self.input, self.recurrent = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        state = memory = x.new_zeros(len(x), WIDTH)
        states = []
        for inputs in x.unbind(1):
            entry, forget, exit_, new = (self.input(inputs) + self.recurrent(state)).chunk(4, -1)
            memory = forget.sigmoid() * memory + entry.sigmoid() * new.tanh()
            state = exit_.sigmoid() * memory.tanh()
            states.append(state)
        return self.head(state if self.last else torch.stack(states, 1))


class Reader(nn.Module):
    """One query looks at a memory of several entries: its own projections share their weight over nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        looking, memory = x[:, 0], x[:, 1:]
        scores = 2 * torch.einsum("nd,nsd->ns", self.query(looking), self.key(memory))
        seen = torch.einsum("ns,nsd->nd", scores.softmax(-1), self.value(memory))
        out: Tensor = self.out(seen.tanh())
        return out


class Hybrid(nn.Module):
    """A stem of convolutions, attention over its pixels, the mean over them, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, WIDTH, 3, padding=1)
        self.attention = Attention(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.stem(x).relu().flatten(2).transpose(1, 2)
        out: Tensor = self.head((pixels + self.attention(pixels)).mean(1))
        return out


RECURRENT = ("input", "recurrent", "head")


def recurrent(activation: Callable[[Tensor], Tensor], loss: str, *, last: bool) -> Case:
    """What is exact is not claimed: all bounds are left open."""
    return _open(sharp(Recurrent(activation, last=last), 1.5), _sequence(), RECURRENT, loss)


def lstm(*, last: bool) -> Case:
    return _open(sharp(LSTM(last=last), 2.0), _sequence(), RECURRENT, SOFTMAX)


def one_position() -> Case:
    return _open(sharp(Attention(WIDTH)), torch.randn(EXAMPLES, 1, WIDTH), ("value",), SOFTMAX)


def one_query() -> Case:
    layers = ("query", "key", "value", "out")
    return _open(sharp(Reader(), 2.0), torch.randn(EXAMPLES, 1 + STEPS, WIDTH), layers, SOFTMAX)


def hybrid() -> Case:
    layers = ("stem", "attention.query", "attention.key", "attention.value", "head")
    return _open(sharp(Hybrid(), 2.0), torch.rand(EXAMPLES, 1, 5, 5), layers, SOFTMAX)


def _sequence() -> Tensor:
    return torch.randn(EXAMPLES, STEPS, WIDTH)


def _open(model: nn.Module, x: Tensor, layers: tuple[str, ...], loss: str) -> Case:
    return Case(model, x, 0.0, 0.0, layers, loss)


CASES: dict[str, Callable[[], Case]] = {
    "linear recurrence, squared error at every step": lambda: recurrent(_linear, SQUARED, last=False),
    "linear recurrence, squared error at the last step": lambda: recurrent(_linear, SQUARED, last=True),
    "tanh recurrence, softmax at every step": lambda: recurrent(torch.tanh, SOFTMAX, last=False),
    "tanh recurrence, softmax at the last step": lambda: recurrent(torch.tanh, SOFTMAX, last=True),
    "LSTM, softmax at every step": lambda: lstm(last=False),
    "LSTM, softmax at the last step": lambda: lstm(last=True),
    "attention over one position, softmax": one_position,
    "one query at a memory of five, softmax": one_query,
    "convolution, attention over pixels, their mean, softmax": hybrid,
}
# Of these, the layers that share their weight over nothing: R = 1, so that expand and reduce are one.
UNSHARED = {
    "linear recurrence, squared error at the last step": ("head",),
    "tanh recurrence, softmax at the last step": ("head",),
    "LSTM, softmax at the last step": ("head",),
    "attention over one position, softmax": ("value",),
    "one query at a memory of five, softmax": ("query", "out"),
    "convolution, attention over pixels, their mean, softmax": ("head",),
}
APPROXIMATIONS = ("expand", "reduce", "mixed")


def _linear(x: Tensor) -> Tensor:
    return x


@dataclasses.dataclass(frozen=True)
class Fit:
    """Approximate against exact block: relative Frobenius error; cosine of the angle between both."""

    error: float
    cosine: float


def fits(make: Callable[[], Case]) -> dict[str, dict[str, Fit]]:
    """Of each approximation, by layer; the mean over five draws of weights and data.

    Call it with float64 as torch's default dtype.
    """
    found: dict[str, dict[str, Fit]] = {}
    for approximation in APPROXIMATIONS:
        drawn: list[dict[str, Fit]] = []
        for seed in range(5):
            torch.manual_seed(seed)
            drawn.append({layer: fit(*both) for layer, both in pairs(make(), approximation).items()})
        found[approximation] = {
            layer: Fit(
                sum(one[layer].error for one in drawn) / len(drawn),
                sum(one[layer].cosine for one in drawn) / len(drawn),
            )
            for layer in drawn[0]
        }
    return found


def fit(approximate: Tensor, exact: Tensor) -> Fit:
    """Of blocks of one shape."""
    cosine = (approximate * exact).sum() / (approximate.norm() * exact.norm()).clamp(min=1e-300)
    return Fit(float((approximate - exact).norm() / exact.norm().clamp(min=1e-300)), float(cosine))
