"""What a summed loss was divided by multiplies every B, squared: what is no such number is refused at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import algoperf_kfac.jax
import algoperf_kfac.pytorch
from algoperf_kfac.jax.transform import find_state, move_averages
from algoperf_kfac.online import OnlineEvidence

BAD = {
    "nan": (float("nan"), ValueError, r"loss_normalizer=nan: allowed is a number > 0"),
    "infinite": (float("inf"), ValueError, r"loss_normalizer=inf: allowed"),
    "zero": (0, ValueError, r"loss_normalizer=0: allowed"),
    "negative": (-3.0, ValueError, r"loss_normalizer=-3.0: allowed"),
    "of numpy": (np.float32(-3), ValueError, r"loss_normalizer=-3.0: allowed"),
    "an array": (np.zeros(()), ValueError, r"loss_normalizer=0.0: allowed"),
    "bool": (True, TypeError, r"loss_normalizer=True is no number"),
    "str": ("16", TypeError, r"loss_normalizer='16' is no number"),
    "complex": (2 + 1j, TypeError, r"loss_normalizer=\(2\+1j\) is no number"),
    "list": ([16], TypeError, r"loss_normalizer=\[16\] is no number"),
}
GOOD = [8, 8.0, np.int64(8), np.float32(8), np.full((), 8.0), np.full((1,), 8)]


def in_pytorch(normalizer: Any) -> torch.Tensor:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizer = algoperf_kfac.pytorch.KFAC(model)
    with optimizer.capture(loss_normalizer=normalizer):
        (model(torch.ones(8, 4)).square().sum() / 8).backward()
    optimizer.step()
    return optimizer.factors()[""].B


def in_jax(normalizer: Any) -> jax.Array:
    params, x = {"w": jnp.ones((4, 3))}, jnp.ones((8, 4))
    run = algoperf_kfac.jax.KFAC(lambda p, x: x @ p["w"], lambda out, x: (out**2).sum() / 8, params, x)
    state = find_state(run.init(params))
    _, _, statistics = run.value_grad_and_statistics(params, x, loss_normalizer=normalizer)
    stacks = move_averages(state.stacks, statistics, run.layers, run.config)  # what an update begins with
    return run.factors(state._replace(stacks=stacks))["w"].B


FRAMEWORKS = pytest.mark.parametrize("b_of", [in_pytorch, in_jax])


@FRAMEWORKS
@pytest.mark.parametrize("case", BAD)
def test_what_is_no_number_above_zero_is_refused(b_of: Callable[[Any], Any], case: str) -> None:
    value, error, text = BAD[case]
    with pytest.raises(error, match=text):
        b_of(value)


@FRAMEWORKS
def test_numbers_of_python_and_numpy_are_taken(b_of: Callable[[Any], Any]) -> None:
    want = np.asarray(b_of(None))  # eight examples
    assert want.any()
    for value in GOOD:
        np.testing.assert_allclose(np.asarray(b_of(value)), want, rtol=1e-6)


@pytest.mark.parametrize("active", [True, False])
def test_it_is_refused_at_capture_on_every_step_and_when_set_late(active: bool) -> None:
    optimizer = algoperf_kfac.pytorch.KFAC(torch.nn.Linear(4, 3), initial_statistics=0, factor_interval=2)
    optimizer._steps = 0 if active else 1
    assert optimizer.is_statistics_step is active
    with pytest.raises(ValueError, match="allowed is a number > 0"):
        optimizer.capture(loss_normalizer=0)
    with pytest.raises(TypeError, match="is no number"):
        optimizer.capture().loss_normalizer = "8"


def test_tensors_are_looked_into_where_that_waits_for_nothing() -> None:
    for dtype in (torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=f"loss_normalizer of dtype {dtype}"):
            in_pytorch(torch.ones((), dtype=dtype))
    with pytest.raises(ValueError, match=r"loss_normalizer of shape \(2,\)"):
        in_pytorch(torch.ones(2))
    for value in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"loss_normalizer=.*: allowed is a number > 0"):
            in_pytorch(torch.tensor(value))
    for tensor in (torch.tensor(8), torch.tensor([8.0]), torch.tensor(8.0, requires_grad=True)):
        torch.testing.assert_close(in_pytorch(tensor), in_pytorch(None))
    optimizer = algoperf_kfac.pytorch.KFAC(torch.nn.Linear(4, 3))
    optimizer.capture(loss_normalizer=torch.zeros((), device="meta"))


def test_a_batch_that_is_given_up_may_count_no_example() -> None:
    model = torch.nn.Linear(4, 3)
    optimizer = algoperf_kfac.pytorch.KFAC(model)
    with contextlib.suppress(StopIteration), optimizer.capture(loss_normalizer=torch.tensor(0)):
        model(torch.ones(8, 4))
        raise StopIteration
    with optimizer.capture(loss_normalizer=torch.tensor(0)):
        model(torch.ones(8, 4))  # and no backward()


def test_arrays_of_jax_show_shape_and_dtype() -> None:
    for array in (jnp.array(True), jnp.array(1j)):
        with pytest.raises(TypeError, match=f"loss_normalizer of dtype {array.dtype}"):
            in_jax(array)
    with pytest.raises(ValueError, match=r"loss_normalizer of shape \(2,\)"):
        in_jax(jnp.ones(2))
    want = np.asarray(in_jax(None))
    for array in (jnp.array(8), jnp.array(8.0, jnp.bfloat16)):
        np.testing.assert_allclose(np.asarray(in_jax(array)), want, rtol=1e-6)
        np.testing.assert_allclose(np.asarray(jax.jit(in_jax)(array)), want, rtol=1e-6)


@pytest.mark.parametrize("case", BAD)
def test_weight_decays_take_no_other(case: str) -> None:
    value, error, text = BAD[case]
    with pytest.raises(error, match=text):
        OnlineEvidence().weight_decays(value)
