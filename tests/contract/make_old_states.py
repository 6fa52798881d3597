"""Makes tests/data/kfac-0.1.0: states that version 0.1.0 saved, and where its code arrived from them.

Run with the code of version 0.1.0, the last commit before the library was rebuilt (1d76ce1): check it out, copy
tests/contract into it, and

    python -m tests.contract.make_old_states

there. Each file holds the state of the optimizer, the model's parameters then, the batches of `MORE_STEPS` further
steps, and the parameters after them; all in float64.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.serialization
import jax
import numpy as np
import torch

from algoperf_kfac.config import KFACConfig
from tests.contract.old_states import CASES, FOLDER, JAX_CASES, MORE_STEPS, Late, train, train_in_jax

# What submissions handed over; the optimizer took it and did nothing with it, and its state must not need it.
OF_SUBMISSIONS = {
    "grad_clip": 1.0,
    "label_smoothing": 0.1,
    "dropout_rate": 0.1,
    "horizon_factor": 0.8,
    "warmup_factor": 0.1,
}


def make_pytorch(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = case.model()
    optimizer = case.optimizer(model, seed=5, **(OF_SUBMISSIONS if name == "expand" else {}))
    fisher = case.options.get("fisher", "empirical")
    train(model, optimizer, [case.batch(generator) for _ in range(case.stop)], fisher)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batches = [case.batch(generator) for _ in range(MORE_STEPS)]
    found = {"optimizer": optimizer.state_dict(), "model": before, "batches": batches}
    path = FOLDER / f"pytorch-{name}.pt"
    torch.save(found, path)  # at once: the optimizer goes on in the same tensors
    train(model, optimizer, batches, fisher)
    torch.save(torch.load(path, weights_only=True) | {"after": dict(model.state_dict())}, path)
    assert not isinstance(model, Late) or model.calls > model.START


def make_jax(name: str) -> None:
    case = JAX_CASES[name]
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda shape: rng.standard_normal(shape) / 2, case.shapes, is_leaf=lambda s: isinstance(s, tuple)
    )
    batches = [case.batch(rng) for _ in range(case.stop + MORE_STEPS)]
    optimizer = case.optimizer(params, batches[0])
    state = optimizer.init(params)
    params, state = train_in_jax(optimizer, case.apply, params, state, batches[: case.stop], 0)
    after, _ = train_in_jax(optimizer, case.apply, params, state, batches[case.stop :], case.stop)
    found: dict[str, Any] = {
        "optimizer": flax.serialization.to_bytes(state),
        "params": jax.tree.map(np.asarray, params),
        "batches": {str(i): dict(zip("xy", batch, strict=True)) for i, batch in enumerate(batches[case.stop :])},
        "after": jax.tree.map(np.asarray, after),
    }
    (FOLDER / f"jax-{name}.msgpack").write_bytes(flax.serialization.msgpack_serialize(found))


def main() -> None:
    if "grad_clip" not in {field.name for field in dataclasses.fields(KFACConfig)}:
        raise SystemExit("error: this is not the code of version 0.1.0; its states are made with that alone")
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    jax.config.update("jax_enable_x64", True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in CASES:
        make_pytorch(name)
    for name in JAX_CASES:
        make_jax(name)


if __name__ == "__main__":
    main()
