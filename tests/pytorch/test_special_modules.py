"""Modules whose weights are read inside fused functions, are computed from others, frozen, or not used at all."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algoperf_kfac.layers import NEVER_SEEN
from algoperf_kfac.pytorch import KFAC, MissingStatisticsError
from tests.pytorch.toys import assert_finite, assert_same_parameters, capture_once, covered, mlp, reasons, vectors


def overfit(model: nn.Module, *inputs: Tensor, steps: int = 25) -> tuple[KFAC, list[float]]:
    """Train on one batch; returns the optimizer and the losses."""
    optimizer = KFAC(model, learning_rate=1e-2, factor_interval=2, refresh_interval=4, initial_statistics=1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with optimizer.capture():
            outputs = model(*inputs)
            outputs = outputs[0] if isinstance(outputs, tuple) else outputs
            loss = (outputs - 1).square().mean()
            loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert_finite(model, optimizer) if covered(optimizer) else None
    assert losses[-1] < 0.8 * losses[0]
    return optimizer, losses


def test_multihead_attention_is_covered_and_trains() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attention(x, x, x, need_weights=False)[0])

    optimizer, _ = overfit(Attention(), torch.randn(4, 5, 8))
    assert covered(optimizer) == {"attention", "attention.out_proj", "head"}
    assert optimizer.coverage().fraction == 1


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoder_layer_is_covered(norm_first: bool) -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True, norm_first=norm_first)
    optimizer, _ = overfit(model, torch.randn(4, 5, 8), steps=40)
    assert covered(optimizer) == {"self_attn", "self_attn.out_proj", "linear1", "linear2"}
    assert all("normalisation" in reason for reason in reasons(optimizer).values())


class Recurrent(nn.Module):
    def __init__(self, recurrent: nn.RNNBase, width: int) -> None:
        super().__init__()
        self.recurrent = recurrent
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0])


def test_an_lstm_with_projections_takes_the_fallback() -> None:
    recurrent = nn.LSTM(4, 6, batch_first=True, proj_size=3)
    optimizer, _ = overfit(Recurrent(recurrent, 3), torch.randn(4, 5, 4), steps=40)
    assert covered(optimizer) == {"head"}
    assert len(reasons(optimizer)) == len(list(recurrent.parameters()))
    assert all(r.startswith("recurrent (LSTM)") for r in reasons(optimizer).values())


@pytest.mark.parametrize(
    "recurrent",
    [
        nn.GRU(4, 6, batch_first=True),
        nn.RNN(4, 6, batch_first=True),
        nn.LSTM(4, 6, num_layers=2, dropout=0.1, batch_first=True),
    ],
    ids=["GRU", "RNN", "LSTM with dropout"],
)
def test_recurrent_layers_are_covered_and_train(recurrent: nn.RNNBase) -> None:
    optimizer, _ = overfit(Recurrent(copy.deepcopy(recurrent), 6), torch.randn(4, 5, 4), steps=40)
    assert optimizer.coverage().fraction == 1


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_an_lstm_is_covered_and_resumes(approximation: str) -> None:
    model, x = Recurrent(nn.LSTM(4, 3, batch_first=True, bidirectional=True), 6), torch.randn(4, 5, 4)
    optimizer, _ = overfit(model, x)
    ends = ("l0", "l0_reverse")
    assert covered(optimizer) == {
        "head",
        *(f"recurrent.weight_{part}_{end}" for part in ("ih", "hh") for end in ends),
    }
    assert optimizer.coverage().fraction == 1
    options = {"approximation": approximation, "factor_interval": 2, "refresh_interval": 2}
    optimizer = capture_once(model, lambda m: m(x).square().mean(), **options)
    twin = copy.deepcopy(model)
    resumed = KFAC(twin, **options)
    resumed.load_state_dict(optimizer.state_dict())
    for m, o in ((model, optimizer), (twin, resumed)):
        for _ in range(3):
            o.zero_grad()
            with o.capture():
                m(x).square().mean().backward()
            o.step()
    assert_same_parameters(model, twin, rtol=0, atol=0)


def test_the_gates_of_a_wide_lstm_have_blocks_of_their_own() -> None:
    optimizer = KFAC(nn.LSTM(4, 6), max_factor_dim=8)
    assert {layer.out_blocks for layer in optimizer.coverage().layers} == {(6, 6, 6, 6)}


def test_an_lstm_under_autocast_gives_what_it_gives_without_capture() -> None:
    model, x = Recurrent(nn.LSTM(4, 3, batch_first=True), 3), torch.randn(4, 5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        try:
            want = model(x)
        except RuntimeError as error:
            pytest.skip(f"this CPU runs no LSTM in bfloat16, K-FAC or not: {str(error)[:80]}")
        with KFAC(model).capture():
            got = model(x)
            got.float().square().mean().backward()
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("style", ["parametrization", "hook"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weight_norm_takes_the_fallback(style: str) -> None:
    normed = nn.utils.parametrizations.weight_norm if style == "parametrization" else nn.utils.weight_norm
    optimizer, _ = overfit(nn.Sequential(normed(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 2)), torch.randn(6, 4))
    assert covered(optimizer) == {"2"}
    assert len(reasons(optimizer)) == 3
    assert "parametrised" in reasons(optimizer)["0.bias"]


def test_spectral_norm_takes_the_fallback() -> None:
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    optimizer, _ = overfit(model, torch.randn(6, 4))
    assert covered(optimizer) == {"1"}


def test_frozen_weight() -> None:
    model = mlp(5, 4, 3)
    model[0].weight.requires_grad_(False)
    frozen = model[0].weight.clone()
    optimizer, _ = overfit(model, torch.randn(6, 5))
    assert covered(optimizer) == {"2"}
    assert "frozen" in reasons(optimizer)["0.bias"]
    assert torch.equal(model[0].weight, frozen)


def test_frozen_bias_is_no_homogeneous_coordinate() -> None:
    model = mlp(5, 4, 3)
    model[0].bias.requires_grad_(False)
    frozen = model[0].bias.clone()
    optimizer, _ = overfit(model, torch.randn(6, 5))
    assert covered(optimizer) == {"0", "2"}
    assert optimizer.factors()["0"].A.shape == (5, 5)
    assert optimizer.factors()["2"].A.shape == (5, 5)
    assert not reasons(optimizer)
    assert torch.equal(model[0].bias, frozen)


def test_parameters_left_out_of_params_stay_untouched() -> None:
    model = mlp(5, 4, 3)
    first = model[0].weight.clone()
    optimizer = KFAC(model, params=model[2].parameters())
    assert covered(optimizer) == {"2"}
    assert not reasons(optimizer)
    with optimizer.capture():
        model(torch.randn(6, 5)).square().mean().backward()
    optimizer.step()
    assert torch.equal(model[0].weight, first)
    assert optimizer.coverage().fraction == 1


class WithSpare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(5, 3)
        self.spare = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_a_layer_that_is_never_used_is_an_error_that_names_it() -> None:
    """Not at once: it may be dropped by chance, or be an expert without tokens."""
    model, (x, y) = WithSpare(), vectors()
    optimizer = KFAC(model, factor_interval=1, refresh_interval=1)
    for step in range(NEVER_SEEN):
        optimizer.zero_grad()
        with optimizer.capture():
            F.cross_entropy(model(x), y).backward()
        if step < NEVER_SEEN - 1:
            optimizer.step()
    with pytest.raises(MissingStatisticsError, match=r"1 of 2 layers.*: spare \(missed its inputs\).*exclude"):
        optimizer.step()


def test_a_layer_that_is_used_now_and_then_keeps_its_place() -> None:
    """Layers dropped by chance, experts without tokens, heads that take turns, frozen and thawed layers."""
    model, (x, y) = WithSpare(), vectors()
    optimizer = KFAC(model, factor_interval=1, refresh_interval=1)
    for step in range(3 * NEVER_SEEN):
        optimizer.zero_grad()
        before = model.spare.weight.detach().clone()
        factors = optimizer.factors()["spare"].A.clone() if step else None
        used = step % 7 == 0
        with optimizer.capture():
            out = model(x) + (model.spare(x) if used else 0)
            F.cross_entropy(out, y).backward()
        optimizer.step()
        assert model.spare.weight.equal(before) is not used
        if factors is not None:
            assert optimizer.factors()["spare"].A.equal(factors) is not used
        assert optimizer.metrics()["spare/idle"] == step % 7
    assert covered(optimizer) == {"used", "spare"}


def test_a_layer_whose_output_is_thrown_away_is_an_error_that_names_it() -> None:
    x, y = vectors()

    def loss(m: nn.Module) -> Tensor:
        m.spare(x)
        return F.cross_entropy(m(x), y)

    with pytest.raises(MissingStatisticsError, match=r"spare \(missed its output gradients\)"):
        capture_once(WithSpare(), loss)


def test_partial_coverage_moves_the_unused_layer_to_the_fallback() -> None:
    model, (x, y) = WithSpare(), vectors()
    optimizer = KFAC(model, allow_partial_coverage=True, factor_interval=1, refresh_interval=1)
    assert optimizer.metrics()["missed_layers"] == 0
    for _ in range(NEVER_SEEN + 2):
        optimizer.zero_grad()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            with optimizer.capture():
                F.cross_entropy(model(x), y).backward()
            optimizer.step()
        seen = [w for w in seen if "spare" in str(w.message)]
        if optimizer.metrics()["steps"] == NEVER_SEEN:
            assert "spare takes the fallback from now on: missed its inputs" in str(seen[0].message)
            assert seen[0].filename == __file__, "the warning should point at the caller"
        else:
            assert not seen
    assert covered(optimizer) == {"used"}
    assert reasons(optimizer)["spare.weight"] == "missed its inputs on a statistics step"
    metrics = optimizer.metrics()
    assert metrics["missed_layers"] == 1
    assert metrics["coverage"] == 0.5
    fresh = KFAC(model, allow_partial_coverage=True)
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.metrics()["missed_layers"] == 1
    assert covered(fresh) == {"used"}


def test_excluded_layers_are_not_missed() -> None:
    x, y = vectors()
    optimizer = capture_once(WithSpare(), lambda m: F.cross_entropy(m(x), y), exclude=["spa*"])
    assert reasons(optimizer)["spare.bias"] == "excluded by the user"
    with pytest.raises(ValueError, match=r"exclude: no module matches 'spear'"):
        KFAC(WithSpare(), exclude=["spear"])


def test_lazy_modules_must_be_materialised() -> None:
    with pytest.raises(ValueError, match=r"0 is a lazy module"):
        KFAC(nn.Sequential(nn.LazyLinear(3)))


def test_batch_norm_statistics_move_once_per_step() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), torch.randn(6, 4)
    capture_once(model, lambda m: m(x).square().mean())
    assert int(model[1].num_batches_tracked) == 1


class WithMatrix:
    """A further matrix, which the base class knows nothing of."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.extra = nn.Parameter(0.3 * torch.randn(8, 8))


class Adapted(WithMatrix, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.extra


class Rotated(WithMatrix, nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) @ self.extra


class Gated(WithMatrix, nn.GRUCell):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) @ self.extra


class LowRank(nn.Linear):
    """As loralib has it: the weight is frozen, its update has two factors."""

    def __init__(self, features: int, rank: int = 2) -> None:
        super().__init__(features, features)
        self.lora_A = nn.Parameter(torch.randn(rank, features))
        self.lora_B = nn.Parameter(torch.zeros(features, rank))
        self.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (x @ self.lora_A.T) @ self.lora_B.T


@pytest.mark.parametrize(
    ("module", "weights"),
    [
        (Adapted(8, 8), {"0.weight", "0.extra"}),
        (Rotated(8), {"0.extra"}),
        (Gated(8, 8), {"0.weight_ih", "0.weight_hh", "0.extra"}),
        (LowRank(8), {"0.lora_A", "0.lora_B"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_matrices_of_a_derived_class(module: nn.Module, weights: set[str]) -> None:
    model = nn.Sequential(module, nn.Linear(8, 3))
    x, y = torch.randn(16, 8), torch.arange(16) % 3
    optimizer = capture_once(model, lambda m: F.cross_entropy(m(x), y))
    assert {layer.weight for layer in optimizer.coverage().layers} == weights | {"1.weight"}
