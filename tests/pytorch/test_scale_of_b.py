"""B belongs to the loss of single examples, on one scale for all layers, whatever the passes of a step are."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algoperf_kfac.pytorch import KFAC, FactorPair, Positions
from tests.pytorch.toys import assert_same_factors, capture_once, dense_factors, factors_of, mlp

N = 10
APPROXIMATIONS = pytest.mark.parametrize("approximation", ["expand", "reduce"])
pytestmark = pytest.mark.usefixtures("double")


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
