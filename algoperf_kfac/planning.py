"""`plan`: what K-FAC would cover on a model, and what it would cost. Brings a framework only once it is called."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.cost import Plan


def plan(
    model: Any, *batch: Any, config: KFACConfig | None = None, devices: int = 1, **hyperparameters: Any
) -> Plan:
    """The layers K-FAC covers on a model, the memory it takes, and its flops as shares of the model's own.

    PyTorch: `plan(model, batch)`, the batch being a tensor, a tuple of positional arguments or a dict of keyword
    arguments. A copy of the model is run forward and backward once, on the meta device where it can be, else on the
    batch. JAX: `plan(apply_fn, params, *args)`, traced and not run; arrays may be `jax.ShapeDtypeStruct`s.

    Args:
        model: an nn.Module, or a function of (params, *args).
        *batch: one training batch, of the examples on one device; in JAX the parameters, then the arguments.
        config: a configuration; keyword arguments override its fields.
        devices: data-parallel devices that share refreshes and directions.
        **hyperparameters: fields of `KFACConfig`.

    Raises:
        TypeError: if the model is neither.
        ValueError: for a hyperparameter out of range, or a model that does not run on the batch.
    """
    # A module's framework is loaded already.
    torch = sys.modules.get("torch")
    framework = "pytorch" if torch is not None and isinstance(model, torch.nn.Module) else "jax"
    if framework == "jax" and not callable(model):
        raise TypeError(f"plan takes an nn.Module or a function of (params, *args), got {type(model).__name__}")
    probe = importlib.import_module(f".{framework}.probe", __package__)
    result: Plan = probe.plan(model, *batch, config=config, devices=devices, **hyperparameters)
    return result
