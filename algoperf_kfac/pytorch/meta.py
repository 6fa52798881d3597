"""Runs a PyTorch model on the meta device: shapes without data, whatever device its code asks for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

META = torch.device("meta")


class _OnMeta(TorchFunctionMode):
    """Answers every request for a device with the meta device."""

    def __torch_function__(
        self, func: Any, types: Any, args: Iterable[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        args, kwargs = list(args), dict(kwargs or {})
        if func in (Tensor.cpu, Tensor.cuda):
            return args[0]
        if func is Tensor.to:
            args[1:] = [META if isinstance(arg, torch.device | str) else arg for arg in args[1:]]
            if len(args) > 1 and args[1] is None:
                args[1] = META
        if func is torch.tensor and (kwargs.get("device") is None or isinstance(args[0], int | float)):
            kwargs["device"] = "cpu"  # settings of the model, which its code may branch on
        elif kwargs.get("device") is not None:
            kwargs["device"] = META
        return func(*args, **kwargs)


class _Generator(torch.Generator):
    """There are no random generators on the meta device; nothing is drawn from this one."""

    def __new__(cls, device: object = None) -> _Generator:
        return super().__new__(cls, "cpu")  # type: ignore[call-arg]


class _Autocast(torch.autocast):
    """Autocast does not know the meta device."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "meta" else device_type, *args, **kwargs)


def _make_parameter(cls: type, data: Tensor | None = None, requires_grad: bool = True) -> Any:
    """`nn.Parameter(data)` for data made by `torch.Tensor(sizes)`, which heeds no device context."""
    if data is not None and type(data) is Tensor:
        data = data.to(META)
    return _PARAMETER(cls, data, requires_grad)


_PARAMETER = nn.Parameter.__new__


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Tensors, modules and parameters made inside take no memory. For this process's main thread alone."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_replaced(torch, "Generator", _Generator))
        stack.enter_context(_replaced(torch, "autocast", _Autocast))
        stack.enter_context(_replaced(nn.Parameter, "__new__", staticmethod(_make_parameter)))
        stack.enter_context(META)
        stack.enter_context(_OnMeta())
        yield


@contextlib.contextmanager
def _replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """Inside, an attribute has another value."""
    before = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
