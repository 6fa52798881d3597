"""Nested tensors: examples of different length, (N, jagged, P)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algoperf_kfac.pytorch import Positions
from tests.pytorch.toys import assert_same_factors, capture_once, covered, factors_of, mlp, reasons

LENGTHS = [3, 5, 2, 4]


def nested(parts: list[Tensor]) -> Tensor:
    return torch.nested.nested_tensor(parts, layout=torch.jagged)


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_jagged_inputs_are_packed_ones(approximation: str) -> None:
    model, y = mlp(6, 8, 3).double(), torch.randint(3, (4,))
    parts = [torch.randn(length, 6).double() for length in LENGTHS]
    ids = torch.arange(4).repeat_interleave(torch.tensor(LENGTHS))

    def pooled(outputs: list[Tensor]) -> Tensor:
        return F.cross_entropy(torch.stack([out.mean(0) for out in outputs]), y)

    want = factors_of(
        model,
        lambda m: pooled(m(torch.cat(parts)).split(LENGTHS)),
        approximation=approximation,
        capture={"positions": Positions(segment_ids=ids, num_segments=4)},
    )
    for positions in (None, "gradient"):
        got = factors_of(
            model,
            lambda m: pooled(m(nested(parts)).unbind()),
            approximation=approximation,
            capture={"positions": positions, "loss_normalizer": 4},
        )
        assert_same_factors(got, want)


def test_other_nested_inputs_leave_their_layer_by_name() -> None:
    """The older layout has no sizes that could be read."""
    model, parts = mlp(6, 8, 3), [torch.randn(length, 6) for length in LENGTHS]

    def loss(m: nn.Module) -> Tensor:
        hidden = torch.stack([out.mean(0) for out in m[0](torch.nested.nested_tensor(parts)).unbind()])
        return F.cross_entropy(m[2](hidden), torch.randint(3, (4,)))

    with pytest.warns(UserWarning, match=r"linear of a nested tensor that is not \(N, jagged, P_in\)"):
        optimizer = capture_once(model, loss, capture={"loss_normalizer": 4})
    assert covered(optimizer) == {"2"}
    assert "nested tensor" in reasons(optimizer)["0.weight"]
