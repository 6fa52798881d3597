"""Mixtures of experts with stacked weights beside experts that are modules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algoperf_kfac.pytorch import KFAC
from tests.pytorch.kinds.forms import train
from tests.pytorch.toys import assert_same_factors, capture_once, covered, reasons

EXPERTS, WIDTH, INNER = 4, 8, 4  # grouped products take multiples of 16 bytes
ROUTE = torch.tensor([0, 2, 1, 0, 2, 0, 1, 2, 0, 1])  # expert 3 has no tokens


class Modules(nn.Module):
    """Each expert a module; one without tokens is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(WIDTH, INNER, bias=False) for _ in range(EXPERTS))
        self.down = nn.ModuleList(nn.Linear(INNER, WIDTH, bias=False) for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(EXPERTS):
            (tokens,) = (e == ROUTE).nonzero(as_tuple=True)
            if len(tokens):
                out = out.index_add(0, tokens, self.down[e](self.up[e](x[tokens]).tanh()))
        return x + out


class Stacked(nn.Module):
    """The same with weights (E, P_out, P_in), or (E, P_in, P_out) if `turned`."""

    def __init__(self, like: Modules, mix: Callable[[Stacked, Tensor], Tensor], *, turned: bool) -> None:
        super().__init__()
        stack = (torch.stack([layer.weight for layer in layers]).detach() for layers in (like.up, like.down))
        self.up, self.down = (nn.Parameter((w.mT if turned else w).contiguous().clone()) for w in stack)
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(self, x)


def slices(m: Stacked, x: Tensor) -> Tensor:
    """Mixtral's loop, over the experts that have tokens."""
    out = torch.zeros_like(x)
    for e in ROUTE.unique():
        (tokens,) = (e == ROUTE).nonzero(as_tuple=True)
        out = out.index_add(0, tokens, F.linear(F.linear(x[tokens], m.up[e]).tanh(), m.down[e]))
    return out


def unbound(m: Stacked, x: Tensor) -> Tensor:
    """A loop over all, the experts without tokens called with none."""
    out = torch.zeros_like(x)
    for e, (up, down) in enumerate(zip(m.up, m.down.unbind(), strict=True)):
        (tokens,) = (e == ROUTE).nonzero(as_tuple=True)
        out = out.index_add(0, tokens, (x[tokens] @ up.T).tanh() @ down.T)
    return out


def grouped(m: Stacked, x: Tensor) -> Tensor:
    """Tokens sorted by expert, one product for all."""
    order = ROUTE.argsort(stable=True)
    ends = torch.bincount(ROUTE, minlength=EXPERTS).cumsum(0).to(torch.int32)
    product = F.grouped_mm if hasattr(F, "grouped_mm") else torch._grouped_mm
    h = product(x[order].float(), m.up.float(), offs=ends).tanh()
    y = product(h, m.down.float(), offs=ends)
    return torch.zeros_like(x).index_add(0, order, y.to(x.dtype))


def batched(m: Stacked, x: Tensor) -> Tensor:
    """Llama 4's: every expert is given all tokens, those of others as zeros."""
    given = x * (torch.arange(EXPERTS)[:, None] == ROUTE).to(x.dtype).unsqueeze(-1)
    return torch.bmm(torch.bmm(given, m.up).tanh(), m.down).sum(0)


def capacity(m: Stacked, x: Tensor) -> Tensor:
    """Einsums over experts with places for tokens, as in Switch."""
    places = torch.zeros(len(x), EXPERTS, 6)
    for e in range(EXPERTS):
        for place, token in enumerate((e == ROUTE).nonzero()[:, 0].tolist()):
            places[token, e, place] = 1
    given = torch.einsum("tec,td->ecd", places, x)
    h = torch.einsum("ecd,edf->ecf", given, m.up).tanh()
    return torch.einsum("tec,ecd->td", places, torch.einsum("ecf,efd->ecd", h, m.down))


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize(
    ("mix", "turned"),
    [(slices, False), (unbound, False), (batched, True), (capacity, True)],
    ids=["slices", "unbind", "bmm", "einsum"],
)
def test_stacked_experts(mix: Callable[[Stacked, Tensor], Tensor], turned: bool, approximation: str) -> None:
    twin = Modules()
    model = Stacked(twin, mix, turned=turned)
    x, y = torch.randn(len(ROUTE), WIDTH), torch.randint(WIDTH, (len(ROUTE),))
    mine, theirs = (
        KFAC(net, learning_rate=1e-2, approximation=approximation, allow_partial_coverage=True)
        for net in (model, twin)
    )
    for net, optimizer in ((model, mine), (twin, theirs)):
        train(net, optimizer, (x, y), 3, loss_normalizer=float(len(x)))
    seen = [f"{part}.{e}" for part in ("up", "down") for e in range(3)]
    got, want = mine.factors(), theirs.factors()
    assert_same_factors({n: got[n] for n in seen}, {n: want[n] for n in seen}, rtol=1e-6, atol=1e-9)
    assert all(mine.metrics()[f"{name}/gradient_error"] < 1e-8 for name in seen)
    for part in ("up", "down"):
        stored = getattr(model, part)
        for e in range(3):
            weight = getattr(twin, part)[e].weight
            torch.testing.assert_close(stored[e].mT if turned else stored[e], weight, rtol=1e-6, atol=1e-8)


def test_grouped_products() -> None:
    twin = Modules()
    model = Stacked(twin, grouped, turned=True)
    x = torch.randn(len(ROUTE), WIDTH)
    first = capture_once(model, lambda m: m(x).square().mean(), capture={"loss_normalizer": 1.0})
    second = capture_once(
        twin, lambda m: m(x).square().mean(), capture={"loss_normalizer": 1.0}, allow_partial_coverage=True
    )
    seen = [f"{part}.{e}" for part in ("up", "down") for e in range(3)]
    assert covered(first) == set(seen)
    got, want = first.factors(), second.factors()
    assert_same_factors({n: got[n] for n in seen}, {n: want[n] for n in seen}, rtol=1e-4, atol=1e-6)
    assert all(first.metrics()[f"{name}/gradient_error"] < 1e-5 for name in seen)


@pytest.mark.parametrize(("approximation", "is_said"), [("expand", False), ("reduce", True)])
def test_tokens_of_experts_are_not_warned_of(
    approximation: str, is_said: bool, recwarn: pytest.WarningsRecorder
) -> None:
    """With expand it makes no difference but to the scale of B which of them belong to one example."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Stacked(Modules(), slices, turned=False))
    optimizer = KFAC(model, approximation=approximation)
    with optimizer.capture():
        model(torch.randn(10, WIDTH)).square().mean().backward()
    assert any("other layers have other numbers of rows" in str(w.message) for w in recwarn) == is_said
    assert {"1.up.0", "1.up.1", "1.up.2"} <= covered(optimizer)


def test_an_expert_joins_when_it_has_tokens() -> None:
    global ROUTE
    model = Stacked(Modules(), slices, turned=False)
    optimizer = KFAC(model, learning_rate=1e-2)
    batch = torch.randn(len(ROUTE), WIDTH), torch.randint(WIDTH, (len(ROUTE),))
    train(model, optimizer, batch, 2)
    assert {f.shape for f in optimizer.coverage().fallbacks} == {(WIDTH * INNER,)}
    assert all("read in parts" in reason for reason in reasons(optimizer).values())
    before = ROUTE
    try:
        ROUTE = torch.where(before == 0, 3, before)
        train(model, optimizer, batch, 2)
    finally:
        ROUTE = before
    assert optimizer.coverage().fraction == 1
    assert len(covered(optimizer)) == 2 * EXPERTS
    assert optimizer.metrics()["up.0/idle"] == 2


def test_weights_gathered_for_each_token_take_the_fallback() -> None:
    class Gathered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(self.up[ROUTE], x.unsqueeze(-1)).squeeze(-1)

    optimizer = capture_once(Gathered(), lambda m: m(torch.randn(len(ROUTE), WIDTH)).square().mean())
    assert reasons(optimizer).keys() == {"up"}
