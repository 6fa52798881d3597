"""States that version 0.1.0 saved load, and the run goes on to where 0.1.0 itself arrived."""

from __future__ import annotations

from typing import Any

import flax.serialization
import jax
import numpy as np
import pytest
import torch

from algoperf_kfac.jax import from_orbax
from tests.contract.old_states import CASES, FOLDER, JAX_CASES, Late, read_jax, train, train_in_jax


def assert_close(got: Any, want: Any, before: Any) -> None:
    """Equal up to 1e-9 of the parameter's size; and the parameter did move, by far more than that."""
    got, want, before = (np.asarray(value) for value in (got, want, before))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-9 * np.abs(want).max())
    assert np.abs(want - before).max() > 1e-4 * np.abs(want).max()


@pytest.mark.parametrize("name", CASES)
def test_pytorch(name: str) -> None:
    case = CASES[name]
    saved = torch.load(FOLDER / f"pytorch-{name}.pt", weights_only=True)
    model = case.model()
    model.load_state_dict(saved["model"])
    if isinstance(model, Late):
        model.calls = case.stop
    optimizer = case.optimizer(model)  # the seed of its draws is in the state
    optimizer.load_state_dict(saved["optimizer"])
    assert optimizer.metrics()["steps"] == case.stop
    train(model, optimizer, saved["batches"], case.options.get("fisher", "empirical"))
    after = dict(model.named_parameters())
    assert after.keys() == saved["after"].keys()
    for key, value in after.items():
        if not key.startswith("unused"):
            assert_close(value.detach(), saved["after"][key], saved["model"][key])


def test_a_raw_weight_that_joins_after_loading() -> None:
    """What 0.1.0 says of it in the state is no obstacle to covering it; and what had left stays away."""
    case = CASES["joining_and_leaving"]
    saved = torch.load(FOLDER / "pytorch-joining_and_leaving.pt", weights_only=True)
    model = Late()
    model.load_state_dict(saved["model"])
    model.calls = case.stop
    optimizer = case.optimizer(model)
    optimizer.load_state_dict(saved["optimizer"])
    assert [layer.name for layer in optimizer.coverage().layers] == ["first", "head"]
    train(model, optimizer, saved["batches"])
    assert [layer.name for layer in optimizer.coverage().layers] == ["first", "head", "late"]
    left = {f.name for f in optimizer.coverage().fallbacks}
    assert left == {"unused.weight", "unused.bias"}
    assert optimizer.metrics()["missed_layers"] == 1


@pytest.mark.parametrize("name", JAX_CASES)
def test_jax(name: str) -> None:
    case, saved = JAX_CASES[name], read_jax(name)
    batches = [(batch["x"], batch["y"]) for _, batch in sorted(saved["batches"].items())]
    optimizer = case.optimizer(saved["params"], batches[0])
    state = flax.serialization.from_bytes(optimizer.init(saved["params"]), saved["optimizer"])
    assert optimizer.metrics(state)["steps"] == case.stop
    params, _ = train_in_jax(optimizer, case.apply, saved["params"], state, batches, case.stop)
    jax.tree.map(assert_close, params, saved["after"], saved["params"])


@pytest.mark.parametrize("name", JAX_CASES)
def test_jax_as_orbax_restores_it(name: str) -> None:
    """Without a template: lists, and such of nothing where nothing was."""
    case, saved = JAX_CASES[name], read_jax(name)
    batches = [(batch["x"], batch["y"]) for _, batch in sorted(saved["batches"].items())]
    fresh = case.optimizer(saved["params"], batches[0]).init(saved["params"])
    want = flax.serialization.from_bytes(fresh, saved["optimizer"])
    got = from_orbax(fresh, as_lists(flax.serialization.msgpack_restore(saved["optimizer"])))
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert all(map(np.array_equal, jax.tree.leaves(got), jax.tree.leaves(want)))


def as_lists(node: Any) -> Any:
    """Dictionaries by number as lists, empty ones as nothing."""
    if not isinstance(node, dict):
        return node
    values = {key: as_lists(value) for key, value in node.items()}
    return list(values.values()) or None if all(key.isdigit() for key in values) else values


def test_the_files_are_small() -> None:
    sizes = [path.stat().st_size for path in FOLDER.iterdir()]
    assert len(sizes) == len(CASES) + len(JAX_CASES)
    assert max(sizes) < 100_000
    assert sum(sizes) < 200_000
