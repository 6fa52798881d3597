"""Raw weights read by products of all forms, and through views."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algoperf_kfac.pytorch import KFAC
from tests.pytorch.kinds.forms import NARROW, WIDE, Form, assert_like_modules, plain, shaped, train, transposed
from tests.pytorch.toys import assert_same_factors, assert_same_parameters, capture_once, covered, reasons

FORMS = {
    "x @ w.T": plain(lambda x, w: x @ w.T),
    "matmul": transposed(lambda x, w: torch.matmul(x, w)),
    "matmul by name": plain(lambda x, w: torch.matmul(x, other=w.t())),
    "mm": transposed(lambda x, w: x.reshape(-1, NARROW).mm(w).reshape(8, 4, WIDE)),
    "linear with a transpose": transposed(lambda x, w: F.linear(x, w.transpose(0, 1))),
    "w @ x": plain(lambda x, w: (w @ x.transpose(1, 2)).transpose(1, 2)),
    "mv": plain(lambda x, w: torch.stack([torch.stack([torch.mv(w, v) for v in row]) for row in x])),
    "einsum": plain(lambda x, w: torch.einsum("nti,oi->nto", x, w)),
    "einsum of a list": transposed(lambda x, w: torch.einsum("...i,io->...o", [x, w])),
    "einsum, weight first": transposed(lambda x, w: torch.einsum("io,nti->nto", w, x)),
    "einsum, outputs first": plain(lambda x, w: torch.einsum("oi,nti->ont", w, x).permute(1, 2, 0)),
    "einsum to heads": shaped(
        lambda x, w: torch.einsum("ibh,hnd->ibnd", x, w).flatten(2), NARROW, 2, 3, turned=True
    ),
    "tensordot": plain(lambda x, w: torch.tensordot(x, w, dims=([2], [1]))),
    "tensordot of one dimension": transposed(lambda x, w: torch.tensordot(x, w, 1)),
    "squeeze": shaped(lambda x, w: F.linear(x, w.squeeze(1)), WIDE, 1, NARROW),
    "index": shaped(lambda x, w: F.linear(x, w[:, 0]), WIDE, 1, NARROW),
    "view": shaped(lambda x, w: F.linear(x, w.view(WIDE, NARROW)), 2, 3, NARROW),
    "flatten": shaped(lambda x, w: F.linear(x, w.flatten(0, 1)), 3, 2, NARROW),
    "bmm over examples": plain(lambda x, w: torch.bmm(x, w.T.unsqueeze(0).expand(8, -1, -1))),
    "copies": plain(lambda x, w: F.linear(x, w.clone().contiguous().to(x.dtype))),
    "view of a transposed copy": plain(
        lambda x, w: torch.einsum("nti,iop->ntop", x, w.T.contiguous().view(NARROW, 2, 3)).flatten(2)
    ),
    "conv1d of a matrix": plain(lambda x, w: F.conv1d(x.transpose(1, 2), w.unsqueeze(-1)).transpose(1, 2)),
}


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("name", [name for name in FORMS if name not in ("mv", "conv1d of a matrix")])
def test_a_form_is_the_layer(name: str, approximation: str) -> None:
    assert_like_modules(FORMS[name], approximation=approximation)


@pytest.mark.parametrize("name", ["mv", "conv1d of a matrix"])
def test_a_form_whose_rows_are_examples_of_their_own_has_the_gradient(name: str) -> None:
    """mv sees a row at a time."""
    model, x = Raw1(FORMS[name]), torch.randn(8, 4, NARROW)
    optimizer = capture_once(model, lambda m: m(x).square().mean())
    assert optimizer.coverage().fraction == 1
    assert optimizer.metrics()["matrix/gradient_error"] < 1e-8


class Raw1(nn.Module):
    def __init__(self, form: Form) -> None:
        super().__init__()
        self.matrix = nn.Parameter(form.store(torch.randn(WIDE, NARROW)).contiguous())
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        return self.form.read(x, self.matrix)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["x @ w.T", "einsum to heads", "squeeze"])
def test_a_form_within_a_checkpoint(name: str, reentrant: bool) -> None:
    assert_like_modules(FORMS[name], checkpointed=reentrant)


@pytest.mark.parametrize(
    "capture",
    [
        {"positions": "gradient"},
        {"positions": (torch.arange(4) < torch.arange(1, 9).clamp(max=4)[:, None]).double()},
    ],
    ids=["by gradient", "mask"],
)
@pytest.mark.parametrize("name", ["matmul", "einsum, outputs first", "einsum to heads"])
def test_a_form_with_positions(name: str, capture: dict[str, Any]) -> None:
    assert_like_modules(FORMS[name], capture=capture, approximation="reduce")


@pytest.mark.parametrize("scaling", ["inverse", "second_moment"])
def test_a_transposed_weight_with_other_scalings(scaling: str) -> None:
    assert_like_modules(FORMS["matmul"], scaling=scaling)


class Conv1D(nn.Module):
    """GPT-2's: a linear layer whose weight is (P_in, P_out)."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(like.weight.detach().T.contiguous())
        self.bias = nn.Parameter(like.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return flat.view(*x.shape[:-1], flat.shape[-1])


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("shape", [(16,), (8, 4)], ids=["vectors", "sequences"])
def test_addmm_is_linear_with_its_bias(shape: tuple[int, ...], approximation: str) -> None:
    """Rows that a model had to flatten belong together as before."""
    twin = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    model = nn.Sequential(Conv1D(twin[0]), nn.Tanh(), Conv1D(twin[2]))
    batch = torch.randn(*shape, 5), torch.randint(3, shape)
    mine, theirs = (KFAC(net, learning_rate=1e-2, approximation=approximation) for net in (model, twin))
    for net, optimizer in ((model, mine), (twin, theirs)):
        train(net, optimizer, batch, 4)
    assert mine.coverage().fraction == 1
    assert_same_factors(mine.factors(), theirs.factors(), {"0": "0", "2": "2"}, rtol=1e-7, atol=1e-10)
    for k in (0, 2):
        torch.testing.assert_close(model[k].weight.T, twin[k].weight, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(model[k].bias, twin[k].bias, rtol=1e-6, atol=1e-9)


def test_addmm_with_factors_of_its_own_is_no_layer() -> None:
    class Scaled(Conv1D):
        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, self.weight, alpha=2)

    optimizer = capture_once(Scaled(nn.Linear(4, 3)), lambda m: m(torch.randn(6, 4)).square().mean())
    assert not covered(optimizer)
    assert reasons(optimizer).keys() == {"weight", "bias"}


class Parts(nn.Module):
    """Slices of one weight and one bias, read apart."""

    def __init__(self, like: nn.ModuleList) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.cat([part.weight for part in like]).detach())
        self.bias = nn.Parameter(torch.cat([part.bias for part in like]).detach())

    def forward(self, x: Tensor) -> Tensor:
        wq, wk, wv = self.weight.chunk(3)
        bq, bk, bv = self.bias.split(len(self.bias) // 3)
        return F.linear(x, wq, bq).tanh() * F.linear(x, wk, bk) + F.linear(x.tanh(), wv, bv)


class Apart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(5, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts
        return q(x).tanh() * k(x) + v(x.tanh())


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_parts_of_a_weight_are_layers(approximation: str) -> None:
    twin = Apart()
    model = Parts(twin.parts)
    batch = torch.randn(8, 3, 5), torch.randint(4, (8, 3))
    mine, theirs = (KFAC(net, learning_rate=1e-2, approximation=approximation) for net in (model, twin))
    for net, optimizer in ((model, mine), (twin, theirs)):
        train(net, optimizer, batch, 4)
    assert mine.coverage().fraction == 1
    names = {f"weight.{k}": f"parts.{k}" for k in range(3)}
    assert_same_factors(mine.factors(), theirs.factors(), names, rtol=1e-7, atol=1e-10)
    after = torch.cat([part.weight for part in twin.parts]), torch.cat([part.bias for part in twin.parts])
    torch.testing.assert_close((model.weight, model.bias), after, rtol=1e-6, atol=1e-8)

    resumed = Parts(twin.parts)
    resumed.load_state_dict(model.state_dict())
    again = KFAC(resumed, learning_rate=1e-2, approximation=approximation)
    again.load_state_dict(mine.state_dict())
    assert str(again.coverage()) == str(mine.coverage())
    for net, optimizer in ((model, mine), (resumed, again)):
        train(net, optimizer, batch, 2)
    assert_same_parameters(model, resumed, rtol=0, atol=0)


def test_columns_are_parts_too() -> None:
    class Columns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 6))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x[:, :2], self.weight[:, :2]).tanh() + x[:, 2:] @ self.weight[:, 2:].T

    optimizer = capture_once(Columns(), lambda m: m(torch.randn(6, 6)).square().mean())
    assert optimizer.coverage().fraction == 1
    assert len(covered(optimizer)) == 2
    assert all(optimizer.metrics()[f"{name}/gradient_error"] < 1e-8 for name in covered(optimizer))


def test_the_rest_of_a_weight_is_listed() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 6))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight[:2])

    optimizer = capture_once(Half(), lambda m: m(torch.randn(6, 6)).square().mean())
    (rest,) = optimizer.coverage().fallbacks
    assert (rest.name, rest.shape) == ("weight", (12,))
    assert optimizer.coverage().fraction == 0.5


@pytest.mark.filterwarnings("ignore:K-FAC")
@pytest.mark.parametrize(
    "read",
    [
        lambda x, w: F.linear(x, w[:3]).sum() + F.linear(x, w[2:]).sum(),
        lambda x, w: F.linear(x, w).sum() + F.linear(x, w.T).sum(),
        lambda x, w: F.linear(x, w).sum() + (w * x[:4].clone().requires_grad_()).sum(),
        lambda x, w: F.linear(x, w).sum() + w[torch.tensor([0, 2])].mul(x[:2]).sum(),
        lambda x, w: F.linear(x, w.clone().mul_(x[:4].detach())).sum(),
        lambda x, w: F.linear(x, w.T.relu()).sum(),
    ],
    ids=["overlapping", "turned", "product", "gathered", "in place", "computed"],
)
def test_what_is_not_the_whole_of_a_gradient_takes_the_fallback(read: Any) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return read(x, self.matrix).square()

    optimizer = capture_once(Other(), lambda m: m(torch.randn(6, 4)))
    assert not covered(optimizer)
    assert sum(torch.Size(f.shape).numel() for f in optimizer.coverage().fallbacks) == 16


def test_a_bias_that_is_read_apart_from_its_weight() -> None:
    """Mamba's: the product with the weight comes first, the bias within another function."""

    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.softplus((self.layer.weight @ x.transpose(1, 2)).transpose(1, 2) + self.layer.bias)

    model, batch = Apart(), (torch.randn(8, 3, 5), torch.randint(4, (8, 3)))
    optimizer = KFAC(model, learning_rate=1e-2)
    train(model, optimizer, batch, 3)
    assert covered(optimizer) == {"layer"}
    assert reasons(optimizer).keys() == {"layer.bias"}
    assert optimizer.metrics()["layer/gradient_error"] < 1e-8
    twin = Apart()
    twin.load_state_dict(model.state_dict())
    resumed = KFAC(twin, learning_rate=1e-2)
    resumed.load_state_dict(optimizer.state_dict())
    for net, opt in ((model, optimizer), (twin, resumed)):
        train(net, opt, batch, 2)
    assert_same_parameters(model, twin, rtol=0, atol=0)


def test_under_autocast() -> None:
    model, x = Raw1(FORMS["einsum to heads"]), torch.randn(8, 4, NARROW)
    model, x = model.float(), x.float()

    def loss(m: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m(x).float().square().mean()

    optimizer = capture_once(model, loss)
    assert optimizer.coverage().fraction == 1
    assert optimizer.metrics()["matrix/gradient_error"] < 0.02


def test_compiled_forms_are_seen_on_statistics_steps() -> None:
    """Statistics steps run uncompiled, the others compiled."""
    options = {"learning_rate": 1e-2, "factor_interval": 2, "refresh_interval": 4, "initial_statistics": 1}
    model = nn.Sequential(
        Conv1D(nn.Linear(5, 8)), nn.TransformerEncoderLayer(8, 2, 6, dropout=0.0, batch_first=True)
    )
    twin = copy.deepcopy(model)
    batch = torch.randn(6, 4, 5), torch.randint(8, (6, 4))
    compiled = torch.compile(model, backend="eager")
    mine, theirs = KFAC(compiled, **options), KFAC(twin, **options)
    train(compiled, mine, batch, 5)
    train(twin, theirs, batch, 5)
    torch._dynamo.reset()
    assert {"0", "1.self_attn", "1.self_attn.out_proj"} <= covered(mine)
    assert_same_parameters(model, twin, rtol=1e-6, atol=1e-9)


def test_reasons_say_what_was_read() -> None:
    """Of a weight that is computed first, and of the bias beside a weight that two modules share."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
            self.second.weight = self.first.weight
            self.normed = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.second(self.first(x).tanh()), self.normed / self.normed.norm())

    optimizer = capture_once(Model(), lambda m: m(torch.randn(6, 4)).square().mean())
    why = reasons(optimizer)
    assert why["normed"] == "linear reads a function of it, not the parameter itself"
    assert why["first.bias"] == "bias of a layer whose weight other modules share"
    assert "one parameter" in why["first.weight"]
