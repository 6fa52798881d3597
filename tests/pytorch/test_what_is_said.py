"""What would go by without a word: positions that fit nothing, heads, classes elsewhere, worthless directions."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algoperf_kfac.errors import MissingStatisticsError
from algoperf_kfac.pytorch import KFAC, Positions
from algoperf_kfac.pytorch.evidence import fit_factors
from tests.pytorch.toys import assert_same_factors, covered, factors_of, mlp


class Tokens(nn.Module):
    """A table that is looked up once for the whole batch, and layers on nodes, edges and graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.node, self.graph = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, kinds: Tensor, ids: Tensor, graphs: int) -> Tensor:
        table = self.table(torch.arange(9))  # not the rows of any segmentation
        h = torch.tanh(self.node(table[kinds]))
        return self.graph(torch.zeros(graphs, 4).index_add(0, ids, h))


def test_positions_do_not_concern_a_table_that_is_not_covered() -> None:
    model, ids = Tokens(), torch.tensor([0, 0, 0, 1, 1, 2, 2])
    optimizer = KFAC(model, approximation="reduce")
    positions = [
        Positions(segment_ids=ids, num_segments=3),
        Positions(segment_ids=torch.zeros(5).long(), num_segments=3),
    ]
    with optimizer.capture(positions):
        model(torch.randint(9, (7,)), ids, 3).square().sum(1).mean().backward()
    optimizer.step()
    assert covered(optimizer) == {"node", "graph"}
    assert torch.all(optimizer.factors(reduction="mean")["node"].A[-1, -1] == 1)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (torch.ones(7, 3), r"positions: a mask of shape \(7, 3\) fits no layer. Their rows are: .*0 \(6, 5\)"),
        ({"2": torch.ones(6, 4)}, r"layer 2: a mask of shape \(6, 4\)"),
        ({"10*": torch.ones(6, 5)}, r"positions: no layer matches '10\*'"),
    ],
    ids=["for all", "by name", "a name that is none"],
)
def test_positions_that_fit_nothing_are_refused(positions: object, message: str) -> None:
    model = mlp(4, 8, 3)
    optimizer = KFAC(model)
    with pytest.raises(ValueError, match=message), optimizer.capture(positions):
        model(torch.randn(6, 5, 4)).square().mean().backward()


def test_sequences_that_come_first_are_named_or_described() -> None:
    """(T, N, features): said where the loss shows it; batch_dim and segments of both dimensions describe it."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(4, 7, 6), torch.randint(3, (4,))
    turned, ids, mask = x.transpose(0, 1), torch.arange(4).expand(7, 4), torch.rand(4, 7) > 0.3

    def factors(data: Tensor, time: int, positions: object = None) -> dict:
        loss = lambda m: F.cross_entropy(m(data).mean(time), y)  # noqa: E731
        return factors_of(
            model, loss, approximation="reduce", capture={"positions": positions, "loss_normalizer": 4}
        )

    want, masked = factors(x, 1), factors(x, 1, mask)
    with pytest.warns(UserWarning, match=r"inputs \(7, 4, features\).*has 4 rows.*Positions\(batch_dim=1\)"):
        factors(turned, 0)
    for positions in (Positions(batch_dim=1), Positions(segment_ids=ids, num_segments=4)):
        assert_same_factors(factors(turned, 0, positions), want)
    for given in (Positions(mask.T, batch_dim=1), Positions(mask.T, ids, 4), {"*": Positions(mask.T, ids, 4)}):
        assert_same_factors(factors(turned, 0, given), masked)
    message = r"has 7 rows in dimension 0, neither those of segment_ids \(28\) nor one .*sequence comes first"
    with pytest.raises(ValueError, match=message):
        factors(turned, 0, Positions(segment_ids=ids.flatten(), num_segments=4))


def under_func(model: nn.Module, x: Tensor) -> None:
    params = dict(model.named_parameters())
    found = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).square().sum())(params)
    for name, p in params.items():
        p.grad = found[name].detach()


def with_others(model: nn.Module, x: Tensor) -> None:
    params = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
    torch.func.functional_call(model, params, (x,)).square().mean().backward()


def in_a_thread(model: nn.Module, x: Tensor) -> None:
    with ThreadPoolExecutor(1) as pool:
        outputs = pool.submit(model, x).result()
    outputs.square().mean().backward()


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (under_func, r"nothing was captured.*inside torch\.func \(grad, vmap, \.\.\.\).*run it as it is"),
        (lambda m, x: torch.vmap(m)(x).square().sum().backward(), r"missed its inputs.*inside torch\.func"),
        (
            lambda m, x: m(x[:0]).sum().backward(),
            "missed its inputs.*The batch has no examples: leave such a step out",
        ),
        (with_others, r"missed its inputs.*Nothing is seen of a model.*other tensors in place of its parameters"),
        (in_a_thread, r"missed its inputs.*Nothing is seen of a model that runs in another thread"),
    ],
    ids=["grad", "vmap", "empty", "functional_call", "thread"],
)
def test_passes_that_show_no_layer_are_named(run: Callable[[nn.Module, Tensor], None], message: str) -> None:
    model = mlp(6, 8, 3)
    optimizer = KFAC(model)

    def step() -> None:
        with optimizer.capture():
            run(model, torch.randn(4, 6))
        optimizer.step()

    with pytest.raises(MissingStatisticsError, match=message) as said:
        step()
    assert "exclude=[...]" not in str(said.value)


class Mapped(nn.Module):
    """A layer inside torch.vmap, one outside, and perhaps one on both sides."""

    def __init__(self, *, twice: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
        self.twice = twice

    def forward(self, x: Tensor) -> Tensor:
        h = torch.vmap(lambda row: torch.tanh(self.first(row)))(x)
        return self.last(self.first(h) if self.twice else h)


def test_a_part_of_a_model_inside_vmap_is_named_at_once() -> None:
    with pytest.raises(
        MissingStatisticsError,
        match=r"1 of 2 layers.*: first \(missed its inputs, inside torch\.func\).*run it as it is",
    ):
        factors_of(Mapped(twice=False), lambda m: m(torch.randn(4, 6)).square().mean())
    with pytest.warns(UserWarning, match=r"first takes the fallback.*also read by a call inside torch\.func"):
        factors_of(Mapped(twice=True), lambda m: m(torch.randn(4, 6)).square().mean())
    with pytest.warns(UserWarning, match=r"first takes the fallback.*missed its inputs, inside torch\.func"):
        found = factors_of(
            Mapped(twice=False), lambda m: m(torch.randn(4, 6)).square().mean(), allow_partial_coverage=True
        )
    assert set(found) == {"last"}


class Separate(nn.Module):
    """A table and an output layer of its size."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix, self.out = nn.Embedding(7, 8), nn.Linear(8, 8), nn.Linear(8, 7, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.mix(self.table(tokens))))


def tie(model: nn.Module) -> None:
    model.out.weight = model.table.weight


def remove(model: nn.Module) -> None:
    model.out = nn.Identity()


@pytest.mark.parametrize("change", [tie, remove])
def test_a_weight_that_the_model_no_longer_has_is_named_at_once(change: Callable[[nn.Module], None]) -> None:
    model, tokens = Separate(), torch.randint(7, (4, 5))
    optimizer = KFAC(model, lr=1e-2)
    change(model)

    def capture() -> None:
        with optimizer.capture(loss_normalizer=20):
            F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()

    with pytest.raises(
        MissingStatisticsError,
        match=r"1 of \d layers.*: out \(missed its inputs, as the model has no out\.weight any more\)\. It was "
        r"tied to another, replaced or removed.*add_param_group",
    ):
        capture()
    optimizer.zero_grad()
    optimizer.add_param_group({"params": []})  # as it says
    capture()
    optimizer.step()
    assert covered(optimizer) == ({"mix", "table"} if change is tie else {"mix"})


def test_gradients_that_are_returned_replace_old_ones(recwarn: pytest.WarningsRecorder) -> None:
    """torch.autograd.grad adds to nothing: what is there are those of the last step."""
    model, x, y = mlp(6, 8, 3), torch.randn(4, 6), torch.randint(3, (4,))
    optimizer = KFAC(model)
    params = list(model.parameters())
    for _ in range(3):
        with optimizer.capture():
            found = torch.autograd.grad(F.cross_entropy(model(x), y), params)
        for p, grad in zip(params, found, strict=True):
            p.grad = grad
        optimizer.step()
    assert not [w for w in recwarn if "K-FAC" in str(w.message)]
    with pytest.warns(UserWarning, match="gradients already that no capture"), optimizer.capture():
        F.cross_entropy(model(x), y).backward()


@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_classes_that_are_not_the_last_dimension(fisher: str) -> None:
    """Logits (N, C, H, W), as of a segmentation."""
    x, conv = torch.randn(2, 3, 2, 2), nn.Conv2d(3, 4, 1)
    line = nn.Linear(3, 4)
    with torch.no_grad():
        line.weight.copy_(conv.weight.flatten(1))
        line.bias.copy_(conv.bias)
    factors = []
    for model, inputs, class_dim in ((conv, x, 1), (line, x.permute(0, 2, 3, 1), -1)):
        optimizer = KFAC(model, fisher=fisher, seed=5)
        with optimizer.capture() as capture:
            outputs = model(inputs)
            capture.backward_fisher(outputs, "softmax_cross_entropy", class_dim=class_dim)
            outputs.square().mean().backward()
        optimizer.step()
        factors.append({"layer": next(iter(optimizer.factors().values()))})
    assert_same_factors(factors[0], factors[1])


def test_several_heads_are_one_call_each() -> None:
    model = nn.ModuleDict({"body": nn.Linear(4, 5), "left": nn.Linear(5, 3), "right": nn.Linear(5, 2)})
    optimizer = KFAC(model, fisher="exact")
    with optimizer.capture() as capture:
        h = torch.tanh(model["body"](torch.randn(6, 4)))
        heads = model["left"](h), model["right"](h)
        with pytest.raises(ValueError, match=r"outputs are a tuple of 2.*once for each"):
            capture.backward_fisher(heads, "softmax_cross_entropy")
        for head in heads:
            capture.backward_fisher(head, "softmax_cross_entropy")
        sum(head.square().mean() for head in heads).backward()
    optimizer.step()
    assert covered(optimizer) == {"body", "left", "right"}


def test_a_capture_is_for_one_pass() -> None:
    model = nn.Linear(4, 3)
    optimizer = KFAC(model)
    capture = optimizer.capture()
    with capture:
        model(torch.randn(6, 4)).square().mean().backward()
    with pytest.raises(RuntimeError, match=r"is for one pass: call optimizer\.capture\(\) again"), capture:
        pass


class Residual(nn.Module):
    """Kernels on smooth images: patches averaged over positions hardly differ between the offsets of a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for conv, norm in zip(self.blocks, self.norms, strict=True):
            x = F.relu(x + norm(conv(x)))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(("approximation", "is_said"), [("reduce", True), ("expand", False)])
def test_directions_that_are_noise_are_named_once(
    approximation: str, is_said: bool, recwarn: pytest.WarningsRecorder
) -> None:
    torch.manual_seed(0)
    model = Residual()
    options = {"factor_interval": 2, "refresh_interval": 6, "damping": 1e-4, "noise_floor": 0.0}
    optimizer = KFAC(model, lr=1e-2, approximation=approximation, **options)
    for _ in range(25):
        x, y = torch.randn(32, 1, 8, 8).cumsum(2).cumsum(3) / 8, torch.randint(3, (32,))
        optimizer.zero_grad()
        with optimizer.capture():
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
    said = [str(w.message) for w in recwarn if "all but singular" in str(w.message)]
    assert len(said) == is_said
    assert all('approximation="expand"' in text and "blocks." in text for text in said)
    table = optimizer.summary(3)
    assert "graft ratio  cosine  A at damping  B at damping  refreshes  idle  noise" in table
    assert "... and 2 more layers" in table


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_a_batch_in_parts_is_named(approximation: str, recwarn: pytest.WarningsRecorder) -> None:
    """Calls are taken to see the same examples, which is right of time steps, and not of a loop over the batch."""
    model, x, y = mlp(6, 8, 3), torch.randn(4, 6), torch.randint(3, (4,))

    def loss(m: nn.Module, rows: list[Tensor]) -> Tensor:
        return F.cross_entropy(torch.cat([m(row).reshape(-1, 3) for row in rows]), y)

    options = {"approximation": approximation, "lr": 0.0}
    for parts, calls in ((list(x), 4), (list(x[:, None]), 4), (list(x.chunk(2)), 2), ([x[:3], x[3:]], 2)):
        message = f"layer 0 is called {calls} times, on 4 rows in all, as many as the loss function has"
        with pytest.warns(UserWarning, match=message):
            factors_of(model, lambda m, parts=parts: loss(m, parts), **options)
    want = factors_of(model, lambda m: F.cross_entropy(m(x), y), **options)
    # The way out: a capture for each.
    optimizer = KFAC(model, **options)
    for row, label in zip(x, y, strict=True):
        with optimizer.capture(loss_normalizer=4):
            (F.cross_entropy(model(row), label) / 4).backward()
    optimizer.step()
    assert_same_factors(optimizer.factors(reduction="mean"), want)
    # Time steps of one sequence, the loss a mean over them; two views of each example, with a loss of both.
    recwarn.clear()
    factors_of(model, lambda m: loss(m, list(x[:, None])), capture={"loss_normalizer": 4}, **options)
    factors_of(model, lambda m: F.cross_entropy(m(x) + m(2 * x), y), **options)
    assert not [w for w in recwarn if "K-FAC" in str(w.message)]


class Tasks(nn.Module):
    """Names with characters that patterns are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("task[0]", "t*", "task0", "t?")})

    def forward(self, x: Tensor) -> Tensor:
        return sum(head(x) for head in self.heads.values())


def test_a_name_matches_itself_whatever_characters_it_has() -> None:
    model, x = Tasks(), torch.randn(6, 4)
    optimizer = KFAC(model, exclude=["heads.task[0]"], output_splits={"heads.t?": 2})
    assert covered(optimizer) == {"heads.t*", "heads.t?"}
    optimizer = KFAC(model, output_splits={"heads.t?": 2})
    layers = {layer.name: layer for layer in optimizer.coverage().layers}
    assert [len(layers[f"heads.{name}"].out_blocks) for name in ("t?", "task0")] == [2, 1]
    half = torch.tensor([1.0, 1, 1, 0, 0, 0])
    with optimizer.capture({"heads.task[0]": half, "heads.t*": torch.ones(6)}):
        model(x).square().sum(1).mean().backward()
    optimizer.step()
    counts = {name: pair.A[:4, :4].trace() for name, pair in optimizer.factors(reduction="mean").items()}
    torch.testing.assert_close(counts["heads.task[0]"], x[:3].square().sum() / 3)
    for name in ("heads.t*", "heads.t?"):
        torch.testing.assert_close(counts[name], x.square().sum() / 6)


def two_halves() -> tuple[KFAC, Tensor, nn.Module, Tensor]:
    """An optimizer, the loss of half a batch in a capture without a backward pass, the model and the other half."""
    model, x = mlp(6, 5, 3), torch.randn(8, 6)
    optimizer = KFAC(model)
    with optimizer.capture():
        first = model(x[:4]).square().mean()
    return optimizer, first, model, x[4:]


def test_the_backward_pass_of_two_captures_in_the_second() -> None:
    optimizer, first, model, x = two_halves()
    with (
        pytest.raises(MissingStatisticsError, match=r"of 0, 2 .* earlier capture\(\) had no backward pass: run"),
        optimizer.capture(),
    ):
        (first + model(x).square().mean()).backward()


def test_the_backward_pass_of_two_captures_behind_them() -> None:
    optimizer, first, model, x = two_halves()
    with optimizer.capture():
        second = model(x).square().mean()
    (first + second).backward()
    with pytest.raises(MissingStatisticsError, match=r"missed its output gradients\)\): run the forward"):
        optimizer.step()


def test_a_batch_that_was_given_up_before_its_backward_pass_is_no_mistake() -> None:
    optimizer, _, model, x = two_halves()
    with optimizer.capture():
        model(x).square().mean().backward()
    optimizer.step()
    assert set(optimizer.factors()) == {"0", "2"}


def test_more_rows_than_the_loss_has_are_named(recwarn: pytest.WarningsRecorder) -> None:
    """Frames that are flattened from the first layer on, and nodes of which the loss reads some: B is scaled by
    all rows, which is no mean over the examples. What is asked for puts it right."""
    model, x, y = mlp(6, 8, 3).double(), torch.randn(4, 5, 6).double(), torch.randint(3, (4,))
    rows, mask = x.flatten(0, 1), torch.arange(20) % 4 == 0
    labels = torch.randint(3, (20,))

    def frames(m: nn.Module) -> Tensor:
        return F.cross_entropy(m(rows).unflatten(0, (4, 5)).mean(1), y)

    def nodes(m: nn.Module) -> Tensor:
        return F.cross_entropy(m(rows)[mask], labels[mask])

    for loss, number in ((frames, 4), (nodes, 5)):
        said = rf"layer 0 sees 20 rows, and the loss function has {number}, fewer.*B is scaled by 20"
        with pytest.warns(UserWarning, match=said):
            factors_of(model, loss)
    recwarn.clear()
    ids = Positions(segment_ids=torch.arange(4).repeat_interleave(5), num_segments=4)
    for approximation in ("expand", "reduce"):
        options = {"approximation": approximation}
        got = factors_of(model, frames, capture={"positions": ids}, **options)
        want = factors_of(model, lambda m: F.cross_entropy(m(x).mean(1), y), **options)
        assert_same_factors(got, want)
        given = {"positions": "gradient", "loss_normalizer": 5}
        got = factors_of(model, nodes, capture=given, **options)
        want = factors_of(model, lambda m: F.cross_entropy(m(rows[mask]), labels[mask]), **options)
        assert_same_factors(got, want)
    # Correlations of features have features for rows.
    factors_of(model, lambda m: F.mse_loss(m(rows).T @ m(rows), torch.eye(3).double()))
    assert not [w for w in recwarn if "K-FAC" in str(w.message)]


def test_rows_that_losses_have_in_several_dimensions_or_calls_are_not_more(
    recwarn: pytest.WarningsRecorder,
) -> None:
    """Pixels that are flattened, and losses on both halves of a batch: all rows of the layers are the losses'."""
    model, x = mlp(6, 8, 3).double(), torch.randn(24, 6).double()
    pixels, labels = torch.randint(3, (2, 3, 4)), torch.randint(3, (24,))

    def images(m: nn.Module) -> Tensor:
        return F.cross_entropy(m(x).view(2, 3, 4, 3).permute(0, 3, 1, 2), pixels)

    def halves(m: nn.Module) -> Tensor:
        real, fake = m(x).chunk(2)
        return (F.cross_entropy(real, labels[:12].clone()) + F.cross_entropy(fake, labels[12:].clone())) / 2

    assert_same_factors(
        factors_of(model, images), factors_of(model, lambda m: F.cross_entropy(m(x), pixels.flatten()))
    )
    assert_same_factors(factors_of(model, halves), factors_of(model, lambda m: F.cross_entropy(m(x), labels)))
    assert not [w for w in recwarn if "K-FAC" in str(w.message)]


def test_targets_of_ctc_that_are_strung_together_are_not_its_examples() -> None:
    """Frames of four sequences, one after the other, with nine labels in all."""
    model, frames = mlp(6, 8, 3).double(), torch.randn(6 * 4, 6).double()
    lengths = torch.full((4,), 6), torch.tensor([3, 2, 2, 2])

    def loss(m: nn.Module) -> Tensor:
        return F.ctc_loss(F.log_softmax(m(frames), 1).unflatten(0, (6, 4)), torch.randint(1, 3, (9,)), *lengths)

    with pytest.warns(
        UserWarning, match=r"layer 0 sees 24 rows, and the loss function has 4, .*loss_normalizer=4\b"
    ):
        factors_of(model, loss)


class Returns(nn.Module):
    """A linear layer with what a library may return around its logits."""

    def __init__(self, around: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.layer, self.around = nn.Linear(5, 3), around

    def forward(self, x: Tensor) -> object:
        return self.around(self.layer(x))


@pytest.mark.parametrize(
    ("around", "said"),
    [
        (lambda logits: SimpleNamespace(logits=logits), "a SimpleNamespace: a loss takes one tensor"),
        (lambda logits: {"logits": logits}, "a dict: a loss takes one tensor"),
        (lambda logits: (logits, logits), "a tuple of 2: a loss takes one tensor"),
    ],
)
def test_outputs_that_are_no_logits_are_refused(around: Callable[[Tensor], object], said: str) -> None:
    model, x, y = Returns(around), torch.randn(4, 5), torch.randint(3, (4,))
    with pytest.raises(ValueError, match=f"{said}.*fit_factors takes a module that returns the logits of one"):
        fit_factors(model, [(x, y)], "softmax_cross_entropy")
    optimizer = KFAC(model, fisher="mc")
    with pytest.raises(ValueError, match=f"{said}.*Of an object give the logits"), optimizer.capture() as capture:
        capture.backward_fisher(model(x), "softmax_cross_entropy")
