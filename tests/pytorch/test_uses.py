"""Uses of a weight that no rule records: the layer takes the fallback, with the true reason."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algoperf_kfac.pytorch import KFAC
from tests.pytorch.toys import assert_same_factors, capture_once, covered, reasons

D = 6
Use = Callable[[Tensor, Tensor], Tensor]
SECOND_USES: dict[str, tuple[Use, str]] = {
    "scaled": (lambda h, w: F.linear(h, (w * 0.5).t()), "linear"),
    "plus zero": (lambda h, w: h @ (w + 0), "matmul"),
    "normalised": (lambda h, w: F.linear(h, F.normalize(w)), "linear"),
    "masked": (lambda h, w: F.linear(h, w * (torch.arange(D) > 2)), "linear"),
    "with noise": (lambda h, w: F.linear(h, w + 0.1 * torch.randn(D, D)), "linear"),
    "bmm": (lambda h, w: torch.bmm(h[None], w.unsqueeze(0))[0], "bmm"),
    "expanded": (lambda h, w: torch.bmm(torch.stack([h, h]), w.expand(2, D, D)).sum(0), "bmm"),
    "cdist": (lambda h, w: torch.cdist(h, w), "cdist"),
    "cosine similarity": (lambda h, w: F.cosine_similarity(h[:, None], w[None], dim=-1), "cosine_similarity"),
    "bilinear": (lambda h, w: F.bilinear(h, h, w.expand(D, D, D)), "bilinear"),
    "summed": (lambda h, w: h * w.sum(0), "mul"),
    "broadcast": (lambda h, w: (h[:, None] * w).sum(-1), "mul"),
    "multi_dot": (lambda h, w: torch.linalg.multi_dot([h, w, w]), "linalg_multi_dot"),
    "tril": (lambda h, w: h @ torch.tril(w), "matmul"),
    "inverse": (lambda h, w: h @ torch.linalg.inv(w + 3 * torch.eye(D)), "matmul"),
    "gathered": (lambda h, w: h + w[torch.arange(len(h)) % D], "__getitem__"),
    "softmax": (lambda h, w: h @ w.softmax(-1), "matmul"),
}
# The parameter itself, through views and copies, in a product with a rule: another call of the layer.
SECOND_CALLS: dict[str, Use] = {
    "transposed": lambda h, w: h @ w.t(),
    "inner": lambda h, w: torch.inner(h, w),
    "einsum without an output": lambda h, w: torch.einsum("ni,oi", h, w),
    "einsum in the order of the alphabet": lambda h, w: torch.einsum("ni,ai", h, w).T,
    "clone": lambda h, w: F.linear(h, w.clone()),
    "wider": lambda h, w: F.linear(h.double(), w.double()).float(),
    "narrow and back": lambda h, w: F.linear(h, w.to(torch.bfloat16).float()),
    "squeezed": lambda h, w: F.linear(h, w.squeeze()),
    "mv": lambda h, w: torch.stack([torch.mv(w, r) for r in h]),
    "einsum": lambda h, w: torch.einsum("ni,oi->no", h, w),
}


class Twice(nn.Module):
    def __init__(self, use: Use) -> None:
        super().__init__()
        self.first, self.use, self.last = nn.Linear(D, D, bias=False), use, nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.use(torch.tanh(self.first(x)), self.first.weight))


@pytest.mark.parametrize("name", SECOND_USES)
def test_a_second_use_moves_the_layer_to_the_fallback(name: str) -> None:
    use, operation = SECOND_USES[name]
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=rf"layer first takes the fallback.*: also read by {operation}:"):
        optimizer = capture_once(Twice(use), lambda m: m(torch.randn(16, D)).square().sum(1).mean())
    assert covered(optimizer) == {"last"}
    assert reasons(optimizer)["first.weight"] == f"also read by {operation}: K-FAC would miss that use"


@pytest.mark.parametrize("name", SECOND_CALLS)
def test_a_second_call_in_another_form_is_recorded(name: str) -> None:
    torch.manual_seed(0)
    optimizer = capture_once(Twice(SECOND_CALLS[name]), lambda m: m(torch.randn(16, D)).square().sum(1).mean())
    assert covered(optimizer) == {"first", "last"}
    assert optimizer.metrics()["first/gradient_error"] < (1e-2 if name == "narrow and back" else 1e-5)


class Hidden(torch.autograd.Function):
    """A use that no mode of torch sees: its operations run inside of `apply`."""

    @staticmethod
    def forward(ctx, h: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(h, w)
        return h @ w

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        h, w = ctx.saved_tensors
        return grad @ w.T, h.T @ grad


def test_the_gradient_shows_a_use_that_cannot_be_seen() -> None:
    """G^T A is not dL/dW: checked once, at the first statistics step."""
    model = Twice(Hidden.apply)
    with pytest.warns(UserWarning, match=r"layer first .*captured inputs and output gradients miss \d+ %"):
        optimizer = capture_once(model, lambda m: m(torch.randn(16, D)).square().sum(1).mean())
    assert covered(optimizer) == {"last"}
    assert optimizer.metrics()["last/gradient_error"] < 1e-5


@pytest.mark.parametrize(
    "change", [lambda g: g.clamp(-1e-3, 1e-3), lambda g: 100 * g, lambda g: g * (torch.arange(len(g)) > 1)[:, None]]
)
def test_a_hook_that_changes_the_gradient_is_no_hidden_use(change: Callable[[Tensor], Tensor]) -> None:
    """G^T A is the gradient before hooks, and the hook still has its say in the gradient."""
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))
    x, seen = torch.randn(16, D), []
    model[0].weight.register_hook(lambda g: seen.append(g) or change(g))
    optimizer = capture_once(model, lambda m: m(x).square().sum(1).mean())
    assert covered(optimizer) == {"0", "2"}
    assert optimizer.metrics()["0/gradient_error"] < 1e-5
    assert torch.equal(model[0].weight.grad, change(seen[0]))
    assert len(model[0].weight._backward_hooks) == 1


def test_check_looks_again_when_asked() -> None:
    model = Twice(lambda h, w: h)
    optimizer = capture_once(model, lambda m: m(torch.randn(16, D)).square().sum(1).mean(), factor_interval=1)
    assert covered(optimizer) == {"first", "last"}
    model.use = Hidden.apply
    optimizer.check()
    optimizer.zero_grad()
    with pytest.warns(UserWarning, match="layer first takes the fallback"), optimizer.capture():
        model(torch.randn(16, D)).square().sum(1).mean().backward()


@pytest.mark.parametrize(
    "penalty",
    [
        lambda w: 1e-2 * w.square().sum(),
        lambda w: w.abs().sum() * 1e-3,
        lambda w: torch.linalg.norm(w),
        lambda w: (w.t() @ w - torch.eye(D)).square().mean(),
        lambda w: F.mse_loss(w, torch.ones_like(w)),
        lambda w: torch.dist(w, torch.ones_like(w)),
        lambda w: 1 - F.cosine_similarity(w.flatten(), torch.ones(w.numel()), dim=0),
    ],
    ids=["ridge", "lasso", "norm", "orthogonality", "squares", "distance", "angle"],
)
def test_a_penalty_is_no_second_use(penalty: Callable[[Tensor], Tensor]) -> None:
    """It adds to the gradient, and leaves the layer's inputs and output gradients complete."""
    model, x = Twice(lambda h, w: h), torch.randn(16, D)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = capture_once(model, lambda m: m(x).square().sum(1).mean() + penalty(m.first.weight))
    assert covered(optimizer) == {"first", "last"}


COMPUTED: dict[str, Callable[[Tensor], Tensor]] = {
    "standardised": lambda w: (w - w.mean()) / w.std(),
    "scaled": lambda w: w * 0.5,
    "noisy": lambda w: w + 0.01 * torch.randn_like(w),
    "quantised": lambda w: torch.fake_quantize_per_tensor_affine(w, 0.05, 0, -128, 127),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_weights_computed_from_the_parameter_are_named_in_one_line(name: str) -> None:
    class Computed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, COMPUTED[name](self.weight), self.bias)

    model = nn.Sequential(*[Computed(D, D) for _ in range(20)], nn.Linear(D, 3))
    with pytest.warns(UserWarning, match="K-FAC") as caught:
        optimizer = capture_once(model, lambda m: m(torch.randn(16, D)).square().mean())
    (warning,) = [w for w in caught if "K-FAC" in str(w.message)]
    assert "layers 0, 1, 2, 3, 4 and 15 more take the fallback" in str(warning.message)
    assert len(str(warning.message)) < 200
    assert covered(optimizer) == {"20"}
    assert reasons(optimizer)["0.weight"] == "linear reads a function of it, not the parameter itself"


class Borrowed(nn.Module):
    """A bias that belongs to another layer."""

    def __init__(self, *, frozen: bool, bias: bool) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(D, D), nn.Linear(D, D, bias), nn.Linear(D, D)
        self.second.requires_grad_(not frozen)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.last(torch.tanh(F.linear(h, self.second.weight, self.first.bias)))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_bias_that_another_layer_reads_is_a_use_of_its_own(frozen: bool, bias: bool) -> None:
    model = Borrowed(frozen=frozen, bias=bias)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        optimizer = capture_once(model, lambda m: m(torch.randn(8, D)).square().mean())
    why = "also read by linear as its bias: K-FAC would miss that use"
    assert {name: reason for name, reason in reasons(optimizer).items() if "first" in name} == {
        "first.weight": why,
        "first.bias": why,
    }
    assert f"K-FAC: layer first takes the fallback from now on: {why}" in [str(w.message) for w in said]
    # Its own bias is not there in one of its calls.
    assert covered(optimizer) == {"last"} | (set() if frozen or bias else {"second"})


def test_layers_of_width_zero_are_left_by_name() -> None:
    """Pruned to nothing: they have no factors, and the batch has examples all the same."""

    class Pruned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up, self.last = nn.Linear(D, 0), nn.Linear(0, D), nn.Linear(D, D)
            self.raw = nn.Parameter(torch.zeros(D, 0))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(x + self.up(self.down(x)) + x @ self.raw @ self.raw.t())

    optimizer = capture_once(Pruned(), lambda m: m(torch.randn(8, D)).square().mean())
    assert covered(optimizer) == {"last"}
    why = {name: reason for name, reason in reasons(optimizer).items() if name != "raw"}
    assert why == dict.fromkeys(("down.weight", "down.bias", "up.weight", "up.bias"), "its weight has no elements")
    alone = nn.Sequential(nn.Linear(D, 0), nn.Linear(0, D))
    assert not covered(capture_once(alone, lambda m: m(torch.randn(8, D)).square().mean()))


def test_raw_parameters_say_what_read_them_or_that_nothing_did() -> None:
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixed, self.idle = nn.Parameter(torch.randn(3, D)), nn.Parameter(torch.randn(2))
            self.scale, self.plain = nn.Parameter(torch.ones(3)), nn.Parameter(torch.randn(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(torch.cdist(x, self.mixed) * self.scale, self.plain)

    model = Raw()
    before = {f.reason for f in KFAC(model).coverage().fallbacks}
    assert len(before) == 1
    assert "from the first statistics step on" in before.pop()
    optimizer = capture_once(model, lambda m: m(torch.randn(5, D)).square().mean())
    assert reasons(optimizer) == {
        "mixed": "read by cdist, which has no rule",
        "scale": "read by mul, which has no rule",
        "idle": "no operation with a rule reads it",
    }
    assert {layer.weight for layer in optimizer.coverage().layers} == {"plain"}


class Spectral(nn.Module):
    """A real weight on complex data, beside layers on real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mix, self.last = nn.Linear(6, 6), nn.Linear(4, 4, bias=False), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        modes = torch.fft.rfft(self.first(x))
        return self.last(torch.fft.irfft(F.linear(modes, self.mix.weight.to(modes.dtype)), n=6))


def test_a_real_weight_on_complex_data_is_left_by_name(recwarn: pytest.WarningsRecorder) -> None:
    optimizer = capture_once(Spectral(), lambda m: m(torch.randn(8, 6)).square().sum(1).mean())
    assert covered(optimizer) == {"first", "last"}
    assert "linear on complex data" in reasons(optimizer)["mix.weight"]
    assert not [w for w in recwarn if "discards the imaginary part" in str(w.message)]


def overwritten(w: Tensor) -> Tensor:
    copy = w.clone()
    copy[torch.arange(D) > 3] = 0
    return copy


def written_into_data(w: Tensor) -> Tensor:
    buffer = torch.zeros(D, D)
    buffer[:] = w
    return buffer


@pytest.mark.parametrize("change", [overwritten, written_into_data])
@pytest.mark.parametrize("first_step", [0, 2])
def test_a_weight_written_to_or_into_is_another(change: Callable[[Tensor], Tensor], first_step: int) -> None:
    """Also where it begins behind the first statistics step, which compares gradients."""
    model = Twice(lambda h, w: h)
    optimizer = KFAC(model, factor_interval=1)
    for step in range(first_step + 1):
        model.use = (lambda h, w: F.linear(h, change(w))) if step >= first_step else (lambda h, w: h)
        optimizer.zero_grad()
        with warnings.catch_warnings(), optimizer.capture():
            warnings.simplefilter("ignore")
            model(torch.randn(9, D)).square().mean().backward()
        optimizer.step()
    assert covered(optimizer) == {"last"}
    assert "also read by" in reasons(optimizer)["first.weight"]


@pytest.mark.parametrize(
    "product", [lambda u, v: u @ v.t(), F.linear, lambda u, v: torch.einsum("ik,jk->ij", u, v)]
)
def test_neither_of_two_parameters_is_the_other_s_layer(product: Use) -> None:
    """A weight in factors; their product meets the data."""

    class LowRank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.u, self.v = nn.Parameter(torch.randn(D, 2)), nn.Parameter(torch.randn(D, 2))
            self.last = nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(x @ product(self.u, self.v)))

    optimizer = capture_once(LowRank(), lambda m: m(torch.randn(9, D)).square().mean())
    assert covered(optimizer) == {"last"}


V = F.normalize(torch.arange(1.0, D + 1), dim=0)
PENALTIES: dict[str, Callable[[Tensor], Tensor]] = {
    "spectral norm": lambda w: torch.dot(V, w @ V),
    "by products": lambda w: V @ w @ V,
    "by a layer": lambda w: F.linear(V, w).norm(),
    "smoothness": lambda w: (w @ torch.eye(D).diff(dim=0).T).square().sum(),
}


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("order", ["behind the loss", "ahead of it, later on"])
def test_a_penalty_that_multiplies_by_a_constant_is_no_call(name: str, order: str) -> None:
    """Of layers with a bias, which their own calls have."""
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))
    x, factors = torch.randn(16, D), []
    for weight in (0.1, 0.0):
        optimizer = KFAC(model, learning_rate=0.0, factor_interval=1)
        for step in range(2):
            optimizer.zero_grad()
            with optimizer.capture():
                penalty = 0.0
                if weight and order != "behind the loss" and step:
                    penalty = weight * PENALTIES[name](model[0].weight)
                loss = model(x).square().sum(1).mean()
                if weight and order == "behind the loss":
                    penalty = weight * PENALTIES[name](model[0].weight)
                (loss + penalty).backward()
            optimizer.step()
        assert optimizer.coverage().fraction == 1
        factors.append(optimizer.factors())
    assert_same_factors(*factors)


def test_a_product_with_a_constant_that_meets_data_is_a_use() -> None:
    model = Twice(lambda h, w: h + F.linear(torch.ones(D), w) * h)
    model.first = nn.Linear(D, D)
    with pytest.warns(UserWarning, match="layer first takes the fallback.*: also read by"):
        optimizer = capture_once(model, lambda m: m(torch.randn(16, D)).square().sum(1).mean())
    assert covered(optimizer) == {"last"}
