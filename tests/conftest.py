"""Fixtures of all tests."""

from __future__ import annotations

import gc
import importlib.metadata
import os

import jax
import pytest

# One module of LLVM's for each program: by default its kernels are spread over up to 32, which costs more than it
# gains where programs are small. An XLA that does not know a flag ends the process: only the pinned one gets it.
FLAGS = "--xla_cpu_parallel_codegen_split_count=1" if importlib.metadata.version("jaxlib") == "0.7.0" else ""


def pytest_configure() -> None:
    """What has to be so before test modules are imported: some of them compile as they are."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
    # Imports and tracing make objects by the million, and each collection goes through all of PyTorch's and JAX's
    # modules.
    gc.set_threshold(100_000, 50, 100)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()


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
