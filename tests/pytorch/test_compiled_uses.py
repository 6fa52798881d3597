"""Compiled statistics where a model reads a layer's weight elsewhere, too, or calls it more often than before."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from algoperf_kfac.pytorch import KFAC
from tests.pytorch.compiled import BEFORE_2_6, COMPILED, Tied
from tests.pytorch.test_resume import through_a_file
from tests.pytorch.toys import assert_same_factors

pytestmark = pytest.mark.skipif(BEFORE_2_6, reason="torch 2.5 takes statistics uncompiled")
# Factors are those of the latest statistics step that counts.
OPTIONS: dict[str, Any] = {"learning_rate": 0.0, "factor_interval": 1, "factor_decay": 1e-9}
TOLERANCE = {"rtol": 1e-7, "atol": 1e-9}
UNCOMPILED = "statistics steps run uncompiled: "
NOT_ALIKE = " not used in the same way at every step"
N = 8


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    """A layer that is square, whose weight fits where an input would, between others."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 6), nn.Linear(6, 6, bias=bias), nn.Linear(6, 3)
        self.register_buffer("a0", torch.randn(6, 5))
        self.register_buffer("b0", torch.randn(6, 6))

    def forward(self, x: Tensor, extra: Callable[[Net, Tensor], Tensor] | None = None) -> Tensor:
        z = self.b(self.a(x).tanh()).tanh()
        return self.head(z if extra is None else z + extra(self, z))


class WithLoss(Net):
    """A forward pass that returns the loss, with a penalty."""

    def __init__(self, penalty: Callable[[Net], Tensor], bias: bool) -> None:
        super().__init__(bias)
        self.penalty = penalty

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return F.cross_entropy(super().forward(x), y) + 0.5 * self.penalty(self)


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 5, dtype=torch.float64), torch.randint(3, (N,))


def cross_entropy(model: Any, x: Tensor, y: Tensor, *args: Any) -> Tensor:
    return F.cross_entropy(model(x, *args), y)


def step(optimizer: KFAC, loss: Callable[..., Tensor], *args: Any) -> None:
    """One on `loss(*args)`."""
    optimizer.zero_grad()
    with optimizer.capture():
        loss(*args).backward()
    optimizer.step()


def pair(model: nn.Module, backend: Any = "aot_eager", **options: Any) -> tuple[Any, KFAC, nn.Module, KFAC]:
    """A model compiled, and a twin that is not, with their optimizers."""
    model = model.double()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    return compiled, KFAC(compiled, **OPTIONS, **options), twin, KFAC(twin, **OPTIONS, **options)


def from_hooks(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of linear layers that are called once, from inputs and output gradients."""
    inputs, gradients, handles = {}, {}, []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def hook(module: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
                ones = [torch.ones_like(args[0][:, :1])] if module.bias is not None else []
                inputs[name] = torch.cat([args[0].detach(), *ones], 1)
                output.register_hook(lambda grad: gradients.update({name: grad}))

            handles.append(module.register_forward_hook(hook))
    loss().backward()
    for handle in handles:
        handle.remove()
    return {n: (a.T @ a / N, (N * gradients[n]).T @ (N * gradients[n])) for n, a in inputs.items()}


PENALTIES: dict[str, Callable[[Net], Tensor]] = {
    "distance": lambda net: (net.b0 - net.b.weight).square().sum(),
    "distance of a layer that is not square": lambda net: (net.a0 - net.a.weight).square().sum(),
    "orthogonality": lambda net: (net.b.weight.T @ net.b.weight - torch.eye(6)).square().sum(),
    "orthogonality of a layer that is not square": lambda net: (net.a.weight.t() @ net.a.weight).square().sum(),
    "norms of all parameters": lambda net: sum((p.norm() for p in net.parameters()), torch.zeros(())),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_penalties_in_the_forward_pass(penalty: str, bias: bool) -> None:
    model, (x, y) = WithLoss(PENALTIES[penalty], bias).double(), batch()
    reference = copy.deepcopy(model)
    want = from_hooks(reference, lambda: reference(x, y))
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    optimizer = KFAC(compiled, approximation="expand", **OPTIONS)
    for _ in range(3):
        step(optimizer, compiled, x, y)
    assert optimizer.coverage().note == COMPILED
    assert backend.frame_count == 1
    assert_same_factors(optimizer.factors(), want, **TOLERANCE)


def call_b(net: Net, z: Tensor) -> Tensor:
    return net.b(z)


def once_more(model: Any, net: Any, x: Tensor, other: Tensor) -> Tensor:
    return model(x) + model(other)


def a_module_apart(model: Any, net: Any, x: Tensor, other: Tensor) -> Tensor:
    return model(x) + net.b(net.a(other)).square().mean()


def a_function_apart(model: Any, net: Any, x: Tensor, other: Tensor) -> Tensor:
    return model(x) + F.linear(net.a(other), net.b.weight, net.b.bias).square().mean()


def deeper(model: Any, net: Any, x: Tensor, other: Tensor) -> Tensor:
    return model(x, call_b)


CALLS = [once_more, a_module_apart, a_function_apart, deeper]


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("outputs", CALLS, ids=[f.__name__ for f in CALLS])
def test_more_calls_than_before(outputs: Callable[..., Tensor], approximation: str) -> None:
    """Their statistics are left out once, and said and counted; then those of an uncompiled model come."""
    compiled, optimizer, twin, other = pair(Net(), approximation=approximation)
    (x, y), (more, _) = batch(), batch()
    for _ in range(3):
        step(optimizer, cross_entropy, compiled, x, y)
    assert optimizer.coverage().note == COMPILED
    before = optimizer.factors()

    def loss(model: Any, net: Any) -> Tensor:
        return F.cross_entropy(outputs(model, net, x, more), y)

    step(optimizer, loss, compiled, compiled._orig_mod)
    assert_same_factors({"b": optimizer.factors()["b"]}, {"b": before["b"]}, rtol=0, atol=0)
    with pytest.warns(UserWarning, match=r"layer .*b.* was called 2 times") as said:
        assert NOT_ALIKE in optimizer.coverage().note
    assert len(said) == 1
    assert optimizer.metrics()["b/dropped"] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(optimizer, loss, compiled, compiled._orig_mod)
    step(other, loss, twin, twin)
    assert_same_factors(optimizer.factors(), other.factors(), **TOLERANCE)
    assert optimizer.coverage().note.startswith(UNCOMPILED)


def test_layers_that_are_called_as_before_keep_their_statistics() -> None:
    compiled, optimizer, twin, other = pair(Net())
    (x, y), (more, labels) = batch(), batch()
    for _ in range(2):
        step(optimizer, cross_entropy, compiled, x, y)
    step(optimizer, cross_entropy, compiled, more, labels, call_b)
    step(other, cross_entropy, twin, more, labels, call_b)
    mine, theirs = optimizer.factors(), other.factors()
    for name in ("a", "head"):
        assert_same_factors({name: mine[name]}, {name: theirs[name]}, **TOLERANCE)


def test_a_depth_that_changes_runs_uncompiled_also_after_loading() -> None:
    compiled, optimizer, twin, other = pair(Net(), approximation="reduce")
    batches = [(*batch(), extra) for extra in (None, None, call_b, None, call_b, None)]
    for x, y, extra in batches[:3]:
        step(optimizer, cross_entropy, compiled, x, y, extra)
    with pytest.warns(UserWarning, match="called 2 times"):
        step(optimizer, cross_entropy, compiled, *batches[3])
    note = optimizer.coverage().note
    assert note == f"{UNCOMPILED}layer b is{NOT_ALIKE}"
    fresh = KFAC(compiled, approximation="reduce", **OPTIONS)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    assert fresh.coverage().note == note
    for x, y, extra in batches[4:]:
        step(fresh, cross_entropy, compiled, x, y, extra)
        step(other, cross_entropy, twin, x, y, extra)
        assert_same_factors(fresh.factors(), other.factors(), **TOLERANCE)
    assert fresh.coverage().note == note


def test_calls_whose_outputs_have_no_part_in_the_loss_do_not_count() -> None:
    compiled, optimizer, twin, other = pair(Net())

    def loss(model: Any, x: Tensor, y: Tensor, more: Tensor) -> Tensor:
        return F.cross_entropy(model(x) + model(more).detach(), y)

    for number in range(4):
        (x, y), (more, _) = batch(), batch()
        for one, model in ((optimizer, compiled), (other, twin)):
            step(one, *((cross_entropy, model, x, y) if number < 2 else (loss, model, x, y, more)))
    assert optimizer.coverage().note == COMPILED
    assert_same_factors(optimizer.factors(), other.factors(), **TOLERANCE)


def test_a_call_beside_a_graph_that_runs_as_python() -> None:
    """The observer sees the graph's own calls, too, and takes them for what they are."""
    compiled, optimizer, twin, other = pair(Net(), backend="eager")
    (x, y), (more, _) = batch(), batch()
    for _ in range(3):
        step(optimizer, cross_entropy, compiled, x, y)
    assert optimizer.coverage().note == COMPILED

    def loss(model: Any, net: Any) -> Tensor:
        return F.cross_entropy(a_module_apart(model, net, x, more), y)

    step(optimizer, loss, compiled, compiled._orig_mod)
    with pytest.warns(UserWarning, match="layer a, b was called 2 times"):
        step(optimizer, loss, compiled, compiled._orig_mod)
    step(other, loss, twin, twin)
    assert optimizer.coverage().note.startswith(UNCOMPILED)
    assert_same_factors(optimizer.factors(), other.factors(), **TOLERANCE)


USES: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "scaled": lambda net, z: z @ (2 * net.b.weight),
    "transposed": lambda net, z: (z @ net.b.weight.T).tanh(),
    "as an argument of another function": lambda net, z: torch.einsum("ni,ij->nj", z, net.b.weight),
    "as a layer without its bias": lambda net, z: F.linear(z, net.b.weight).tanh(),
    "in parts": lambda net, z: torch.cat([z @ part.t() for part in net.b.weight.chunk(2)], 1),
    "bias alone": lambda net, z: z * net.b.bias,
}


@pytest.mark.parametrize("use", USES)
def test_other_uses_that_begin_later(use: str) -> None:
    """What an uncompiled model does about a use without a rule shows one statistics step later."""
    compiled, optimizer, twin, other = pair(Net())
    for number in range(4):
        x, y = batch()
        extra = None if number < 2 else USES[use]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step(optimizer, cross_entropy, compiled, x, y, extra)
            step(other, cross_entropy, twin, x, y, extra)
    assert_same_factors(optimizer.factors(), other.factors(), **TOLERANCE)
    assert optimizer.coverage().fallbacks == other.coverage().fallbacks


def test_a_table_that_is_looked_up_twice_later() -> None:
    compiled, optimizer, twin, other = pair(Tied())

    def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    x, y = torch.randint(9, (4, 5)), torch.randint(9, (4, 5))
    for lookups in (1, 1, 2):
        compiled._orig_mod.lookups = twin.lookups = lookups
        step(optimizer, loss, compiled, x, y)
    with pytest.warns(UserWarning, match="layer table was called 2 times"):
        step(optimizer, loss, compiled, x, y)
    step(other, loss, twin, x, y)
    assert_same_factors(optimizer.factors(), other.factors(), **TOLERANCE)


@pytest.mark.parametrize("in_place", [F.relu_, lambda z: F.silu(z, inplace=True)], ids=["relu_", "silu"])
def test_layers_before_operations_in_place(in_place: Callable[[Tensor], Tensor]) -> None:
    class InPlace(Net):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return self.head(in_place(self.b(in_place(self.a(x)))).mean(1))

    compiled, optimizer, twin, other = pair(InPlace())
    for _ in range(3):
        x, y = torch.randn(N, 4, 5, dtype=torch.float64), torch.randint(3, (N,))
        step(optimizer, cross_entropy, compiled, x, y)
        step(other, cross_entropy, twin, x, y)
    assert optimizer.coverage().note == COMPILED
    assert_same_factors(optimizer.factors(), other.factors(), **TOLERANCE)


class Encoder(nn.Module):
    """A table that is looked up, and a layer."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table, self.up = table, nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.table(x)).tanh()


class PartlyCompiled(nn.Module):
    """A table that is looked up in a part of the model that is compiled, and further times outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6, padding_idx=0)
        self.encoder = Encoder(self.table)

    def forward(self, x: Tensor, lookups: int = 2) -> Tensor:
        rows = sum(self.table((x + shift) % 9) for shift in range(1, lookups))
        return (self.encoder(x) + rows) @ self.table.weight.T


def table_loss(model: Any, x: Tensor, y: Tensor, *args: Any) -> Tensor:
    return F.cross_entropy(model(x, *args).flatten(0, 1), y.flatten())


def tokens(count: int = 8, vocabulary: int = 9) -> tuple[Tensor, Tensor]:
    return torch.randint(vocabulary, (count, 5)), torch.randint(vocabulary, (count, 5))


@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_lookups_outside_of_the_graph(approximation: str, backend: str) -> None:
    """They count together with those inside; a graph that runs as Python does not tell them from its own."""
    model = PartlyCompiled().double()
    twin = copy.deepcopy(model)
    model.encoder.compile(backend=backend, fullgraph=True)
    options = OPTIONS | {"approximation": approximation}
    optimizer, other = KFAC(model, **options), KFAC(twin, **options)
    for count, lookups in ((8, 3), (8, 3), (8, 2), (5, 3)):
        x, y = tokens(count)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if backend == "eager" else "error")
            step(optimizer, table_loss, model, x, y, lookups)
        step(other, table_loss, twin, x, y, lookups)
    if backend == "aot_eager":
        assert optimizer.coverage().note == COMPILED
    else:
        assert optimizer.coverage().note == f"{UNCOMPILED}layer table is{NOT_ALIKE}"
    assert_same_factors(optimizer.factors(), other.factors(), **TOLERANCE)
    x, y = tokens()
    step(optimizer, table_loss, model, x, y, 4)  # more than were seen
    assert optimizer.coverage().note == f"{UNCOMPILED}layer table is{NOT_ALIKE}"


def test_a_table_that_is_not_looked_up_later() -> None:
    class Prompted(nn.Module):
        """Its inputs may be given as rows in place of tokens."""

        def __init__(self) -> None:
            super().__init__()
            self.table, self.up = nn.Embedding(9, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
            return self.up(self.table(x) if rows is None else rows).tanh() @ self.table.weight.T

    compiled, optimizer, twin, other = pair(Prompted())
    for rows in (None, None, torch.randn(8, 5, 6, dtype=torch.float64)):
        x, y = tokens()
        step(optimizer, table_loss, compiled, x, y, rows)
        step(other, table_loss, twin, x, y, rows)
        assert_same_factors(optimizer.factors(), other.factors(), **TOLERANCE)
    assert optimizer.coverage().note == COMPILED


def test_a_transpose_that_was_made_in_another_graph() -> None:
    """The product cannot be told there: without a word the table would keep its first factors for good."""

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.up = nn.Embedding(9, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            columns = self.table.weight.T
            h = self.up(self.table(x)).tanh()
            torch._dynamo.graph_break()
            return h @ columns

    model = Broken().double()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager")
    optimizer, other = KFAC(compiled, **OPTIONS), KFAC(twin, **OPTIONS)
    for _ in range(2):
        step(optimizer, table_loss, compiled, *tokens())
    x, y = tokens()
    with pytest.warns(UserWarning, match="layer table was not seen in all of its uses .* left out"):
        step(optimizer, table_loss, compiled, x, y)
    step(other, table_loss, twin, x, y)
    assert optimizer.coverage().note == f"{UNCOMPILED}layer table is{NOT_ALIKE}"
    assert_same_factors(optimizer.factors(), other.factors(), **TOLERANCE)


@pytest.mark.parametrize(
    "columns", [lambda w: w, lambda w: w.T.T, lambda w: w.t().t()], ids=["W", "T.T", "t().t()"]
)
def test_a_square_table_that_is_multiplied_by_as_it_is(columns: Callable[[Tensor], Tensor]) -> None:
    """Beside its transpose, which has the same shape, and from some later step on."""

    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.up = nn.Embedding(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor, further: bool) -> Tensor:
            h = self.up(self.table(x)).tanh()
            return (h @ columns(self.table.weight) if further else h) @ self.table.weight.T

    compiled, optimizer, twin, other = pair(Square())
    for further in (False, False, True, True):
        x, y = tokens(vocabulary=6)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step(optimizer, table_loss, compiled, x, y, further)
            step(other, table_loss, twin, x, y, further)
    assert "table" not in other.factors()
    assert_same_factors(optimizer.factors(), other.factors(), **TOLERANCE)
    assert optimizer.coverage().fallbacks == other.coverage().fallbacks
