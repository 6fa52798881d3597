"""A weight with two readers takes the fallback, with a reason that names the tie."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algoperf_kfac.pytorch import KFAC
from tests.pytorch.toys import capture_once, covered, reasons


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
    assert "0.bias and 2.bias" in reasons(optimizer)["0.bias"]
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
    optimizer = capture_once(LanguageModel(tie=True), token_loss)
    assert covered(optimizer) == {"mix"}
    assert reasons(optimizer) == {"table.weight": "tied weight: table.weight and out.weight are one parameter"}
    untied = capture_once(LanguageModel(tie=False), token_loss)
    assert covered(untied) == {"mix", "out"}


@pytest.mark.parametrize(
    "read",
    [
        lambda h, table: h @ table.weight.T,
        lambda h, table: torch.matmul(h, table.weight.transpose(0, 1)),
        lambda h, table: F.linear(h, table.weight),
    ],
    ids=["T", "transpose", "F.linear"],
)
def test_table_read_again_as_output_layer(read: Callable[[Tensor, nn.Embedding], Tensor]) -> None:
    """The table was never covered, and reading it with a covered operation must not promote it."""
    optimizer = capture_once(LanguageModel(tie=False, read=read), token_loss)
    assert covered(optimizer) == {"mix"}
    assert "embedding" in reasons(optimizer)["table.weight"]


@pytest.mark.parametrize(
    ("decode", "name"),
    [
        (lambda h, w: F.linear(h, w.t()), "t"),
        (lambda h, w: h @ w, "matmul"),
        (lambda h, w: h.matmul(w), "matmul"),
        (lambda h, w: torch.matmul(h, other=w), "matmul"),
        (lambda h, w: F.linear(h, weight=w.T), "T"),
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
    with pytest.warns(UserWarning, match="the weight of encoder is also read by"):
        optimizer = capture_once(Autoencoder(), lambda m: (m(x) - x).square().mean())
    assert covered(optimizer) == {"head"}
    assert reasons(optimizer)["encoder.weight"].startswith(f"tied weight: {name} ")
    assert reasons(optimizer).keys() == {"encoder.weight", "encoder.bias"}


def test_a_weight_that_is_the_input_of_another_layer() -> None:
    class Composed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(5, 3, bias=False)
            self.outer = nn.Linear(5, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) @ self.outer(self.inner.weight)

    with pytest.warns(UserWarning, match="the weight of inner is also read by linear as its input"):
        optimizer = capture_once(Composed(), lambda m: m(torch.randn(3, 5)).square().mean())
    assert covered(optimizer) == {"outer"}
