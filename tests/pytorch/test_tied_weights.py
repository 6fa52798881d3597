"""A weight with two readers takes the fallback, and the reason names them; not so a table as output layer."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algoperf_kfac.pytorch import KFAC
from tests.pytorch.toys import assert_same_parameters, capture_once, covered, reasons


def test_one_parameter_in_two_linears() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    model[2].weight = model[0].weight
    optimizer = capture_once(model, lambda m: m(torch.randn(6, 4)).square().mean())
    assert covered(optimizer) == {"4"}
    assert "0.weight and 2.weight" in reasons(optimizer)["0.weight"]
    assert "tied" in reasons(optimizer)["0.weight"]
    assert reasons(optimizer).keys() == {"0.weight", "0.bias", "2.bias"}


def test_a_shared_module_is_no_tie() -> None:
    """One module under two names has one weight, read by one kind of operation: calls are summed."""
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    optimizer = capture_once(model, lambda m: m(torch.randn(6, 4)).square().mean())
    assert covered(optimizer) == {"0"}
    assert not reasons(optimizer)


def test_a_tied_bias_alone_leaves_the_weight_covered() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].bias = model[0].bias
    optimizer = capture_once(model, lambda m: m(torch.randn(6, 4)).square().mean())
    assert covered(optimizer) == {"0", "2"}
    assert reasons(optimizer)["0.bias"] == "bias that several layers share"
    assert optimizer.factors()["0"].A.shape == (4, 4)


class LanguageModel(nn.Module):
    def __init__(self, tie: bool, read: Callable[[Tensor, nn.Embedding], Tensor] | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 4)
        self.read = read
        if read is None:
            self.out = nn.Linear(4, 7, bias=False)
            if tie:
                self.out.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.mix(self.table(tokens)).tanh()
        return self.out(h) if self.read is None else self.read(h, self.table)


def token_loss(model: nn.Module) -> Tensor:
    tokens = torch.randint(7, (3, 5))
    return F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


def test_embedding_and_output_linear() -> None:
    """One direction for both uses, from the first statistics step on: until then they might be anything."""
    why = {"table.weight": "tied weight: table.weight and out.weight are one parameter"}
    assert reasons(KFAC(LanguageModel(tie=True))) == why
    optimizer = capture_once(LanguageModel(tie=True), token_loss)
    assert covered(optimizer) == {"mix", "table"}
    assert not reasons(optimizer)
    untied = capture_once(LanguageModel(tie=False), token_loss)
    assert covered(untied) == {"mix", "out"}
    assert "embedding" in reasons(untied)["table.weight"]


READS = pytest.mark.parametrize(
    "read",
    [
        lambda h, table: h @ table.weight.T,
        lambda h, table: torch.matmul(h, table.weight.transpose(0, 1)),
        lambda h, table: F.linear(h, table.weight),
    ],
    ids=["T", "transpose", "F.linear"],
)


@READS
def test_table_read_again_as_output_layer(read: Callable[[Tensor, nn.Embedding], Tensor]) -> None:
    model = LanguageModel(tie=False, read=read)
    optimizer = KFAC(model)
    assert covered(optimizer) == {"mix"}
    assert "embedding" in reasons(optimizer)["table.weight"]
    optimizer = capture_once(model, token_loss)
    assert covered(optimizer) == {"mix", "table"}
    (spec,) = (layer for layer in optimizer.coverage().layers if layer.name == "table")
    assert (spec.kind, spec.in_blocks, spec.out_blocks) == ("embedding", (4,), ())
    assert optimizer.coverage().fraction == 1


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (lambda h, table: torch.einsum("nld,vd->nlv", h, table.weight), "einsum"),
        (lambda h, table: F.linear(h @ table.weight.T, table.weight.T) @ table.weight.T, "linear"),
        (lambda h, table: h @ table.weight.T + table.weight.T.sum(0), "sum"),
        (lambda h, table: h @ table.weight.T + table.weight[:, 0], "add"),
    ],
    ids=["einsum", "as encoder", "as bias", "row"],
)
def test_a_table_read_in_any_other_way_takes_the_fallback(
    read: Callable[[Tensor, nn.Embedding], Tensor], name: str
) -> None:
    optimizer = capture_once(LanguageModel(tie=False, read=read), token_loss)
    assert covered(optimizer) == {"mix"}
    assert "embedding" in reasons(optimizer)["table.weight"]
    # Known as tied, it is read otherwise later on.
    model = LanguageModel(tie=False, read=lambda h, table: h @ table.weight.T)
    optimizer = capture_once(model, token_loss, factor_interval=1, refresh_interval=1)
    assert covered(optimizer) == {"mix", "table"}
    model.read = read
    for step in range(2):
        with (
            pytest.warns(UserWarning, match=f"layer table takes the fallback.*: also read by {name}")
            if not step
            else nullcontext()
        ):
            optimizer.zero_grad()
            with optimizer.capture():
                token_loss(model).backward()
            optimizer.step()
        assert covered(optimizer) == {"mix"}
        assert reasons(optimizer)["table.weight"].startswith(f"also read by {name}: K-FAC would miss")


@READS
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_a_tied_table_resumes(read: Callable[[Tensor, nn.Embedding], Tensor], approximation: str) -> None:
    """Bit for bit, by way of a file without pickled code, into an optimizer that does not know of the tie yet."""
    model = LanguageModel(tie=False, read=read)
    options = {"approximation": approximation, "factor_interval": 2, "refresh_interval": 2, "initial_statistics": 1}
    optimizer = capture_once(model, token_loss, **options)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    twin = LanguageModel(tie=False, read=read)
    twin.load_state_dict(saved["model"])
    resumed = KFAC(twin, **options)
    resumed.load_state_dict(saved["optimizer"])
    for m, o in ((model, optimizer), (twin, resumed)):
        torch.manual_seed(1)
        for _ in range(4):
            o.zero_grad()
            with o.capture():
                token_loss(m).backward()
            o.step()
    assert_same_parameters(model, twin, rtol=0, atol=0)


def test_a_module_under_two_names_resumes() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    optimizer = capture_once(model, lambda m: m(torch.randn(6, 4)).square().mean())
    KFAC(model).load_state_dict(optimizer.state_dict())


def test_a_frozen_or_excluded_table_is_left_alone() -> None:
    model = LanguageModel(tie=False, read=lambda h, table: h @ table.weight.T)
    assert covered(capture_once(model, token_loss, exclude=["table"])) == {"mix"}
    model.table.weight.requires_grad_(False)
    assert covered(capture_once(model, token_loss)) == {"mix"}


@pytest.mark.parametrize(
    ("decode", "name"),
    [
        (lambda h, w: F.linear(h, w.t()), "linear"),
        (lambda h, w: h @ w, "matmul"),
        (lambda h, w: h.matmul(w), "matmul"),
        (lambda h, w: torch.matmul(h, other=w), "matmul"),
        (lambda h, w: F.linear(h, weight=w.T), "linear"),
        (lambda h, w: torch.einsum("no,oi->ni", h, w), "einsum"),
    ],
    ids=["t", "@", "method", "keyword", "T", "einsum"],
)
def test_autoencoder_with_the_encoder_transposed(decode: Callable[[Tensor, Tensor], Tensor], name: str) -> None:
    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(5, 3)
            self.head = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(decode(self.encoder(x), self.encoder.weight))

    x = torch.randn(6, 5)
    optimizer = KFAC(Autoencoder())
    assert covered(optimizer) == {"encoder", "head"}
    with pytest.warns(UserWarning, match=f"layer encoder takes the fallback.*: also read by {name}"):
        optimizer = capture_once(Autoencoder(), lambda m: (m(x) - x).square().mean())
    assert covered(optimizer) == {"head"}
    assert reasons(optimizer)["encoder.weight"].startswith(f"also read by {name}: ")
    assert reasons(optimizer).keys() == {"encoder.weight", "encoder.bias"}


def test_a_weight_that_is_the_input_of_another_layer() -> None:
    class Composed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(5, 3, bias=False)
            self.outer = nn.Linear(5, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) @ self.outer(self.inner.weight)

    with pytest.warns(UserWarning, match="layer inner takes the fallback.*: also read by linear as its input"):
        optimizer = capture_once(Composed(), lambda m: m(torch.randn(3, 5)).square().mean())
    assert covered(optimizer) == {"outer"}


def test_a_tied_table_keeps_its_place_when_parameters_join() -> None:
    model, tokens = LanguageModel(tie=True), torch.randint(7, (4, 5))
    model.mix.requires_grad_(False)
    optimizer = KFAC(model, factor_interval=1)
    for thaw in (False, True):
        if thaw:
            model.mix.requires_grad_(True)
            optimizer.add_param_group({"params": model.mix.parameters()})
        optimizer.zero_grad()
        with optimizer.capture(loss_normalizer=20):
            F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
    assert covered(optimizer) == {"table", "mix"}
    model.table, model.out = nn.Linear(4, 7), nn.Identity()  # in its place, under its name
    optimizer.add_param_group({"params": model.table.parameters()})
    with optimizer.capture(loss_normalizer=20):
        model.table(model.mix(torch.randn(4, 5, 4))).square().mean().backward()
    optimizer.step()
    assert covered(optimizer) == {"table", "mix"}
    assert {layer.kind for layer in optimizer.coverage().layers} == {"linear"}
