"""B belongs to the loss of single examples, on one scale for all layers, whatever the passes of a step are."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from algoperf_kfac.pytorch import KFAC, FactorPair, Positions
from tests.pytorch.toys import assert_same_factors, capture_once, factors_of, mlp

N = 10
APPROXIMATIONS = pytest.mark.parametrize("approximation", ["expand", "reduce"])


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


class Experts(nn.Module):
    """Each expert sees the tokens routed to it; or all of them, the others' masked, as a reference."""

    def __init__(self, route: Tensor, *, masked: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 3)
        self.experts = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(4))
        self.route, self.masked = route, masked

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(x))
        out = torch.zeros_like(h)
        for k, expert in enumerate(self.experts):
            mine = self.route == k
            out = (
                out + expert(h) * mine[:, None]
                if self.masked
                else out.index_add(0, mine.nonzero()[:, 0], expert(h[mine]))
            )
        return self.outer(torch.tanh(out))


@APPROXIMATIONS
def test_an_expert_that_sees_a_part_of_the_batch(approximation: str) -> None:
    route, x, y = torch.tensor([0] * 5 + [1] * 3 + [2, 3]), torch.randn(N, 6), torch.randint(3, (N,))

    def factors(model: nn.Module, **capture: object) -> dict:
        optimizer = KFAC(model, approximation=approximation)
        with optimizer.capture(**capture):
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
        return optimizer.factors()

    want = factors(Experts(route, masked=True), positions="gradient", loss_normalizer=N)
    with pytest.warns(UserWarning, match=r"the batch has 10 examples, as inner sees them.*experts.0 \(5\)"):
        got = factors(Experts(route, masked=False))
    assert_same_factors(got, want)


def test_an_expert_without_tokens_keeps_its_factors_and_its_place() -> None:
    x, y = torch.randn(N, 6), torch.randint(3, (N,))
    model = Experts(torch.arange(N) % 4, masked=False)
    optimizer = KFAC(model, factor_interval=1, refresh_interval=1)
    for empty in (False, True, True, False):
        model.route = torch.arange(N) % (3 if empty else 4)
        before = optimizer._layers.states["experts.3"].a[0].clone()
        optimizer.zero_grad()
        with optimizer.capture():
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
        assert torch.equal(before, optimizer._layers.states["experts.3"].a[0]) is empty
    assert optimizer.coverage().fraction == 1


def windowed(positions: object) -> KFAC:
    """A layer on the windows of each example, as in Swin: rows of several windows belong to one example."""

    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.embed, self.mix, self.head = nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            h = self.mix(h.reshape(-1, 4, 4)).reshape(h.shape)
            return self.head(h.mean(1))

    model = Windows()
    optimizer = KFAC(model, approximation="reduce")
    x, y = torch.randn(5, 16, 2), torch.randint(3, (5,))
    with optimizer.capture(positions=positions):
        F.cross_entropy(model(x), y).backward()
    optimizer.step()
    return optimizer


def test_windows_are_named_and_can_be_described() -> None:
    with pytest.warns(UserWarning, match=r"the batch has 5 examples, as embed sees them.*: mix \(20\)"):
        counted = windowed(None).factors()["mix"]
    ids = torch.arange(5).repeat_interleave(4)
    described = windowed({"mix": Positions(segment_ids=ids, num_segments=5)}).factors()["mix"]
    # Described, the layer is an ordinary one over 16 positions.
    plain = windowed({"mix": Positions(segment_ids=ids, num_segments=5)}).factors()["embed"]
    assert described.A.shape == (5, 5)
    assert described.A[-1, -1] == plain.A[-1, -1] == 1
    assert not torch.allclose(counted.A, described.A)


@pytest.mark.parametrize("passes", [1, 2])
def test_two_backward_passes_of_two_losses(passes: int) -> None:
    """A discriminator's mean over real and mean over fake examples, or their sum: one and the same."""
    x, y = torch.randn(2 * N, 5), torch.cat([torch.ones(N, 1), torch.zeros(N, 1)])
    layer = nn.Linear(5, 1, bias=False)

    def loss(half: slice) -> Tensor:
        return F.binary_cross_entropy_with_logits(layer(x[half]), y[half])

    optimizer = KFAC(layer, learning_rate=0.0)
    with optimizer.capture():
        if passes == 1:
            (loss(slice(0, N)) + loss(slice(N, None))).backward()
        else:
            loss(slice(0, N)).backward()
            loss(slice(N, None)).backward()
    optimizer.step()
    (pair,) = optimizer.factors().values()
    expected = (layer(x).sigmoid() - y).square().sum().detach()
    torch.testing.assert_close(pair.B.squeeze(), expected, rtol=1e-9, atol=0)


def test_a_gradient_with_respect_to_inputs_does_not_count() -> None:
    """FGSM, virtual adversarial training: the pass that makes the attack has no part in the statistics."""
    model, x, y = mlp(4, 8, 3).double(), torch.randn(N, 4), torch.randint(3, (N,))

    def attack() -> Tensor:
        inputs = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(inputs), y), inputs)
        return x + 0.1 * grad.sign()

    factors = []
    for inside in (False, True):
        optimizer = KFAC(model, learning_rate=0.0)
        attacked = None if inside else attack()
        optimizer.zero_grad()
        with optimizer.capture():
            F.cross_entropy(model(attack() if inside else attacked), y).backward()
        optimizer.step()
        factors.append(optimizer.factors())
    assert_same_factors(factors[1], factors[0])


def test_gradients_of_gradients_are_refused_with_a_way_out() -> None:
    model, x = mlp(4, 8, 1).double(), torch.randn(N, 4, requires_grad=True)
    optimizer = KFAC(model)
    with (
        pytest.raises(RuntimeError, match=r"create_graph=True\) inside capture\(\).*outside of it"),
        optimizer.capture(),
    ):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)
    # The way out: the plain loss inside, the penalty outside; gradients add up.
    optimizer = KFAC(model)
    model.zero_grad()
    with optimizer.capture():
        model(x).square().mean().backward()
    (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    grad.square().sum(1).mean().backward()
    optimizer.step()


def test_gradients_from_outside_of_capture_are_named() -> None:
    """Accumulation as Lightning does it: all but the last micro-batch go by."""
    model, x, y = nn.Linear(6, 3), torch.randn(8, 6), torch.randint(3, (8,))
    optimizer = KFAC(model)
    for part in range(3):
        (F.cross_entropy(model(x[2 * part : 2 * part + 2]), y[2 * part : 2 * part + 2]) / 4).backward()

    def closure() -> Tensor:
        loss = F.cross_entropy(model(x[6:]), y[6:]) / 4
        loss.backward()
        return loss

    with pytest.warns(UserWarning, match=r"gradients already that no capture\(\) saw.*loss_normalizer=N"):
        optimizer.step(closure)


@pytest.mark.parametrize("clear", ["optimizer", "model"])
def test_gradients_that_a_closure_clears_are_not_named(clear: str, recwarn: pytest.WarningsRecorder) -> None:
    """Lightning, and the closures of torch's documentation: what is there when the closure starts is gone before
    the backward pass, with the statistics of a step that was skipped."""
    model, x, y = nn.Linear(6, 3).double(), torch.randn(8, 6).double(), torch.randint(3, (8,))
    optimizer, alone = KFAC(model, learning_rate=0.0), KFAC(model, learning_rate=0.0)
    with optimizer.capture():
        F.cross_entropy(model(1e3 * x), y).backward()  # and no step

    def closure() -> Tensor:
        loss = F.cross_entropy(model(x), y)
        (optimizer if clear == "optimizer" else model).zero_grad()
        loss.backward()
        return loss

    optimizer.step(closure)
    alone.step(closure)
    assert_same_factors(optimizer.factors(), alone.factors())
    assert not [w for w in recwarn if "K-FAC" in str(w.message)]


def test_micro_batches_in_captures_of_their_own_are_not_named(recwarn: pytest.WarningsRecorder) -> None:
    model, x, y = nn.Linear(6, 3), torch.randn(8, 6), torch.randint(3, (8,))
    optimizer = KFAC(model)
    for part in (slice(0, 4), slice(4, 8)):
        with optimizer.capture(loss_normalizer=8):
            (F.cross_entropy(model(x[part]), y[part], reduction="sum") / 8).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    with optimizer.capture():
        F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert not [w for w in recwarn if "K-FAC" in str(w.message)]


@pytest.mark.parametrize("how", ["model.zero_grad()", "set to zero"])
def test_what_belongs_to_a_skipped_step_is_forgotten(how: str) -> None:
    """After an overflow or a spike the gradients are cleared without the optimizer's zero_grad."""
    model = mlp(6, 8, 3).double()
    x, y = torch.randn(N, 6), torch.randint(3, (N,))
    optimizer, fresh = KFAC(model, learning_rate=0.0), KFAC(model, learning_rate=0.0)
    for bad in (x * 1e3, x * torch.inf):
        with optimizer.capture():
            F.cross_entropy(model(bad), y).backward()
        model.zero_grad(set_to_none=how != "set to zero")
    for opt in (optimizer, fresh):
        opt.zero_grad()
        with opt.capture():
            F.cross_entropy(model(x), y).backward()
        opt.step()
    assert_same_factors(optimizer.factors(), fresh.factors())
    assert optimizer.metrics()["dropped"] == 0


def test_the_batch_is_what_the_loss_sees() -> None:
    """The layer called first is an expert with half of the tokens."""
    torch.manual_seed(0)
    x, y, half = torch.randn(10, 6).double(), torch.randint(3, (10,)), torch.arange(10) < 5
    model = nn.ModuleDict({"e": nn.Linear(6, 6, bias=False), "h": nn.Linear(6, 3, bias=False)}).double()

    def outputs(masked: bool) -> Tensor:
        kept = model["e"](x) * half[:, None] if masked else F.pad(model["e"](x[half]), (0, 0, 0, 5))
        return model["h"](torch.tanh(kept))

    factors = []
    for masked, options in ((True, {"positions": "gradient", "loss_normalizer": 10}), (False, {})):
        optimizer = KFAC(model, learning_rate=0.0)
        model.zero_grad()
        with optimizer.capture(**options):
            F.cross_entropy(outputs(masked), y).backward()
        optimizer.step()
        factors.append(optimizer.factors())
    for name in ("e", "h"):
        torch.testing.assert_close(factors[1][name].B, factors[0][name].B, rtol=1e-12, atol=0)


class Halting(nn.Module):
    """A layer that is called on fewer and fewer examples, and one on all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for active in (10, 8, 4):
            x = torch.cat([torch.tanh(self.step(x[:active])), x[active:]])
        return self.head(x)


def test_a_layer_that_examples_leave_is_not_the_batch() -> None:
    torch.manual_seed(0)
    x, y, model = torch.randn(10, 6).double(), torch.randint(3, (10,)), Halting().double()
    got, want = (
        factors_of(model, lambda m: F.cross_entropy(m(x), y), capture={"loss_normalizer": number})
        for number in (None, 10)
    )
    torch.testing.assert_close(got["head"].B, want["head"].B, rtol=1e-12, atol=0)


@pytest.mark.parametrize("distance", [F.mse_loss, lambda w, start: F.kl_div(w, start, reduction="batchmean")])
def test_a_distance_of_weights_is_not_the_loss(distance: Callable[[Tensor, Tensor], Tensor]) -> None:
    """As many rows as the weight has outputs are no batch."""
    torch.manual_seed(0)
    latents, x, y = torch.randn(5, 6).double(), torch.randn(10, 6).double(), torch.randint(3, (10,))
    model = nn.ModuleDict({"q": nn.Linear(6, 6), "k": nn.Linear(6, 5), "h": nn.Linear(6, 3)}).double()

    def loss(m: nn.Module, penalty: float) -> Tensor:
        h = torch.softmax(m["k"](x) @ torch.tanh(m["q"](latents)), -1)
        value = F.cross_entropy(m["h"](h), y)
        return value + penalty * distance(m["k"].weight, torch.zeros(5, 6).double()) if penalty else value

    got, want = (factors_of(model, lambda m, p=p: loss(m, p)) for p in (1e-9, 0.0))
    assert_same_factors(got, want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("readout", ["mean", "sum"])
def test_weights_of_a_loss_count_where_they_are_not_zero(approximation: str, readout: str) -> None:
    weights = torch.tensor([[0.5, 2.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [255.0, 1.0, -1.0]])
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(4, 3, 4)
    found = [
        capture_once(
            copy.deepcopy(model),
            lambda m: (m(x).square().sum(-1) * weights).sum() / 3,
            capture={"positions": Positions(mask, readout=readout), "loss_normalizer": 3.0},
            approximation=approximation,
        ).factors()
        for mask in (weights, weights != 0, (weights != 0).to(torch.uint8) * 255)
    ]
    assert_same_factors(found[0], found[1])
    assert_same_factors(found[2], found[1])


class Chunked(nn.Module):
    """A language model whose loss is taken of so many parts of the tokens at a time; None: of all at once."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 11, bias=False)

    def loss(self, x: Tensor, y: Tensor, chunks: int | None, *, forget: bool = False) -> Tensor:
        def of_part(h: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(self.head(self.norm(h)), labels, reduction="sum")

        h = torch.tanh(self.body(x)).flatten(0, 1)
        if chunks is None:
            return of_part(h, y.flatten()) / y.numel()
        parts = zip(h.chunk(chunks), y.flatten().chunk(chunks), strict=True)
        run = functools.partial(checkpoint, of_part, use_reentrant=False) if forget else of_part
        return sum(run(*part) for part in parts) / y.numel()


@APPROXIMATIONS
@pytest.mark.parametrize("forget", [False, True])
@pytest.mark.parametrize("chunks", [3, 5, 12])
def test_a_head_that_takes_its_tokens_in_chunks(approximation: str, chunks: int, forget: bool) -> None:
    """It sees the tokens it sees at once; the last of five chunks is a smaller one."""
    model, x, y = Chunked(), torch.randn(4, 6, 5), torch.randint(11, (4, 6))
    options = {"approximation": approximation}
    with pytest.warns(UserWarning, match=r"the batch has 4 examples, as body sees them.*head \(24\)"):
        want = factors_of(model, lambda m: m.loss(x, y, None), **options)
    with pytest.warns(UserWarning, match=r"the batch has 4 examples, as body sees them.*head \(24\)"):
        got = factors_of(model, lambda m: m.loss(x, y, chunks, forget=forget), **options)
    assert_same_factors(got, want)


def dense_factors(model: nn.Sequential, x: Tensor, y: Tensor) -> dict[str, FactorPair]:
    """Of two linear layers that are called once for each example, with a tanh in between."""
    hidden = torch.tanh(model[0](x)).detach()
    inner = model[0](x).detach().requires_grad_()
    outer = model[2](torch.tanh(inner))
    gradients = torch.autograd.grad(F.cross_entropy(outer, y, reduction="sum"), (inner, outer))
    found = {}
    for name, inputs, g in zip(("0", "2"), (x, hidden), gradients, strict=True):
        a = torch.cat([inputs, torch.ones(len(x), 1)], dim=1)
        found[name] = FactorPair(a.T @ a / len(x), g.T @ g / len(x))
    return found


@APPROXIMATIONS
@pytest.mark.parametrize("parts", [[5, 5], [4, 4, 2], [1] * 10])
def test_parts_of_a_batch_with_one_backward_pass(
    approximation: str, parts: list[int], recwarn: pytest.WarningsRecorder
) -> None:
    """Each part has examples of its own, though calls on equally many rows otherwise see the same."""
    model, x, y = mlp(6, 5, 3), torch.randn(N, 6), torch.randint(3, (N,))

    def loss(m: nn.Module) -> Tensor:
        found = zip(x.split(parts), y.split(parts), strict=True)
        return sum(F.cross_entropy(m(rows), labels) * len(labels) for rows, labels in found) / N

    got = factors_of(model, loss, approximation=approximation)
    assert_same_factors(got, dense_factors(model, x, y))
    assert not [w for w in recwarn if "K-FAC" in str(w.message)]


@APPROXIMATIONS
def test_parts_in_each_of_several_passes(approximation: str) -> None:
    """Two micro-batches with a backward pass each, of two parts each, in one capture."""
    model, x, y = mlp(6, 5, 3), torch.randn(8, 6), torch.randint(3, (8,))
    optimizer = KFAC(model, approximation=approximation)
    want = dense_factors(model, x, y)
    with optimizer.capture(loss_normalizer=8):
        for rows, labels in zip(x.split(4), y.split(4), strict=True):
            parts = zip(rows.split(2), labels.split(2), strict=True)
            (sum(F.cross_entropy(model(a), b, reduction="sum") for a, b in parts) / 8).backward()
    optimizer.step()
    assert_same_factors(optimizer.factors(reduction="mean"), want)


@APPROXIMATIONS
def test_parts_of_one_pass_are_not_those_of_the_next(approximation: str) -> None:
    """Steps of the same examples follow, as many and on as many rows as the parts had."""
    x, y, steps, of_steps = (
        torch.randn(8, 6),
        torch.randint(3, (8,)),
        torch.randn(2, 4, 6),
        torch.randint(3, (2, 4)),
    )

    def in_parts(m: nn.Module) -> Tensor:
        parts = zip(x.chunk(2), y.chunk(2), strict=True)
        return sum(F.cross_entropy(m(rows), labels, reduction="sum") for rows, labels in parts) / 8

    def in_steps(m: nn.Module) -> Tensor:
        return (
            sum(
                F.cross_entropy(m(rows), labels, reduction="sum")
                for rows, labels in zip(steps, of_steps, strict=True)
            )
            / 8
        )

    def factors(*losses: Callable[[nn.Module], Tensor]) -> dict[str, FactorPair]:
        model = mlp(6, 5, 3)
        model.load_state_dict(values)
        optimizer = KFAC(model, approximation=approximation)
        with optimizer.capture(loss_normalizer=8):
            for loss in losses:
                loss(model).backward()
        optimizer.step()
        return optimizer.factors(reduction="mean")

    values = mlp(6, 5, 3).state_dict()
    first, then, both = factors(in_parts), factors(in_steps), factors(in_parts, in_steps)
    for name, pair in both.items():
        torch.testing.assert_close(pair.B, (8 * first[name].B + 4 * then[name].B) / 12)


def test_chunks_that_do_not_show_are_named_with_what_they_may_be() -> None:
    """Targets made anew for each chunk tell nothing: the number that B is scaled by is said to be one call's."""
    model, x, y = Chunked(), torch.randn(4, 6, 5), torch.randint(11, (4, 6))

    def loss(m: Chunked) -> Tensor:
        parts = zip(torch.tanh(m.body(x)).flatten(0, 1).chunk(3), y.flatten().chunk(3), strict=True)
        return sum(F.cross_entropy(m.head(h), labels.clone(), reduction="sum") for h, labels in parts) / 24

    with pytest.warns(
        UserWarning, match=r"as head sees them.*head is called 3 times: where each call has examples"
    ):
        factors_of(model, loss)


def test_time_steps_are_no_parts(recwarn: pytest.WarningsRecorder) -> None:
    """Targets of steps are columns, or rows where time comes first: calls see the same examples."""
    model, x, y = mlp(6, 5, 3), torch.randn(N, 4, 6), torch.randint(3, (N, 4))
    first = y.T.contiguous()

    def loss(m: nn.Module, targets: list[Tensor]) -> Tensor:
        return sum(F.cross_entropy(m(x[:, t]), target) for t, target in enumerate(targets))

    want = factors_of(model, lambda m: 4 * F.cross_entropy(m(x).flatten(0, 1), y.flatten()))
    for targets in (list(y.unbind(1)), list(first), [row.clone() for row in first]):
        got = factors_of(model, lambda m, targets=targets: loss(m, targets))
        assert_same_factors(got, want)
    assert not [w for w in recwarn if "K-FAC" in str(w.message)]


def test_a_grad_scaler_that_nobody_spoke_of_is_named(recwarn: pytest.WarningsRecorder) -> None:
    """B is that of the loss as it is multiplied; with the normalizer that the warning asks for, of the loss."""
    model, x, y = mlp(6, 5, 3), torch.randn(N, 6), torch.randint(3, (N,))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scale = scaler.scale(torch.ones(()))
    want = dense_factors(model, x, y)

    def factors(loss: Callable[[nn.Module], Tensor], **capture: float) -> dict[str, FactorPair]:
        return factors_of(model, loss, capture=capture)

    def scaled(m: nn.Module) -> Tensor:
        return scaler.scale(F.cross_entropy(m(x), y))

    with pytest.warns(UserWarning, match=r"multiplied by 65536.*len\(x\) / scaler.get_scale\(\)"):
        got = factors(scaled)
    assert_same_factors(got, {name: FactorPair(a, b * scale**2) for name, (a, b) in want.items()})
    recwarn.clear()
    assert_same_factors(factors(scaled, loss_normalizer=N / scale.item()), want)
    factors(lambda m: 100 * F.cross_entropy(m(x), y) + 5000 * F.mse_loss(m(x), x[:, :3]))
    assert not [w for w in recwarn if "K-FAC" in str(w.message)]


def test_a_loss_that_is_a_sum_is_named(recwarn: pytest.WarningsRecorder) -> None:
    """As in variational autoencoders; one that is divided, or the only example's, is as it should be."""
    model, x, y = mlp(6, 5, 3), torch.randn(N, 6), torch.randint(3, (N,))
    want = dense_factors(model, x, y)

    def total(m: nn.Module) -> Tensor:
        return F.cross_entropy(m(x), y, reduction="sum")

    with pytest.warns(UserWarning, match=r"the loss is a sum over examples.*loss_normalizer=1\)"):
        got = factors_of(model, lambda m: total(m) + m[0].weight.square().sum())
    assert_same_factors(got, {name: FactorPair(a, b * N**2) for name, (a, b) in want.items()})
    recwarn.clear()
    assert_same_factors(factors_of(model, total, capture={"loss_normalizer": 1}), want)
    assert_same_factors(factors_of(model, lambda m: total(m) / N), want)
    factors_of(model, lambda m: F.cross_entropy(m(x[:1]), y[:1], reduction="sum"))
    factors_of(model, lambda m: F.cross_entropy(m(x), y) + F.mse_loss(m(x), x[:, :3], reduction="sum"))
    assert not [w for w in recwarn if "K-FAC" in str(w.message)]


class Steps(nn.Module):
    """A recurrent network with a loss at each step, from zero or, if `begins`, from what a layer makes."""

    def __init__(self, *, begins: bool = False) -> None:
        super().__init__()
        self.inner, self.state, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.first = nn.Linear(4, 5) if begins else None

    def forward(self, x: Tensor, labels: list[Tensor]) -> Tensor:
        steps = x.chunk(len(labels))
        h, total = torch.zeros(len(steps[0]), 5), torch.zeros(())
        if self.first is not None:
            h = torch.tanh(self.first(steps[0]))
        for step, label in zip(steps, labels, strict=True):
            h = torch.tanh(self.inner(step) + self.state(h))
            total = total + F.cross_entropy(self.head(h), label)
        return total


@APPROXIMATIONS
def test_steps_that_carry_a_state_are_no_parts(approximation: str) -> None:
    """Slices of one sequence's labels look like parts of a batch, but its states depend on those before."""
    model, x, y = Steps(), torch.randn(4, 4), torch.randint(3, (4,))
    want = factors_of(model, lambda m: m(x, [label.clone() for label in y.split(1)]), approximation=approximation)
    got = factors_of(model, lambda m: m(x, list(y.split(1))), approximation=approximation)
    assert_same_factors(got, want)


@APPROXIMATIONS
@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_steps_of_many_examples_are_no_parts(approximation: str, begins: bool, micro_batches: int) -> None:
    """Time comes first, and labels are flat: slices of steps are blocks. The first state may be a layer's output,
    and a capture may have more sequences than these have steps."""
    model, x, y = (
        Steps(begins=begins),
        torch.randn(micro_batches, 3 * N, 4),
        torch.randint(3, (micro_batches, 3 * N)),
    )

    def factors(*, sliced: bool) -> dict[str, FactorPair]:
        copied = copy.deepcopy(model)
        optimizer = KFAC(copied, approximation=approximation)
        with optimizer.capture():
            for rows, of_rows in zip(x, y, strict=True):
                labels = list(of_rows.clone().chunk(3))
                loss = copied(rows, labels if sliced else [label.clone() for label in labels])
                (loss / micro_batches).backward()
        optimizer.step()
        return optimizer.factors(reduction="mean")

    assert_same_factors(factors(sliced=True), factors(sliced=False))


@APPROXIMATIONS
@pytest.mark.parametrize("chunks", [2, 4])
def test_a_trunk_that_is_called_again_leaves_the_parts_of_its_head(approximation: str, chunks: int) -> None:
    """All parts need all of its calls: it is no recurrence from part to part."""
    model, x, y = mlp(6, 6, 3), torch.randn(8, 6), torch.randint(3, (8,))

    def loss(m: nn.Sequential, parts: int) -> Tensor:
        h = torch.tanh(m[0](torch.tanh(m[0](x))))
        found = zip(h.chunk(parts), y.chunk(parts), strict=True)
        return sum(F.cross_entropy(m[2](rows), labels, reduction="sum") for rows, labels in found) / 8

    want = factors_of(model, lambda m: loss(m, 1), approximation=approximation)
    assert_same_factors(factors_of(model, lambda m: loss(m, chunks), approximation=approximation), want)


@APPROXIMATIONS
@pytest.mark.parametrize("sizes", [[3, 3, 3], [4, 3, 2]])
def test_calls_are_of_the_part_whose_loss_needs_them(approximation: str, sizes: list[int]) -> None:
    """A layer goes twice over each part, over all parts a first time before any a second time, and losses come in
    another order."""
    model, x, y = mlp(6, 6, 3), torch.randn(9, 6), torch.randint(3, (9,))

    def apart(m: nn.Sequential) -> Tensor:
        hidden = [torch.tanh(m[0](rows)) for rows in x.split(sizes)]
        hidden = [torch.tanh(m[0](h)) for h in hidden]
        outputs = [m[2](h) for h in hidden]
        found = list(zip(outputs, y.split(sizes), strict=True))
        return sum(F.cross_entropy(o, labels, reduction="sum") for o, labels in found[::-1]) / 9

    def at_once(m: nn.Sequential) -> Tensor:
        return F.cross_entropy(m[2](torch.tanh(m[0](torch.tanh(m[0](x))))), y)

    want = factors_of(model, at_once, approximation=approximation)
    assert_same_factors(factors_of(model, apart, approximation=approximation), want)


@APPROXIMATIONS
@pytest.mark.parametrize("length", [1, 2])
def test_slices_of_one_sequence_are_no_parts_of_a_batch(approximation: str, length: int) -> None:
    """A batch of one sequence is contiguous in time, too; it has one example, as each of several has."""
    model, x, y = mlp(6, 5, 3), torch.randn(1, 4, 6), torch.randint(3, (1, 4))

    def loss(m: nn.Module, of: Callable[[Tensor], Tensor]) -> Tensor:
        found = zip(x.split(length, 1), y.split(length, 1), strict=True)
        return (
            sum(
                F.cross_entropy(m(rows).flatten(0, 1), of(labels.flatten()), reduction="sum")
                for rows, labels in found
            )
            / 4
        )

    want = factors_of(model, lambda m: loss(m, torch.clone), approximation=approximation)
    assert_same_factors(factors_of(model, lambda m: loss(m, lambda y: y), approximation=approximation), want)


@pytest.mark.parametrize("added", [False, True])
def test_an_auxiliary_loss_is_no_further_part(added: bool) -> None:
    """Means over parts are averaged or added up; each part has another, smaller loss on the same targets."""
    model, x, y = mlp(6, 5, 3), torch.randn(N, 6), torch.randint(3, (N,))

    def losses(m: nn.Module, rows: Tensor, labels: Tensor) -> Tensor:
        out = m(rows)
        return F.cross_entropy(out, labels) + 0.3 * F.cross_entropy(0.5 * out, labels)

    def in_parts(m: nn.Module) -> Tensor:
        total = sum(losses(m, *part) for part in zip(x.chunk(2), y.chunk(2), strict=True))
        return total if added else total / 2

    assert_same_factors(factors_of(model, in_parts), factors_of(model, lambda m: losses(m, x, y)))


@pytest.mark.parametrize("by_position", [False, True])
def test_a_mean_times_its_size_is_no_scaler(by_position: bool, recwarn: pytest.WarningsRecorder) -> None:
    """A mean over all elements, or tokens, times the 1024 of each example is a mean of sums, and B is theirs."""
    x = torch.randn(2, 1024, 6) if by_position else torch.randn(N, 6)
    y = torch.randint(3, (2, 1024)) if by_position else torch.randn(N, 1024)
    model = mlp(6, 5, 3 if by_position else 1024)

    def mean(m: nn.Module) -> Tensor:
        return 1024 * (F.cross_entropy(m(x).flatten(0, 1), y.flatten()) if by_position else F.mse_loss(m(x), y))

    def by_example(m: nn.Module) -> Tensor:
        out = m(x)
        each = F.cross_entropy(out.mT, y, reduction="none") if by_position else F.mse_loss(out, y, reduction="none")
        return each.sum(1).mean()

    assert_same_factors(factors_of(model, mean), factors_of(model, by_example))
    assert not [w for w in recwarn if "multiplied" in str(w.message)]


def test_a_sum_over_features_is_no_sum_over_examples(recwarn: pytest.WarningsRecorder) -> None:
    """Moments that a batch's outputs are to have, beside a mean that no loss function makes."""
    model, x, y = mlp(6, 5, 3), torch.randn(N, 6), torch.randint(3, (N,))

    def loss(m: nn.Module) -> Tensor:
        out = m(x)
        likelihood = -F.log_softmax(out, 1)[torch.arange(N), y].mean()
        return likelihood + F.mse_loss(out.mean(0), torch.zeros(3), reduction="sum")

    factors_of(model, loss)
    assert not [w for w in recwarn if "K-FAC" in str(w.message)]


@APPROXIMATIONS
@pytest.mark.parametrize("images", [1, 4])
def test_levels_of_a_pyramid_see_the_same_examples(approximation: str, images: int) -> None:
    """A head goes over two resolutions of what a trunk makes; the labels of all positions are one flat tensor."""
    model = nn.ModuleDict({"trunk": nn.Conv2d(2, 4, 3, padding=1), "head": nn.Conv2d(4, 3, 1)})
    x, y = torch.randn(images, 2, 4, 4), torch.randint(3, (images * (16 + 4),))

    def loss(m: nn.ModuleDict, labels: list[Tensor]) -> Tensor:
        h = torch.tanh(m["trunk"](x))
        levels = [m["head"](level).movedim(1, -1).flatten(0, 2) for level in (h, F.avg_pool2d(h, 2))]
        return sum(F.cross_entropy(*pair, reduction="sum") for pair in zip(levels, labels, strict=True)) / images

    parts = y.split([images * 16, images * 4])
    want = factors_of(model, lambda m: loss(m, [part.clone() for part in parts]), approximation=approximation)
    assert_same_factors(factors_of(model, lambda m: loss(m, list(parts)), approximation=approximation), want)
