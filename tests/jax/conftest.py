"""Everything in this folder is exact arithmetic as far as float64 goes, and reproducible."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest
import torch

OPTIONS = ("jax_enable_x64", "jax_disable_most_optimizations")


@pytest.fixture(autouse=True, scope="module")
def compilations() -> Iterator[None]:
    """Forget what a module compiled: hundreds of programs take gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def float64(request: pytest.FixtureRequest) -> Iterator[None]:
    """Float64 in JAX and PyTorch, except in tests marked `single`; one thread. Restored for other tests."""
    wide = request.node.get_closest_marker("single") is None
    before = {name: jax.config.values[name] for name in OPTIONS}
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    jax.config.update("jax_enable_x64", wide)
    jax.config.update("jax_disable_most_optimizations", True)  # tests compile a lot and compute little
    torch.set_default_dtype(torch.float64 if wide else torch.float32)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    for name, value in before.items():
        jax.config.update(name, value)
