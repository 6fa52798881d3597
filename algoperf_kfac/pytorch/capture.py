"""Capture: seeing what goes into a layer and which gradient comes back, without editing the model.

On statistics steps a `TorchFunctionMode` watches the operations that take a parameter as weight. Operations are
matched by the identity of that parameter, not by module class, so that functional layers, views, in-place
operations and repeated uses are seen. Factors are accumulated at once, activations are not kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.layers import LayerSpec
from algoperf_kfac.pytorch import fisher, recurrent, tied
from algoperf_kfac.pytorch.factors import Positions
from algoperf_kfac.pytorch.operations import LOOKUPS, RULES, WEIGHT_READS, Operation
from algoperf_kfac.pytorch.statistics import Call, Recorder, Scalar, Statistics
from algoperf_kfac.pytorch.tied import TiedRecorder
from algoperf_kfac.spec import LossType

PositionsLike = Positions | Tensor | str | Sequence[Positions | Tensor]
AnyRecorder = Recorder | TiedRecorder


class MissingStatisticsError(RuntimeError):
    """A declared layer did not receive its inputs or its output gradients on a statistics step."""


class _Interceptor(TorchFunctionMode):
    """Hands every operation with a rule to the capture."""

    def __init__(self, capture: Capture) -> None:
        super().__init__()
        self._capture = capture

    def __torch_function__(
        self, func: Any, types: Any, args: Iterable[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.backward:
            with self:
                return _tensor_backward(*args, **kwargs)
        if func is torch.autograd.backward and (edges := _edges(*args, **kwargs)):
            # A mode is off while it handles a function, and this one may run layers again (reentrant
            # checkpointing). Unlike for tensors, backward from gradient edges does not ask the mode again.
            with self:
                return func(edges, *list(args)[1:], **kwargs)
        name = _operation_name(func)
        if name == "lstm" and (call := recurrent.parse(list(args), kwargs)) and self._capture.covers(call):
            return self._capture.lstm(call)
        output = func(*args, **kwargs)
        rule = RULES.get(func)
        table = self._capture.table_use(func, name, list(args), kwargs, output)
        if table is not None:
            return table
        if rule is None:
            if name in WEIGHT_READS:
                self._capture.other_use(name, [*args, *kwargs.values()])
            return output
        return self._capture.operation(rule(*args, **kwargs), output)


def _tensor_backward(
    tensor: Tensor, gradient: Any = None, retain_graph: Any = None, create_graph: bool = False, inputs: Any = None
) -> None:
    """`Tensor.backward`, which in older versions of torch is all that asks the mode."""
    torch.autograd.backward(tensor, gradient, retain_graph, create_graph, inputs=inputs)


def _edges(tensors: Any, *args: Any, inputs: Any = None, **kwargs: Any) -> list[Any]:
    """The gradient edges from which `torch.autograd.backward` starts; none where it takes no edges."""
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    if inputs is not None or not all(isinstance(t, Tensor) and t.requires_grad for t in tensors):
        return []
    return [torch.autograd.graph.get_gradient_edge(t) for t in tensors]


def _operation_name(func: Any) -> str:
    """The name of an operation; for properties such as `Tensor.T` that of the property."""
    name = getattr(func, "__name__", str(func))
    return str(getattr(func.__self__, "__name__", name)) if name == "__get__" else name


class Capture(contextlib.AbstractContextManager["Capture"]):
    """Context around the forward and backward pass of one (micro-)batch; made by `KFAC.capture`.

    Attributes:
        active: whether this is a statistics step; if not, nothing is watched and entering costs nothing.
        loss_normalizer: what the summed loss was divided by before `backward`: the number of examples
            (default), the number of valid tokens, ... A tensor is fine. Output gradients are scaled by it, so
            that B belongs to the summed, per-example loss. May be set until the context is left.
    """

    def __init__(
        self,
        *,
        config: KFACConfig,
        layers: Mapping[int, LayerSpec],
        tables: Mapping[int, LayerSpec],
        untied: set[str],
        promote: Callable[[Operation], LayerSpec | None],
        adopt: Callable[[LayerSpec], None],
        finish: Callable[[dict[str, Statistics], dict[str, str], dict[str, str]], None],
        positions: PositionsLike | Mapping[str, PositionsLike] | None,
        loss_normalizer: Scalar | None,
        generator: torch.Generator | None,
        active: bool,
    ) -> None:
        self.active = active
        self.loss_normalizer = loss_normalizer
        self._config = config
        self._layers = layers
        self._tables = tables
        self._untied = untied
        self._promote = promote
        self._adopt = adopt
        self._finish = finish
        self._positions = _as_positions(positions)
        self._generator = generator
        self._recorders: dict[str, AnyRecorder] = {}
        self._weights: dict[str, Tensor] = {}
        self._other_uses: dict[int, str] = {}
        self._record_gradients = config.fisher == "empirical"
        self._passes = 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Capture:
        if self.active:
            # A compiled graph hides its operations: statistics steps run the same model eagerly.
            if "torch._dynamo" in sys.modules:
                self._stack.enter_context(_eagerly())
            self._stack.enter_context(_Interceptor(self))
        return self

    def __exit__(self, exc_type: Any, exc: Any, traceback: Any) -> None:
        if not self.active:
            return
        self._stack.close()
        self.active = False
        self._record_gradients = False
        try:
            if exc_type is None:
                self._collect()
        finally:
            self._recorders.clear()
            self._weights.clear()

    def backward_fisher(
        self,
        outputs: Tensor | tuple[Tensor, Tensor],
        loss_type: LossType | str,
        mask: Tensor | None = None,
    ) -> None:
        """The extra backward passes of `fisher="mc"` and "exact", through the forward pass just made.

        Does nothing for the empirical Fisher and outside statistics steps, so it may always be called; call it
        before `loss.backward()`, which frees the graph. Arguments as in `fisher.sampled_loss`.
        """
        if not self.active or self._config.fisher == "empirical":
            return
        if self._config.fisher == "mc":
            samples = self._config.fisher_samples
            losses: Iterator[Tensor] = (
                fisher.sampled_loss(outputs, loss_type, mask, self._generator) for _ in range(samples)
            )
        else:
            assert isinstance(outputs, Tensor)
            losses = fisher.exact_losses(outputs, loss_type, mask)
        weights = list(self._weights.values())
        if not weights:
            return  # no layer is covered, or the forward pass is yet to come
        self._record_gradients = True
        for loss in losses:
            torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
            for recorder in self._recorders.values():
                recorder.end_pass()
            self._passes += 1
        self._record_gradients = False

    def other_use(self, what: str, args: Iterable[Any]) -> None:
        """Remember that something without a rule used a parameter as a weight."""
        if not torch.is_grad_enabled():
            return
        for arg in args:
            for item in arg if isinstance(arg, list | tuple) else (arg,):
                if isinstance(item, torch.nn.Parameter):
                    self._other_uses.setdefault(id(item), what)

    def operation(self, operation: Operation, output: Tensor) -> Tensor:
        """Record a weighted operation; returns the output to hand on in its place.

        A layer that runs within the backward pass is run again by activation checkpointing. Where checkpointing
        is reentrant, the first run was without gradients, and this one is recorded once its gradient arrives;
        otherwise the first run was recorded, and no gradient will reach this one.
        """
        spec = self._layers.get(id(operation.weight))
        known = self._recorders.get(spec.name) if spec is not None else None
        if isinstance(known, Recorder) and not _in_backward():
            known.next_forward()
        if not output.requires_grad:
            return output
        self.other_use(f"{operation.kind} as its input", (operation.input,))
        spec = spec or self._promote(operation)
        if spec is None:
            return output
        if spec.bias is not None and operation.bias is None:
            self.other_use("a call without its bias", (operation.weight,))
        recorder = self._recorder(spec, operation.weight, Recorder)
        return self._attach(recorder, operation, output, self._positions_for(spec.name, operation, output))

    def covers(self, call: recurrent.LSTMCall) -> bool:
        return torch.is_grad_enabled() and any(id(weight) in self._layers for weight in call.weights)

    def lstm(self, call: recurrent.LSTMCall) -> tuple[Tensor, Tensor, Tensor]:
        """Run an LSTM so that its linear layers can be recorded; returns what the fused operation returns."""

        def record(operation: Operation, output: Tensor, rows: recurrent.Rows) -> Tensor:
            spec = self._layers.get(id(operation.weight))
            if spec is None:
                return output
            if spec.bias is not None and operation.bias is None:
                self.other_use("a call without its bias", (operation.weight,))
            recorder = self._recorder(spec, operation.weight, Recorder)
            if not _in_backward():
                recorder.next_forward()
            return self._attach(recorder, operation, output, rows.positions(self._candidates(spec.name)))

        return recurrent.run(call, record)

    def table_use(
        self, func: Any, name: str, args: list[Any], kwargs: Mapping[str, Any], output: Any
    ) -> Tensor | None:
        """Record what an operation does with an embedding table that is, or may prove to be, the output layer too.

        Returns:
            The output to hand on if this was such an operation, None if it is to be treated like any other.
        """
        if not self._tables or not torch.is_grad_enabled():
            return None
        flat = [x for arg in (*args, *kwargs.values()) for x in (arg if isinstance(arg, list | tuple) else (arg,))]
        behind = [(x, *tied.table_behind(x, self._tables)) for x in flat]
        reads = [(x, table, transposed) for x, table, transposed in behind if table is not None]
        if not reads or not isinstance(output, Tensor) or not output.requires_grad:
            return None
        item, table, transposed = reads[0]
        operation = None
        if func in LOOKUPS or func is torch.nn.functional.linear:
            operation = (LOOKUPS.get(func) or RULES[func])(*args, **kwargs)
        elif name in tied.PRODUCTS and transposed and flat[1:] == [item]:
            operation = Operation("linear", flat[0], table, None)
        if operation is not None and operation.weight is table and len(reads) == 1:
            return self._table_operation(operation, output)
        if name in tied.TRANSPOSES and tied.table_behind(output, self._tables)[0] is not None:
            return output  # whoever reads it will be seen
        for item, table, _ in reads:
            if item is not table:
                self._other_uses.setdefault(id(table), name)
        return None

    def _table_operation(self, operation: Operation, output: Tensor) -> Tensor:
        spec = self._tables[id(operation.weight)]
        is_output = operation.kind == "linear"
        if spec.name in self._untied and not is_output:
            return output
        recorder = self._recorder(spec, operation.weight, TiedRecorder)
        recorder.is_output |= is_output
        part = recorder.output if is_output else recorder.lookups
        if not _in_backward():
            part.next_forward()
        return self._attach(part, operation, output, self._positions_for(spec.name, operation, output))

    def _recorder(self, spec: LayerSpec, weight: Tensor, kind: type[AnyRecorder]) -> Any:
        if spec.name not in self._recorders:
            dtype = torch.promote_types(weight.dtype, torch.float32)
            self._recorders[spec.name] = kind(spec, dtype, self._config.fisher == "empirical")
            self._weights[spec.name] = weight
        return self._recorders[spec.name]

    def _attach(
        self, recorder: Recorder, operation: Operation, output: Tensor, positions: Positions | None
    ) -> Tensor:
        """Record a call's input now (or when its layer is run again), and its output gradient when it comes."""
        again = _in_backward()
        geometry = operation.geometry(output)
        device = output.device.type

        def record() -> Call:
            with torch.no_grad(), torch.autocast(device, enabled=False):
                return recorder.input(operation, geometry, positions)

        hook = self._gradient_hook(recorder, record if again else record(), positions, output)
        producer = output._base.grad_fn if output._is_view() and output._base is not None else None
        if producer is not None and output._base is not None and output._base.numel() == output.numel():
            # An in-place operation on a view rewrites its history, and a hook on it would never fire; the operation
            # that made what it is a view of stays in the graph.
            producer.register_prehook(lambda grads: hook(grads[0]))
        else:
            output = output.clone() if output._is_view() else output
            output.register_hook(hook)
        return output

    def _gradient_hook(
        self, recorder: Recorder, call: Call | Callable[[], Call], positions: Positions | None, output: Tensor
    ) -> Callable[[Tensor | None], None]:
        """Records the output gradient of a call, and first the call itself where that was left open."""
        shape, device = output.shape, output.device

        def hook(grad: Tensor | None) -> None:
            nonlocal call
            if not self._record_gradients:
                return
            with torch._C.DisableTorchFunction(), torch.no_grad(), torch.autocast(device.type, enabled=False):
                # None is what an autograd.Function may return for zero.
                grad = torch.zeros(shape, device=device) if grad is None else grad.reshape(shape)
                if not isinstance(call, Call):
                    call = call()
                recorder.output_gradient(call, grad, positions)

        return hook

    def _positions_for(self, name: str, operation: Operation, output: Tensor) -> Positions | None:
        candidates = self._candidates(name)
        if not candidates:
            return None
        if isinstance(self._positions, Mapping) and len(candidates) == 1:
            return candidates[0]  # by name, it has to fit
        shape = tuple(output.shape)
        leading = (shape[0], *shape[2:]) if operation.kind.startswith("conv") else shape[:-1]
        fitting = [p for p in candidates if p.fits(leading)]
        if len([p for p in fitting if p.segment_ids is not None]) > 1:
            # Nothing but their number tells what the rows are, and a wrong guess would not show.
            raise ValueError(
                f"layer {name} has {leading[0]} rows in dimension 0, which fits several of the segmentations: "
                f"describe its positions by its name, capture(positions={{{name!r}: ..., ...}})"
            )
        if fitting:
            return fitting[0]
        for p in candidates:
            if p.segment_ids is None:
                continue
            if leading[:1] == (p.num_segments,):  # one row per segment
                return dataclasses.replace(p, segment_ids=None, num_segments=None) if p.by_gradient else None
            # Taken as they are, these rows would silently be examples with a single position each.
            raise ValueError(
                f"layer {name} has {leading[0] if leading else 1} rows in dimension 0, neither those of "
                f"segment_ids ({len(p.segment_ids)}) nor one per segment ({p.num_segments}): describe its "
                f"positions by its name, capture(positions={{{name!r}: ..., ...}})"
            )
        return None

    def _candidates(self, name: str) -> list[Positions]:
        """The descriptions of positions that a layer may take, in order."""
        if isinstance(self._positions, Mapping):
            matches = (value for pattern, value in self._positions.items() if fnmatch.fnmatchcase(name, pattern))
            return next(matches, [])
        return self._positions

    def _collect(self) -> None:
        self._settle_tables()
        missing: dict[str, str] = {}
        shared: dict[str, str] = {}
        for weight_id, spec in self._layers.items():
            if weight_id in self._other_uses:
                shared[spec.name] = self._other_uses[weight_id]
                continue
            recorder = self._recorders.get(spec.name)
            if recorder is None:
                missing[spec.name] = "its inputs"
            elif not recorder.backward_done:
                if self._config.fisher != "empirical" and not self._passes:
                    raise MissingStatisticsError(
                        f"fisher={self._config.fisher!r} needs capture.backward_fisher(outputs, loss_type) "
                        "between the forward pass and loss.backward()"
                    )
                missing[spec.name] = "its output gradients"
        statistics = {}
        for name, recorder in self._recorders.items():
            if name in missing or name in shared:
                continue
            recorder.end_group()
            if self._config.fisher == "empirical":
                scale = recorder.examples if self.loss_normalizer is None else self.loss_normalizer
                factor = scale * scale
            else:
                factor = 1.0 / self._config.fisher_samples if self._config.fisher == "mc" else 1.0
            statistics[name] = recorder.statistics(factor)
        self._finish(statistics, missing, shared)

    def _settle_tables(self) -> None:
        """Cover the tables that proved to be the output layer, too; forget the others."""
        for weight_id, spec in self._tables.items():
            recorder = self._recorders.get(spec.name)
            if weight_id in self._layers or not isinstance(recorder, TiedRecorder):
                continue
            ready = recorder.backward_done and spec.name not in self._untied and weight_id not in self._other_uses
            if ready:
                self._adopt(spec)
                continue
            del self._recorders[spec.name]
            # An output layer whose lookups went by: the next statistics step will see both.
            if recorder.is_output:
                self._untied.discard(spec.name)
            else:
                self._untied.add(spec.name)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


@contextlib.contextmanager
def _eagerly() -> Iterator[None]:
    """Run what torch.compile compiled as it was written."""
    if hasattr(torch.compiler, "set_stance"):
        with torch.compiler.set_stance("force_eager"):
            yield
        return
    # Before torch 2.6: compiled functions ask this one to switch compilation on for their frame.
    from torch._dynamo import eval_frame

    switch = eval_frame._maybe_set_eval_frame
    eval_frame._maybe_set_eval_frame = lambda callback: switch(None)
    try:
        yield
    finally:
        eval_frame._maybe_set_eval_frame = switch


def _as_positions(
    positions: PositionsLike | Mapping[str, PositionsLike] | None,
) -> list[Positions] | dict[str, list[Positions]]:
    """Lists of candidates; a bare tensor is a mask, and "gradient" is `Positions(mask="gradient")`."""
    if isinstance(positions, Mapping):
        return {pattern: _as_list(value) for pattern, value in positions.items()}
    return [] if positions is None else _as_list(positions)


def _as_list(positions: PositionsLike) -> list[Positions]:
    items: list[Any] = list(positions) if isinstance(positions, list | tuple) else [positions]
    return [p if isinstance(p, Positions) else Positions(mask=p) for p in items]
