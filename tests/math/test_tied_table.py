"""An embedding table that is the output layer, too, against the two layers that it stands for, untied."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algoperf_kfac.pytorch import KFAC, Positions
from algoperf_kfac.pytorch.calls import Call
from algoperf_kfac.pytorch.recorder import Recorder
from benchmarks.paper.ggn import ggn_blocks

APPROXIMATIONS = pytest.mark.parametrize("approximation", ["expand", "reduce"])
V, D, N, R = 5, 3, 4, 6

READS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "F.linear": F.linear,
    "T": lambda h, w: h @ w.T,
    "t": lambda h, w: torch.matmul(h, w.t()),
    "mT": lambda h, w: torch.matmul(h, other=w.mT),
    "transpose": lambda h, w: h.matmul(w.transpose(0, 1)),
    "permute": lambda h, w: h @ w.permute(1, 0),
}


class Tied(nn.Module):
    """Source and target tokens in, scores of the next token out, one table for all three."""

    def __init__(
        self, read: str = "T", pool: bool = False, linear: bool = False, padding: int | None = None
    ) -> None:
        super().__init__()
        self.table = nn.Embedding(V, D, padding_idx=padding)
        self.mix = nn.Linear(D, D)
        self.read = READS[read]
        self.pool = pool
        self.linear = linear

    def lookup(self, tokens: Tensor) -> Tensor:
        return self.table(tokens)

    def score(self, h: Tensor) -> Tensor:
        return self.read(h, self.table.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 2 R) tokens, source and target behind each other -> (N, R, V), or (N, V) with pooling."""
        if self.linear:  # all tokens alike, nothing between the layers
            h = self.mix(self.lookup(x))
        else:
            source, target = x[:, :R], x[:, R:]
            h = self.mix(self.lookup(source)).tanh().mean(1, keepdim=True) + self.lookup(target)
            h = h.tanh()
        return self.score(h.mean(1) if self.pool else h)


class Untied(Tied):
    """The same function with two layers that K-FAC knows: lookups as a linear layer on one-hot vectors."""

    def __init__(self, tied: Tied) -> None:
        super().__init__(pool=tied.pool, linear=tied.linear)
        self.emb = nn.Linear(V, D, bias=False)
        self.out = nn.Linear(D, V, bias=False)
        self.mix.load_state_dict(tied.mix.state_dict())
        with torch.no_grad():
            self.out.weight.copy_(tied.table.weight)
            self.emb.weight.copy_(tied.table.weight.T)
        del self.table

    def lookup(self, tokens: Tensor) -> Tensor:
        return self.emb(F.one_hot(tokens, V).to(self.emb.weight.dtype))

    def score(self, h: Tensor) -> Tensor:
        return self.out(h)


def tokens() -> Tensor:
    # Uneven frequencies, and not all examples alike.
    return torch.multinomial(torch.tensor([5.0, 3, 2, 1, 1]), N * 2 * R, replacement=True).reshape(N, 2 * R)


def factors(model: nn.Module, x: Tensor, approximation: str, fisher: str = "empirical", **capture):
    optimizer = KFAC(model, approximation=approximation, fisher=fisher, learning_rate=0.0)
    with optimizer.capture(loss_normalizer=1.0, **capture) as context:
        outputs = model(x)
        context.backward_fisher(outputs, "mean_squared_error")
        (outputs.sin() + outputs**2).sum().backward()
    optimizer.step()
    return optimizer, optimizer.factors()


def vocabulary_trace(matrix: Tensor) -> Tensor:
    """(V D, V D), vocabulary first -> (D, D): the partial trace over the vocabulary, divided by V."""
    return matrix.reshape(V, D, V, D).diagonal(dim1=0, dim2=2).sum(-1) / V


def kronecker_sum(pairs: dict) -> Tensor:
    """The curvature of the table, vocabulary first, from the factors of the two layers it stands for."""
    return torch.kron(pairs["out"].B, pairs["out"].A) + torch.kron(pairs["emb"].A, pairs["emb"].B)


@APPROXIMATIONS
@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@pytest.mark.parametrize("pool", [False, True], ids=["per token", "pooled"])
@pytest.mark.parametrize("positions", [None, "gradient", Positions(readout="sum")], ids=["all", "gradient", "sum"])
def test_partial_trace_of_the_sum_of_both_uses(approximation, fisher, pool, positions) -> None:
    model, x = Tied(pool=pool), tokens()
    optimizer, got = factors(model, x, approximation, fisher, positions=positions)
    _, both = factors(Untied(model), x, approximation, fisher, positions=positions)
    torch.testing.assert_close(got["table"].A, vocabulary_trace(kronecker_sum(both)), rtol=1e-10, atol=1e-12)
    assert got["table"].B == ()
    assert optimizer.coverage().fraction == 1


@pytest.mark.parametrize(("approximation", "pool"), [("expand", False), ("reduce", True)])
def test_exact_where_both_uses_are(approximation: str, pool: bool) -> None:
    """A linear model with squared error, in the setting of the approximation: against automatic differentiation."""
    model, x = Tied(pool=pool, linear=True), tokens()
    untied = Untied(model)
    _, got = factors(model, x, approximation, "exact")
    out = ggn_blocks(untied, x, "mean_squared_error", "out")[0]
    emb = ggn_blocks(untied, x, "mean_squared_error", "emb")[0]
    emb = emb.reshape(D, V, D, V).permute(1, 0, 3, 2).reshape(V * D, V * D)
    torch.testing.assert_close(got["table"].A, vocabulary_trace(out + emb), rtol=1e-10, atol=1e-12)


@APPROXIMATIONS
def test_nothing_with_an_identity_is_closer(approximation: str) -> None:
    """Frobenius norm: the distance grows as it must in every direction, by what is added alone."""
    model, x = Tied(), tokens()
    _, got = factors(model, x, approximation)
    _, both = factors(Untied(model), x, approximation)
    exact, eye = kronecker_sum(both), torch.eye(V)
    best = exact - torch.kron(eye, got["table"].A)
    for _ in range(5):
        step = torch.kron(eye, torch.randn(D, D))
        torch.testing.assert_close((best + step).norm() ** 2, best.norm() ** 2 + step.norm() ** 2)


@APPROXIMATIONS
@pytest.mark.parametrize("read", READS)
def test_however_the_transpose_is_written(read: str, approximation: str) -> None:
    model, x = Tied(), tokens()
    _, want = factors(model, x, approximation)
    model.read = READS[read]
    _, got = factors(model, x, approximation)
    torch.testing.assert_close(got["table"].A, want["table"].A)


@APPROXIMATIONS
def test_lookups_of_padding_do_not_count(approximation: str) -> None:
    """Their gradient never reaches the table."""
    model, x = Tied(padding=0), tokens()
    _, got = factors(model, x, approximation)

    class Masked(Untied):
        def lookup(self, tokens: Tensor) -> Tensor:
            y = super().lookup(tokens)
            return torch.where((tokens != 0).unsqueeze(-1), y, y.detach())

    _, both = factors(Masked(model), x, approximation, positions={"emb": "gradient"})
    assert (x == 0).any()
    torch.testing.assert_close(got["table"].A, vocabulary_trace(kronecker_sum(both)), rtol=1e-10, atol=1e-12)


@APPROXIMATIONS
def test_several_micro_batches(approximation: str) -> None:
    """In one capture, or each in its own: as the whole batch, the table's two counts included."""
    model, x = Tied(), tokens()
    _, want = factors(model, x, approximation)
    for together in (True, False):
        optimizer = KFAC(model, approximation=approximation, learning_rate=0.0)

        def run(part: Tensor) -> None:
            outputs = model(part)
            (outputs.sin() + outputs**2).sum().backward()

        if together:
            with optimizer.capture(loss_normalizer=1.0):
                for part in x.split(2):
                    run(part)
        else:
            for part in x.split(2):
                with optimizer.capture(loss_normalizer=1.0):
                    run(part)
        optimizer.step()
        torch.testing.assert_close(optimizer.factors()["table"].A, want["table"].A)


def test_the_gradient_is_what_was_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Output use G^T A plus a scatter of the lookups' gradients = dL/dW."""
    seen: list[tuple[str, Tensor, Tensor]] = []
    recorded, returned = Recorder.input, Recorder.output_gradient
    calls: dict[int, tuple[str, Tensor, Call]] = {}  # the calls are kept, so that no identity comes twice

    def record(self, operation, *rest):
        call = recorded(self, operation, *rest)
        calls[id(call)] = operation.kind, operation.input.detach(), call
        return call

    def gradient(self, call, grad):
        if self.spec.kind == "embedding":
            kind, x, _ = calls[id(call)]
            seen.append((kind, x, grad))
        returned(self, call, grad)

    monkeypatch.setattr(Recorder, "input", record)
    monkeypatch.setattr(Recorder, "output_gradient", gradient)
    model = Tied()
    factors(model, tokens(), "expand")
    total = torch.zeros(V, D)
    for kind, x, grad in seen:
        if kind == "linear":
            total += grad.reshape(-1, V).T @ x.reshape(-1, D)
        else:
            total.index_add_(0, x.flatten(), grad.reshape(-1, D))
    assert sorted(kind for kind, _, _ in seen) == ["embedding", "embedding", "linear"]
    torch.testing.assert_close(total, model.table.weight.grad, rtol=1e-12, atol=1e-13)
