"""Fixtures of all tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True, scope="session")
def quick_compilation(tmp_path_factory):
    """JAX compiles for speed of compilation, and no program twice: here, in processes that are started, and in the
    other workers of pytest-xdist.

    These tests run few steps, and without this they would spend most of their time on compiling.
    """
    base = tmp_path_factory.getbasetemp()
    cache = str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled")
    options = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": cache,
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in options.items():
            patch.setenv(name.upper(), str(value))
        before = {name: jax.config.values[name] for name in options}
        for name, value in options.items():
            jax.config.update(name, value)
        yield
        for name, value in before.items():
            jax.config.update(name, value)


@pytest.fixture(autouse=True, scope="session")
def rare_garbage_collections() -> Iterator[None]:
    """Tracing makes objects by the million, and each collection goes through all of PyTorch's and JAX's modules."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    yield
    gc.set_threshold(*before)
    gc.unfreeze()
