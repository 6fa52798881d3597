"""Rules are checked in float64 in both frameworks, on one thread; restored for other tests."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest
import torch


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    before, dtype, threads = jax.config.values["jax_enable_x64"], torch.get_default_dtype(), torch.get_num_threads()
    jax.config.update("jax_enable_x64", True)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    jax.config.update("jax_enable_x64", before)
