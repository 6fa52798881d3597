"""What must change nothing: the order of examples, how often they occur, how the loss is scaled, micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algoperf_kfac.pytorch import KFAC, FactorPair
from tests.math import naive
from tests.math.support import assert_equal, batched, empirical_factors

APPROXIMATIONS = pytest.mark.parametrize("approximation", ["expand", "reduce"])
N = 6


class Tokens(nn.Module):
    """Scores for a target per position."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Image(nn.Module):
    """Convolutions of several kinds, pooled before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, padding=1, groups=2),
            nn.ReLU(),
            nn.ConvTranspose2d(4, 3, 2, stride=2, bias=False),
        )
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "tokens": (Tokens, (N, 7, 4)),
    "image": (Image, (N, 2, 6, 6)),
}
EACH_MODEL = pytest.mark.parametrize("name", MODELS)


def make(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    build, shape = MODELS[name]
    model, x = build(), torch.randn(*shape)
    return model, x, torch.randint(3, model(x).shape[:-1])


def summed(y: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda outputs: F.cross_entropy(outputs.flatten(0, -2), y.flatten(), reduction="sum")


def assert_all_equal(got: dict[str, FactorPair], expected: dict[str, FactorPair]) -> None:
    assert got.keys() == expected.keys()
    for name, pair in got.items():
        assert_equal(pair, expected[name])


@EACH_MODEL
@APPROXIMATIONS
def test_the_order_of_examples(name: str, approximation: str) -> None:
    model, x, y = make(name)
    expected = empirical_factors(model, x, summed(y), approximation)
    order = torch.randperm(N)
    assert_all_equal(empirical_factors(model, x[order], summed(y[order]), approximation), expected)


@APPROXIMATIONS
def test_the_order_of_positions(approximation: str) -> None:
    """Differently in each example."""
    model, x, y = make("tokens")
    expected = empirical_factors(model, x, summed(y), approximation)
    rows, order = torch.arange(N)[:, None], torch.rand(N, 7).argsort(1)
    assert_all_equal(empirical_factors(model, x[rows, order], summed(y[rows, order]), approximation), expected)


@EACH_MODEL
@APPROXIMATIONS
def test_repeating_the_batch_doubles_b_of_the_sum_and_nothing_else(name: str, approximation: str) -> None:
    model, x, y = make(name)
    twice = (torch.cat([x, x]), summed(torch.cat([y, y])))
    expected = empirical_factors(model, x, summed(y), approximation, reduction="mean")
    assert_all_equal(empirical_factors(model, *twice, approximation, reduction="mean"), expected)
    once = empirical_factors(model, x, summed(y), approximation)
    doubled = {layer: FactorPair(pair.A, 2 * pair.B) for layer, pair in once.items()}
    assert_all_equal(empirical_factors(model, *twice, approximation), doubled)


@EACH_MODEL
@APPROXIMATIONS
def test_sum_is_the_mean_times_the_number_of_examples(name: str, approximation: str) -> None:
    model, x, y = make(name)
    mean = empirical_factors(model, x, summed(y), approximation, reduction="mean")
    expected = {layer: FactorPair(pair.A, N * pair.B) for layer, pair in mean.items()}
    assert_all_equal(empirical_factors(model, x, summed(y), approximation), expected)


@EACH_MODEL
@APPROXIMATIONS
@pytest.mark.parametrize("normalizer", [None, 123.0, "tensor"])
def test_the_scale_of_the_loss(name: str, approximation: str, normalizer: float | str | None) -> None:
    """A mean over examples by default; a mean over anything else (valid tokens) when told so."""
    model, x, y = make(name)
    expected = empirical_factors(model, x, summed(y), approximation)
    told = torch.tensor(42.0) if normalizer == "tensor" else normalizer
    divisor = N if told is None else told
    got = empirical_factors(
        model, x, lambda outputs: summed(y)(outputs) / divisor, approximation, loss_normalizer=told
    )
    assert_all_equal(got, expected)


@EACH_MODEL
@APPROXIMATIONS
@pytest.mark.parametrize("sizes", [[2, 2, 2], [1, 5]], ids=["equal", "unequal"])
@pytest.mark.parametrize("contexts", ["one capture", "several captures"])
def test_micro_batches(name: str, approximation: str, sizes: Sequence[int], contexts: str) -> None:
    model, x, y = make(name)
    expected = empirical_factors(model, x, summed(y), approximation)
    optimizer = KFAC(model, approximation=approximation)
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    # Each loss is divided by the size of the whole batch, as gradient accumulation does.
    if contexts == "one capture":
        with optimizer.capture():
            for x_i, y_i in batches:
                (summed(y_i)(model(x_i)) / N).backward()
    else:
        for x_i, y_i in batches:
            with optimizer.capture(loss_normalizer=N):
                (summed(y_i)(model(x_i)) / N).backward()
    optimizer.step()
    assert_all_equal(optimizer.factors(), expected)


@EACH_MODEL
@APPROXIMATIONS
def test_exact_fisher_in_micro_batches(name: str, approximation: str) -> None:
    model, x, _ = make(name)
    pairs = []
    for sizes in ([N], [2, 4]):
        optimizer = KFAC(model, approximation=approximation, fisher="exact", learning_rate=0.0)
        with optimizer.capture() as capture:
            for part in x.split(sizes):
                outputs = model(part)
                capture.backward_fisher(outputs, "softmax_cross_entropy")
                outputs.sum().backward()
        optimizer.step()
        pairs.append(optimizer.factors())
    assert_all_equal(pairs[1], pairs[0])


class Twice(nn.Module):
    """Calls one layer on two inputs of different length."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.layer(x[:, :2]).sin(), 2 * self.layer(x[:, 2:] + 1)], 1)


@APPROXIMATIONS
def test_a_module_called_twice_has_the_positions_of_both_calls(approximation: str) -> None:
    model, x = Twice(), torch.randn(N, 5, 4)
    got = empirical_factors(model, x, lambda outputs: (outputs**2).sum(), approximation)["layer"]
    inputs = torch.cat([x[:, :2], x[:, 2:] + 1], 1)
    s = model.layer(inputs).detach().requires_grad_()
    (torch.cat([s[:, :2].sin(), 2 * s[:, 2:]], 1) ** 2).sum().backward()
    parts = [list(t.unsqueeze(2)) for t in (inputs, s.grad)]
    assert_equal(got, naive.factors(*parts, bias=True, approximation=approximation))


@EACH_MODEL
@APPROXIMATIONS
def test_blocks_are_the_diagonal_blocks_of_the_whole_factor(name: str, approximation: str) -> None:
    model, x, y = make(name)
    whole = empirical_factors(model, x, summed(y), approximation)
    split = empirical_factors(model, x, summed(y), approximation, max_factor_dim=3)
    for layer, pair in whole.items():
        for full, blocks in zip(batched(pair), split[layer], strict=True):
            blocks = blocks if isinstance(blocks, tuple) else (blocks,)
            assert all(block.shape[-1] <= 3 for block in blocks)
            expected = torch.zeros_like(full)
            start = 0
            for block in blocks:
                stop = start + block.shape[-1]
                expected[:, start:stop, start:stop] = full[:, start:stop, start:stop]
                got = block if block.dim() == 3 else block[None]
                torch.testing.assert_close(got, expected[:, start:stop, start:stop], rtol=1e-12, atol=1e-14)
                start = stop
            assert start == full.shape[-1]
    assert any(isinstance(pair.A, tuple) for pair in split.values())


@pytest.mark.parametrize(("limit", "layer", "identity"), [(5, "body.2", "A"), (4, "body.0", "B")])
def test_one_sided_leaves_the_other_factor_whole(limit: int, layer: str, identity: str) -> None:
    model, x, y = make("tokens")
    if identity == "B":  # 5 outputs, 3 inputs and the bias
        model.body[0], x = nn.Linear(3, 5), x[..., :3]
    whole = empirical_factors(model, x, summed(y), "expand")[layer]
    options = {"max_factor_dim": limit, "large_factor": "one_sided"}
    got = empirical_factors(model, x, summed(y), "expand", **options)[layer]
    other = "B" if identity == "A" else "A"
    assert getattr(got, identity) == ()
    torch.testing.assert_close(getattr(got, other), getattr(whole, other))
