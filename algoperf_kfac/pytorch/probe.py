"""A model seen through one training step: on the meta device, or on a small real batch where that fails."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.cost import Load, Plan, Sighting, make_plan
from algoperf_kfac.layers import RAW, UNREAD, Coverage
from algoperf_kfac.pytorch.activations import saving
from algoperf_kfac.pytorch.compiled_activations import kept_when_compiled
from algoperf_kfac.pytorch.discovery import unwrap
from algoperf_kfac.pytorch.kinds import AnyRecorder
from algoperf_kfac.pytorch.meta import META, on_meta
from algoperf_kfac.pytorch.operations import LOOKUPS, RULES, Function
from algoperf_kfac.pytorch.optimizer import KFAC
from algoperf_kfac.pytorch.recorder import Recorder
from algoperf_kfac.pytorch.scalings import scaling_of

if TYPE_CHECKING:
    Batch = Tensor | tuple[Any, ...] | Mapping[str, Any]

PRODUCTS = frozenset({torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__})


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model to see.

    Attributes:
        build: makes the model.
        outputs: outputs of a training forward pass of the model on a batch of so many examples.
        batch_size: examples on one device.
        small_batch_size: examples of the real batch where the meta device does not do; None for all of them.
        segments: number of rows -> number of graphs they belong to, where rows are not examples.
        compiled: whether the model is trained compiled.
    """

    build: Callable[[], nn.Module]
    outputs: Callable[[nn.Module, int], object]
    batch_size: int
    small_batch_size: int | None = None
    segments: Mapping[int, int] = dataclasses.field(default_factory=dict)
    compiled: bool = False


def plan(
    model: nn.Module,
    batch: Batch,
    *,
    config: KFACConfig | None = None,
    devices: int = 1,
    **hyperparameters: object,
) -> Plan:
    """See `algoperf_kfac.plan`."""
    config = KFACConfig.updated(config, hyperparameters)
    model = unwrap(model)

    def build() -> nn.Module:
        # Made on the meta device a copy has no data of its own, whatever the model holds.
        on_it = torch.empty(()).is_meta
        memo = {id(t): _on_meta(t) for t in (*model.parameters(), *model.buffers())} if on_it else {}
        return copy.deepcopy(model, memo)

    def outputs(copied: nn.Module, examples: int) -> object:
        inputs = to_device(batch, next(copied.parameters()).device)
        if isinstance(inputs, Mapping):
            return copied(**inputs)
        return copied(*inputs) if isinstance(inputs, tuple) else copied(inputs)

    subject = Subject(build, outputs, next((len(t) for t in tensors(batch) if t.dim()), 1))
    return plan_of(sight(subject, lambda copied: KFAC(copied, config=config)), devices=devices)


def _on_meta(tensor: Tensor) -> Tensor:
    moved = tensor.detach().to(META)
    return nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved


def plan_of(seen: Sighting, *, devices: int = 1) -> Plan:
    """The plan of a model as it was seen by PyTorch."""
    return make_plan(
        seen.coverage,
        seen.loads,
        seen.config,
        scaling_of(seen.config),
        devices=devices,
        activation_bytes=seen.activation_bytes,
        capture_bytes=seen.capture_bytes,
        output_bytes=seen.output_bytes,
        gradient_copies=2 if devices > 1 else 1,
        moments_of_covered=2 if seen.config.length_rule == "graft" else 1,
        counts=1,  # of replaced directions
    )


def sight(subject: Subject, make_optimizer: Callable[[nn.Module], KFAC]) -> Sighting:
    """One statistics step of a K-FAC optimizer on the model.

    Args:
        subject: the model.
        make_optimizer: the optimizer for a model.

    Raises:
        ValueError: the model runs neither on the meta device nor on a real batch.
    """
    seen = _sight(subject, make_optimizer)
    kept = _kept_when_compiled(subject) if subject.compiled else None
    if kept is None:
        return seen
    note = ", ".join([*([seen.note] if seen.note else []), "activations of the compiled model"])
    return dataclasses.replace(seen, activation_bytes=kept, note=note)


def _kept_when_compiled(subject: Subject) -> float | None:
    model = subject.build()
    model.train()
    return kept_when_compiled(model, lambda compiled: subject.outputs(compiled, subject.batch_size))


def _sight(subject: Subject, make_optimizer: Callable[[nn.Module], KFAC]) -> Sighting:
    try:
        with on_meta():
            return _step(subject, make_optimizer, subject.batch_size)
    except Exception as error:
        reason = error
    size = min(subject.small_batch_size or subject.batch_size, subject.batch_size)
    try:
        seen = _step(subject, make_optimizer, size)
        if size < subject.batch_size:
            half = _step(subject, make_optimizer, size // 2) if size > 1 else None
            seen = _scaled(seen, half, subject.batch_size)
    except Exception as error:
        raise ValueError(
            f"the model runs neither on the meta device ({_line(reason)}) nor on a batch of {size} ({_line(error)})"
        ) from error
    note = f"seen on a real batch of {size}"
    note += f", scaled to {subject.batch_size}" if size < subject.batch_size else ""
    return dataclasses.replace(seen, note=note)


def _line(error: Exception) -> str:
    """What went wrong, on one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _scaled(seen: Sighting, half: Sighting | None, batch_size: int) -> Sighting:
    """What a larger batch would show.

    Not all that is kept grows with the batch (masks over positions, matrices made from weights): bytes are taken on
    along the straight line through those of a batch and of half of it, or of no bytes without examples.
    """
    size, below = seen.examples, half.examples if half is not None else 0

    def extended(bytes_at_size: float, bytes_below: float) -> float:
        return bytes_at_size + (bytes_at_size - bytes_below) * (batch_size - size) / (size - below)

    return dataclasses.replace(
        seen,
        loads={name: load.scaled(batch_size / size) for name, load in seen.loads.items()},
        activation_bytes=extended(seen.activation_bytes, half.activation_bytes if half else 0.0),
        capture_bytes=extended(seen.capture_bytes, half.capture_bytes if half else 0.0),
        output_bytes=seen.output_bytes * batch_size / size,
        examples=batch_size,
    )


def _step(subject: Subject, make_optimizer: Callable[[nn.Module], KFAC], batch_size: int) -> Sighting:
    model = subject.build()
    model.train()
    optimizer = make_optimizer(model)
    names = {id(p): name for name, p in model.named_parameters()}
    recorder = _LoadRecorder(names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a layer that takes the fallback is in the table, with its reason
        with saving(model) as plain:
            subject.outputs(model, batch_size)
        # Positions as the submissions give them, as far as memory goes.
        capture = optimizer.capture(positions="gradient", loss_normalizer=1.0)
        with recorder, saving(model) as captured, capture:
            outputs = [t for t in tensors(subject.outputs(model, batch_size)) if t.requires_grad]
            if not outputs:
                raise ValueError(
                    "the model's outputs do not depend on its parameters, as far as tensors in them are found: in "
                    "lists, tuples, mappings and the fields of objects"
                )
            for tensor in capture.observer.kept_inputs():
                captured.add(tensor)
            recorded = _recorded_loads(capture.observer.recorders.values())
            torch.stack([t.sum() for t in outputs]).sum().backward()
    loads = {
        name: load.of_examples(subject.segments[int(load.examples)]) if load.examples in subject.segments else load
        for name, load in (recorded | _with_recurrence(recorder.loads, model, batch_size)).items()
    }
    extra = max(captured.bytes - plain.bytes, 0)
    coverage = _as_seen(optimizer.coverage())
    size = float(sum(t.numel() * t.element_size() for t in outputs))
    return Sighting(coverage, optimizer.config, loads, float(plain.bytes), float(extra), size, batch_size)


def _recorded_loads(recorders: Iterable[AnyRecorder]) -> dict[str, Load]:
    """By weight, what was recorded of each layer; the only source for operations that no rule reads (`kinds`)."""
    loads: dict[str, Load] = {}
    for recorder in recorders:
        if not isinstance(recorder, Recorder):
            continue
        spec = recorder.spec
        for call in recorder.calls:
            layout = call.layout
            rows = layout.num_examples * layout.positions
            inputs = 0 if call.input is None else call.input.numel()
            load = Load(layout.num_examples, layout.positions, rows, inputs, rows * spec.groups * spec.out_dim)
            name = spec.load_name
            loads[name] = loads[name] + load if name in loads else load
    return loads


def _with_recurrence(loads: Mapping[str, Load], model: nn.Module, batch_size: int) -> dict[str, Load]:
    """A recurrent layer shows the product with its inputs alone, on all rows: the other one sees as many."""
    names = {id(p): name for name, p in model.named_parameters()}
    loads = dict(loads)
    for module in model.modules():
        if not isinstance(module, nn.RNNBase):
            continue
        for key, weight in module.named_parameters(recurse=False):
            seen = loads.get(names[id(weight)]) if key.startswith("weight_ih") else None
            if seen is None:
                continue
            rows, hidden = seen.products, getattr(module, key.replace("_ih", "_hh"))
            spread = seen.of_examples(batch_size)
            loads[names[id(weight)]] = spread
            loads[names[id(hidden)]] = dataclasses.replace(spread, input_elements=rows * hidden.shape[1])
    return loads


def _as_seen(coverage: Coverage) -> Coverage:
    """After a statistics step it is known of raw parameters that no operation with a rule reads them."""
    return Coverage(
        coverage.layers,
        tuple(dataclasses.replace(f, reason=UNREAD) if f.reason == RAW else f for f in coverage.fallbacks),
    )


class _LoadRecorder(TorchFunctionMode):
    """Adds up what every weight sees."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.loads: dict[str, Load] = {}
        self._names = names

    def __torch_function__(
        self, func: Function, types: Any, args: Iterable[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if torch._C._current_graph_task_id() == -1:  # not again within the backward pass
            rule = RULES.get(func) or LOOKUPS.get(func)
            if rule is not None:
                operation = rule(*args, **kwargs)
                self._add(operation.kind, operation.input, output, operation.weight)
            elif func in PRODUCTS and not kwargs:
                for weight, input in (args, tuple(args)[::-1]):
                    if isinstance(weight, Tensor) and weight._is_view() and id(weight._base) in self._names:
                        self._add("linear", input, output, weight._base)  # a table as output layer
        return output

    def _add(self, kind: str, input: Tensor, output: Tensor, weight: Tensor | None) -> None:
        name = self._names.get(id(weight))
        if name is not None and weight is not None:
            load = _load(kind, input, output, weight)
            self.loads[name] = self.loads[name] + load if name in self.loads else load


def _load(kind: str, input: Tensor, output: Tensor, weight: Tensor) -> Load:
    """The load of one call, dimension 0 of the output running over examples."""
    kernel = 1
    if kind in ("conv", "conv_transpose"):
        kernel = weight.shape[2]
        dims = weight.dim() - 2
        examples = output.shape[0] if output.dim() == dims + 2 else 1
        positions = math.prod(output.shape[-dims:])
        products = examples * (positions if kind == "conv" else math.prod(input.shape[-dims:]))
    else:
        leading = output.shape[:-1]
        examples = leading[0] if leading else 1
        positions = math.prod(leading[1:])
        products = 0 if kind == "embedding" else examples * positions  # a lookup multiplies nothing
    return Load(examples, positions, products, input.numel(), output.numel(), kernel)


def tensors(values: object, within: frozenset[int] = frozenset()) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples, mappings and objects with fields, as models return them.

    Args:
        values: the outermost.
        within: identities of the objects that it is a part of, which may refer to one another.
    """
    if isinstance(values, Tensor):
        yield values
        return
    items: Iterable[object] = ()
    if isinstance(values, Mapping):
        items = values.values()
    elif isinstance(values, list | tuple):
        items = values
    elif hasattr(values, "__dict__") and not isinstance(values, type | nn.Module) and id(values) not in within:
        items = vars(values).values()
    for item in list(items):
        yield from tensors(item, within | {id(values)})


def to_device(values: Any, device: torch.device) -> Any:
    """The same, its tensors on a device."""
    if isinstance(values, Tensor):
        return values.to(device)
    if isinstance(values, Mapping):
        return {key: to_device(value, device) for key, value in values.items()}
    return tuple(to_device(value, device) for value in values) if isinstance(values, tuple) else values
