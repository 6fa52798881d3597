"""nn.MultiheadAttention beside the same attention written with nn.Linear."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from algoperf_kfac import Positions
from algoperf_kfac.pytorch import KFAC
from tests.pytorch.toys import assert_same_factors, capture_once, covered, reasons

WIDTH, HEADS = 6, 2
PROJECTIONS = "in_proj_weight"


class Written(nn.Module):
    """Self-attention over (N, T, WIDTH), its projections one linear layer."""

    def __init__(self, like: nn.MultiheadAttention) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        with torch.no_grad():
            self.qkv.weight.copy_(like.in_proj_weight)
            self.qkv.bias.copy_(like.in_proj_bias)
        self.out.load_state_dict(like.out_proj.state_dict())

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if keep is not None:
            scores = scores.masked_fill(~keep[:, None, None], float("-inf"))
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"need_weights": False}, {"masked": True}], ids=["", "without", "masked"])
def test_self_attention(approximation: str, batch_first: bool, options: dict[str, Any]) -> None:
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)
    nn.init.normal_(module.in_proj_bias)
    twin = Written(module)
    x, y = torch.randn(4, 5, WIDTH), torch.randn(4, 5, WIDTH)
    keep = torch.arange(5) < torch.tensor([5, 3, 4, 2])[:, None] if options.get("masked") else None
    given = {"need_weights": options.get("need_weights", True)}
    given |= {} if keep is None else {"key_padding_mask": ~keep}
    turn = (lambda t: t) if batch_first else (lambda t: t.transpose(0, 1))
    same = turn(x)  # one tensor thrice, as below: three would be projected one by one, with rounding of their own
    want = module(same, same, same, **given)

    def mine(m: nn.Module) -> Tensor:
        # One tensor thrice, as torch asks: queries, keys and values of one input are projected together.
        data = turn(x)
        output, weights = m(data, data, data, **given)
        assert torch.equal(output, want[0])
        assert (weights is None) == (want[1] is None)
        return (turn(output) - y).square().mean()

    rows = {} if batch_first else {"capture": {"positions": Positions(batch_dim=1)}}
    first = capture_once(module, mine, approximation=approximation, **rows)
    second = capture_once(
        twin, lambda m: (m(x, keep) - y).square().mean(), approximation=approximation, output_splits={"qkv": 3}
    )
    assert first.coverage().fraction == 1
    assert_same_factors(
        first.factors(), second.factors(), {PROJECTIONS: "qkv", "out_proj": "out"}, rtol=1e-9, atol=1e-12
    )
    torch.testing.assert_close(module.in_proj_weight, twin.qkv.weight, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(module.in_proj_bias, twin.qkv.bias, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("sizes", [{}, {"kdim": 3, "vdim": 4}], ids=["one size", "kdim and vdim"])
@pytest.mark.parametrize("same", [True, False], ids=["keys are values", "three inputs"])
def test_cross_attention(sizes: dict[str, int], same: bool) -> None:
    if sizes and same:
        sizes = {"kdim": 3, "vdim": 3}
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **sizes)
    q = torch.randn(4, 5, WIDTH)
    k = torch.randn(4, 3, sizes.get("kdim", WIDTH))
    v = k if same else torch.randn(4, 3, sizes.get("vdim", WIDTH))
    optimizer = capture_once(module, lambda m: m(q, k, v)[0].square().mean())
    assert optimizer.coverage().fraction == 1, str(optimizer.coverage())
    assert len(covered(optimizer)) == (3 if same and not sizes else 4)
    assert all(optimizer.metrics()[f"{name}/gradient_error"] < 1e-8 for name in covered(optimizer))


def test_what_is_no_linear_layer_inside() -> None:
    module, x = nn.MultiheadAttention(WIDTH, HEADS, add_bias_kv=True), torch.randn(5, 4, WIDTH)
    optimizer = capture_once(module, lambda m: m(x, x, x)[0].square().mean())
    assert reasons(optimizer).keys() == {"bias_k", "bias_v"}


def test_a_transformer_and_its_fast_path() -> None:
    """Without gradients the encoder takes its fast path, inside and outside of a capture as ever."""
    model = nn.Transformer(WIDTH, HEADS, 1, 1, 12, dropout=0.0, batch_first=True)
    source, target = torch.randn(4, 5, WIDTH), torch.randn(4, 3, WIDTH)
    optimizer = KFAC(copy.deepcopy(model))
    twin = optimizer._model
    want = model(source, target)
    with optimizer.capture():
        got = twin(source, target)
        got.square().mean().backward()
    assert torch.equal(got, want)
    optimizer.step()
    assert all("normalisation" in reason for reason in reasons(optimizer).values())
    model.eval()
    with torch.no_grad():
        before = model.encoder(source)
        with KFAC(model).capture():
            torch.testing.assert_close(model.encoder(source), before)


@pytest.mark.parametrize("positions", [None, "gradient"])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_what_takes_sequences_first_is_read_so(approximation: str, positions: str | None) -> None:
    """torch's default order, in an encoder and decoder layer: the factors are those of batch_first=True."""
    first = nn.Transformer(WIDTH, HEADS, 1, 1, 12, dropout=0.0, batch_first=True)
    other = nn.Transformer(WIDTH, HEADS, 1, 1, 12, dropout=0.0)
    other.load_state_dict(first.state_dict())
    x, z, y = torch.randn(4, 5, WIDTH), torch.randn(4, 3, WIDTH), torch.randn(4, WIDTH)
    options = {"approximation": approximation, "capture": {"positions": positions, "loss_normalizer": 4}}
    want = capture_once(first, lambda m: (m(x, z).mean(1) - y).square().mean(), **options)
    turned = x.transpose(0, 1), z.transpose(0, 1)
    got = capture_once(other, lambda m: (m(*turned).mean(0) - y).square().mean(), **options)
    assert_same_factors(got.factors(), want.factors(), rtol=1e-5, atol=1e-7)
    assert len(got.factors()) == 11


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_same_numbers_are_drawn(dropout: float) -> None:
    model = nn.TransformerEncoderLayer(WIDTH, HEADS, 12, dropout=dropout, batch_first=True)
    x = torch.randn(4, 5, WIDTH)
    torch.manual_seed(1)
    want = model(x)
    torch.manual_seed(1)
    with KFAC(model).capture():
        got = model(x)
        got.sum().backward()
    assert torch.equal(got, want)


class Pool(nn.Module):
    """CLIP's pooling: the mean attends to all positions, by torch's function with weights of linear layers."""

    def __init__(self, written: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.written = written

    def forward(self, x: Tensor) -> Tensor:  # (T, N, WIDTH)
        x = torch.cat([x.mean(0, keepdim=True), x])
        if self.written:
            data = x.transpose(0, 1)
            q, k, v = (
                t.unflatten(-1, (HEADS, -1)).transpose(1, 2)
                for t in (self.q(data[:, :1]), self.k(data), self.v(data))
            )
            scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))[:, 0]
        output, _ = nn.functional.multi_head_attention_forward(
            query=x[:1],
            key=x,
            value=x,
            embed_dim_to_check=WIDTH,
            num_heads=HEADS,
            q_proj_weight=self.q.weight,
            k_proj_weight=self.k.weight,
            v_proj_weight=self.v.weight,
            in_proj_weight=None,
            in_proj_bias=torch.cat([self.q.bias, self.k.bias, self.v.bias]),
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=self.out.weight,
            out_proj_bias=self.out.bias,
            use_separate_proj_weight=True,
            training=self.training,
            need_weights=False,
        )
        return output.squeeze(0)


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_the_function_with_weights_of_linear_layers(approximation: str) -> None:
    """It takes (T, N, WIDTH), whatever modules say, and its biases as one tensor that it takes apart again."""
    pool, x = Pool(written=False).double(), torch.randn(5, 4, WIDTH).double()
    twin = copy.deepcopy(pool)
    twin.written = True
    got, want = (
        capture_once(m, lambda m: m(x).square().sum(-1).mean(), approximation=approximation) for m in (pool, twin)
    )
    assert not reasons(got)
    assert_same_factors(got.factors(), want.factors())
