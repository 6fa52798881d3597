"""Losses that are taken part by part: which calls of a layer see examples of their own, and which the same ones."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from algoperf_kfac.pytorch import KFAC, FactorPair
from tests.pytorch.toys import assert_same_factors, dense_factors, factors_of, mlp

N = 10
APPROXIMATIONS = pytest.mark.parametrize("approximation", ["expand", "reduce"])
pytestmark = pytest.mark.usefixtures("double")


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
