"""An embedding table that is the output layer too: one K-FAC direction from all uses of one weight.

The table W (V x d) takes part in the loss twice. As output layer s = W x, its inputs are on the d-side and its
output gradients on the V-side; as lookup y = W^T e, with e the one-hot token, it is the other way round. With the
factors of each use as in `factors`, uses taken as independent, the curvature of vec(W), V-side first, is

    B_out (x) A_out  +  F (x) B_emb,

F the factor of the one-hot inputs (expand: the diagonal of token frequencies, of trace 1). No single Kronecker
product equals this sum, and V is too large for a matrix of its own. The vocabulary side is taken as the identity,
and among all I (x) X the one closest to the sum in the Frobenius norm is its partial trace over the vocabulary,

    X = ( tr(B_out) A_out + tr(F) B_emb ) / V,

because || M - I (x) X ||^2 is a separate least-squares problem in each entry of X, over the V entries of M that it
stands for (Van Loan and Pitsianis 1993, with one factor held at the identity). Only traces are needed of what has V
rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from algoperf_kfac.config import TABLE, KFACConfig
from algoperf_kfac.layers import FallbackSpec, LayerSpec, make_spec, matches
from algoperf_kfac.pytorch import factors
from algoperf_kfac.pytorch.calls import Call
from algoperf_kfac.pytorch.kinds._base import AnyRecorder, Kind, Watch
from algoperf_kfac.pytorch.operations import LOOKUPS, RULES, Called, Operation
from algoperf_kfac.pytorch.recorder import Recorder
from algoperf_kfac.pytorch.statistics import Product, Scalar, Statistics

if TYPE_CHECKING:
    from algoperf_kfac.pytorch.observer import Observer

# Operations whose output may be the transposed table; who reads that decides what it was for.
TRANSPOSES = frozenset({"T", "H", "mT", "mH", "t", "adjoint", "transpose", "swapaxes", "swapdims", "permute"})
PRODUCTS = frozenset({"matmul", "mm"})


class TiedTable(Kind):
    """Embedding tables that are, or may prove to be, the output layer, too.

    Attributes:
        tables: by parameter name: the layer that a table would be, and the reason it has as long as this is open.
        untied: names of tables that proved not to be tied.
    """

    names = (TABLE,)

    def __init__(self) -> None:
        self.tables: dict[str, tuple[LayerSpec, str]] = {}
        self.untied: set[str] = set()

    def begin(
        self, model: nn.Module, config: KFACConfig, fallbacks: Iterable[FallbackSpec], exclude: Iterable[str]
    ) -> None:
        reasons = {f.name: f.reason for f in fallbacks}
        found = find_tables(model, config, reasons, exclude)
        # Those that are covered already are among no fallbacks.
        self.tables |= {name: (spec, reasons[name]) for name, spec in found.items()}

    def watch(self, observer: Observer) -> Watch | None:
        book = observer.layers
        reasons = {f.name: f.reason for f in book.fallbacks}
        covered = [layer.spec for layer in book.covered.values()]
        open_tables = {
            id(book.params[name]): spec
            for name, (spec, reason) in self.tables.items()
            if name in book.params and (reasons.get(name) == reason or spec in covered)
        }
        return _TableWatch(observer, open_tables, self.untied) if open_tables else None

    def recorder(self, spec: LayerSpec, dtype: torch.dtype, *, one_pass: bool, checks: bool) -> AnyRecorder:
        return TiedRecorder(spec, dtype, one_pass=one_pass, checks=checks)

    def zeros(self, spec: LayerSpec, like: Tensor) -> Statistics:
        return TableStatistics.zeros(spec, like)


def find_tables(
    model: nn.Module, config: KFACConfig, open_to: Iterable[str], exclude: Iterable[str] = ()
) -> dict[str, LayerSpec]:
    """The embedding tables that are covered if they prove to be the output layer, too.

    Args:
        model: the model, unwrapped.
        config: decides the approximation and the block sizes.
        open_to: names of the parameters that are not covered.
        exclude: patterns (fnmatch) of module paths to leave to the fallback.

    Returns:
        Parameter name -> the layer the table would be.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    candidates, patterns = set(open_to), list(exclude)
    barred: set[int] = set()
    found: dict[str, LayerSpec] = {}
    for path, module in model.named_modules():
        plain = isinstance(module, nn.Embedding) and not (
            module.sparse or module.scale_grad_by_freq or module.max_norm is not None
        )
        excluded = matches([path], patterns)
        for p in module._parameters.values():
            if p is None:
                continue
            if excluded or not (plain or isinstance(module, nn.Linear)):
                barred.add(id(p))
            elif plain and names[id(p)] in candidates:
                spec = make_spec(
                    name=names[id(p)].rpartition(".")[0] or names[id(p)],
                    kind=TABLE,
                    weight=names[id(p)],
                    bias=None,
                    weight_shape=tuple(p.shape),
                    groups=1,
                    in_dim=p.shape[1],
                    out_dim=p.shape[0],
                    config=config,
                )
                if spec.has_factors:
                    found[spec.weight] = spec
    barred_names = {names[i] for i in barred if i in names}
    return {name: spec for name, spec in found.items() if name not in barred_names}


class _TableWatch(Watch):
    """Records what operations do with the tables.

    Args:
        observer: of the capture.
        tables: by identity of the weight: tied tables, and those of which it is not known.
        untied: names of tables that proved not to be tied; updated.
    """

    def __init__(self, observer: Observer, tables: Mapping[int, LayerSpec], untied: set[str]) -> None:
        self._observer, self._tables, self._untied = observer, tables, untied

    def called(self, called: Called) -> Any:
        if not torch.is_grad_enabled():
            return NotImplemented
        flat = list(called.leaves())
        behind = [(x, *table_behind(x, self._tables)) for x in flat]
        reads = [(x, table, transposed) for x, table, transposed in behind if table is not None]
        if not reads:
            return NotImplemented
        output = called.run()
        if not isinstance(output, Tensor) or not output.requires_grad:
            return NotImplemented
        item, table, transposed = reads[0]
        operation = None
        if called.func in LOOKUPS or RULES.get(called.func) is RULES[torch.nn.functional.linear]:
            operation = (LOOKUPS.get(called.func) or RULES[called.func])(*called.args, **called.kwargs)
        elif called.name in PRODUCTS and transposed and len(flat) == 2 and flat[1] is item:
            operation = Operation("linear", flat[0], table, None)
        if operation is not None and operation.weight is table and len(reads) == 1:
            return self._record(called, operation, output)
        if called.name in TRANSPOSES and table_behind(output, self._tables)[0] is not None:
            return output  # whoever reads it will be seen
        for item, table, _ in reads:
            if item is not table:
                self._observer.uses.miss(table, called.name)
        return NotImplemented

    def _record(self, called: Called, operation: Operation, output: Tensor) -> Tensor:
        spec = self._tables[id(operation.weight)]
        is_output = operation.kind == "linear"
        if spec.name in self._untied and not is_output:
            return output
        try:
            positions = self._observer.choose(spec, operation, output)
        except ValueError:
            if id(operation.weight) in self._observer.layers.by_weight or is_output:
                raise
            # Positions concern covered layers, and this may be a plain lookup: once for the whole batch, say.
            self._untied.add(spec.name)
            return output
        recorder = self._observer.recorder(spec, operation.weight)
        assert isinstance(recorder, TiedRecorder)
        recorder.is_output |= is_output
        part = recorder.output if is_output else recorder.lookups
        self._observer.note_function(called, operation, spec, recorder.uses.index(part))
        return self._observer.attach(part, operation, output, positions)

    def settle(self) -> None:
        """Cover the tables that proved to be the output layer, too; forget the others."""
        observer = self._observer
        for weight_id, spec in self._tables.items():
            recorder = observer.recorders.get(spec.name)
            if observer.layers.by_weight.get(weight_id) or not isinstance(recorder, TiedRecorder):
                continue
            if recorder.is_complete and spec.name not in self._untied and weight_id not in observer.uses.missed:
                observer.layers.adopt(spec)
                continue
            observer.forget(spec.name)
            # An output layer whose lookups went by: the next statistics step will see both.
            if recorder.is_output:
                self._untied.discard(spec.name)
            else:
                self._untied.add(spec.name)


def table_behind(value: object, tables: Mapping[int, LayerSpec]) -> tuple[Tensor | None, bool]:
    """The table that a tensor is, or is a view of; and whether it is exactly its transpose.

    Args:
        value: any argument of an operation.
        tables: layers by the identity of their weight.
    """
    if not isinstance(value, Tensor):
        return None, False
    if id(value) in tables:
        return value, False
    base = value._base if value._is_view() else None
    if base is None or id(base) not in tables:
        return None, False
    same = value.storage_offset() == base.storage_offset() and value.is_conj() == base.is_conj()
    return base, same and value.shape == base.shape[::-1] and value.stride() == base.stride()[::-1]


class OutputUse(Recorder):
    """The table as output layer: A_out in blocks, of B_out the trace alone."""

    thins = False

    @property
    def block_sizes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.spec.in_blocks, (1,)

    def _output_products(self, rows: Tensor) -> list[Tensor]:
        return [rows.square().sum().reshape(1, 1, 1)]


class Lookups(Recorder):
    """The table as lookup: of the one-hot inputs the trace alone, B_emb in blocks."""

    thins = False

    @property
    def block_sizes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (1,), self.spec.in_blocks

    @property
    def input_features(self) -> int:
        return self.spec.out_dim

    @property
    def output_features(self) -> int:
        return self.spec.in_dim

    def _prepare(self, call: Call, operation: Operation, x: Tensor) -> None:
        padding = operation.hyper["padding_idx"]
        if padding is None:
            return
        # The backward pass leaves these rows of the gradient out.
        call.drop = x.reshape(len(x), -1) == (padding if padding >= 0 else self.spec.out_dim + padding)
        if not call.layout.by_gradient:
            keep = (~call.drop).to(self.dtype)
            mask = keep if call.layout.mask is None else keep * call.layout.mask
            call.layout = dataclasses.replace(call.layout, mask=mask, ragged=True)

    def _input_sums(self, call: Call, x: Tensor) -> Tensor:
        """(examples, 1, V): how often each token occurs in each example."""
        layout, vocabulary = call.input_layout, self.spec.out_dim
        ids = x.reshape(len(x), -1).long()
        example = torch.arange(len(x), device=x.device) if layout.segment_ids is None else layout.segment_ids
        counts = torch.zeros(layout.num_examples * vocabulary, dtype=self.dtype, device=x.device)
        weights = torch.ones_like(ids, dtype=self.dtype) if layout.mask is None else layout.mask
        places = example.unsqueeze(1) * vocabulary + ids
        return counts.scatter_add_(0, places.flatten(), weights.flatten()).reshape(-1, 1, vocabulary)

    def _expand_inputs(self, call: Call, x: Tensor) -> list[Tensor]:
        count = torch.full((), float(x[..., 0].numel()), dtype=self.dtype, device=x.device)
        mask = call.input_layout.mask
        count = count if mask is None else mask.sum()
        return [count.reshape(1, 1, 1)]

    def _input_products(self, rows: Tensor, ones: Tensor | None) -> list[Tensor]:
        return [rows.square().sum().reshape(1, 1, 1)]

    def _output_products(self, rows: Tensor) -> list[Tensor]:
        return factors.outer_sums(rows, None, self.spec.in_blocks)

    def _product(self, call: Call, x: Tensor, grad: Tensor, eps: float) -> Product:
        """The gradient that comes back to the rows of the table that were looked up."""
        grads = grad.flatten(0, -2)
        if call.drop is not None:
            grads = grads.masked_fill(call.drop.reshape(-1, 1), 0)
        matrix = grads.new_zeros(1, self.spec.out_dim, self.spec.in_dim)
        matrix[0].index_add_(0, x.reshape(-1).long(), grads)
        return Product(matrix, grads.square().sum().sqrt() * len(grads) ** 0.5, eps)


@dataclasses.dataclass
class TableStatistics(Statistics):
    """Of a tied table: A_out as `a`; tr(B_out), tr(F) and the blocks of B_emb as `b`.

    Attributes:
        vocabulary: V.
    """

    vocabulary: int = 0

    @classmethod
    def zeros(cls, spec: LayerSpec, like: Tensor) -> TableStatistics:
        blocks = Statistics.zeros(spec, like).a
        scalars = [like.new_zeros(1, 1, 1) for _ in range(2)]
        return cls(blocks, [*scalars, *(torch.zeros_like(m) for m in blocks)], 0.0, 0.0, vocabulary=spec.out_dim)

    def averages(self) -> tuple[list[Tensor], list[Tensor]]:
        """X in place of A, B being the identity."""
        a, (trace, share, *blocks) = super().averages()
        return [(trace * x + share * y) / self.vocabulary for x, y in zip(a, blocks, strict=True)], []


class TiedRecorder:
    """Gathers the statistics of a tied table."""

    def __init__(self, spec: LayerSpec, dtype: torch.dtype, *, one_pass: bool = True, checks: bool = False) -> None:
        self.spec = spec
        self.output = OutputUse(spec, dtype, one_pass=one_pass, checks=checks)
        self.lookups = Lookups(spec, dtype, one_pass=one_pass, checks=checks)
        self.is_output = False  # the table was read as output layer

    @property
    def uses(self) -> tuple[Recorder, ...]:
        return self.output, self.lookups

    @property
    def is_complete(self) -> bool:
        return not self.missed

    @property
    def missed(self) -> str:
        return self.output.missed or (self.lookups.missed if self.lookups.calls else "")

    @property
    def examples(self) -> Scalar:
        return self.output.examples

    @property
    def rows(self) -> int:
        return self.output.rows

    @property
    def product(self) -> Product | None:
        of_output, of_lookups = self.output.product, self.lookups.product
        return of_output + of_lookups if of_output and of_lookups else of_output or of_lookups

    def note_loss(self, gradient: Tensor | None) -> None:
        self.output.note_loss(gradient)
        self.lookups.note_loss(gradient)

    def set_aside(self) -> None:
        self.output.set_aside()
        self.lookups.set_aside()

    def forget_seen(self) -> None:
        self.output.forget_seen()
        self.lookups.forget_seen()

    def end_pass(self) -> None:
        self.output.end_pass()
        self.lookups.end_pass()

    def end_group(self) -> None:
        self.output.end_group()
        self.lookups.end_group()

    def kept_inputs(self) -> Iterator[Tensor]:
        yield from self.output.kept_inputs()
        yield from self.lookups.kept_inputs()

    def statistics(self, factor: Scalar, *, by_loss: bool = False) -> Statistics:
        """The sums of both uses, to be divided by their counts."""
        out = self.output.statistics(factor, by_loss=by_loss)
        trace, ones = out.b[0], torch.ones_like(out.b[0])
        if self.lookups.sums.a is None:
            share, blocks = 0 * ones, [m.new_zeros(m.shape) for m in out.a]
        else:
            emb = self.lookups.statistics(factor, by_loss=by_loss)
            # A count of zero comes with a sum of zero.
            share, blocks = emb.a[0] / torch.as_tensor(emb.a_count, device=trace.device).clamp(min=1), emb.b
        sums = [trace, share * out.examples, *blocks]
        rounding = max(self.output.rounding, self.lookups.rounding)
        return TableStatistics(out.a, sums, out.a_count, out.examples, rounding, vocabulary=self.spec.out_dim)
