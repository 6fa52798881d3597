"""Statistics inside compiled graphs: what torch.compile traces on statistics steps.

Layers have taps there (`taps.py`), whose graph is another one than that of steps without statistics. Which layers a
model has and how they are read is learnt from a statistics step that runs uncompiled, the first one, and saved with
the optimizer's state. A model whose covered layers cannot all be tapped stays with such steps, and so does one that
proves to use a layer in another way at some later step.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from algoperf_kfac.errors import listed, warn
from algoperf_kfac.layers import LayerSpec
from algoperf_kfac.positions import Candidates, candidates_for
from algoperf_kfac.pytorch import joining
from algoperf_kfac.pytorch.covered_layer import CoveredLayer
from algoperf_kfac.pytorch.discovery import unwrap
from algoperf_kfac.pytorch.forms import Forms, apart
from algoperf_kfac.pytorch.interception import can_run_eagerly
from algoperf_kfac.pytorch.kinds import AnyRecorder
from algoperf_kfac.pytorch.operations import LOOKUPS
from algoperf_kfac.pytorch.recorder import Recorder
from algoperf_kfac.pytorch.sights import TURNED, Sight, from_numbers, is_known, may_save, to_numbers
from algoperf_kfac.pytorch.tapped import lacking, leave_whole
from algoperf_kfac.pytorch.taps import COUNTS, Arrival, Incomplete, Products, Table, Tap, Taps
from algoperf_kfac.subset import RowLimit

MakeRecorder = Callable[[LayerSpec, torch.dtype], AnyRecorder]
TOO_OLD = "this torch ({}) has no {}, which torch 2.6 to 2.13 have"
NOT_EAGERLY = (
    "the model is compiled, and its first statistics step has to run uncompiled, for which this torch ({}) has no "
    "torch.compiler.set_stance, which torch 2.6 to 2.13 have: leave torch.compile out, or take one of these"
)
UNLIKE = -1  # in place of a layer's turn: it is not used in the same way at every step


class CompiledStatistics:
    """Decides whether statistics steps of a model run compiled, and makes its taps.

    Args:
        model: as it was given, perhaps in wrappers.
        allowed: whether statistics may be taken in compiled graphs.
    """

    def __init__(self, model: nn.Module, *, allowed: bool) -> None:
        self._allowed = allowed
        self._compiled = _is_compiled(model)
        self._model = unwrap(model)
        self._unlike: set[str] = set()  # layers that are not used in the same way at every step
        self.forget()
        self.check()

    def forget(self) -> None:
        """Learn anew: layers joined or left."""
        self._sights: dict[str, tuple[Sight, ...]] = {}
        self._obstacles: list[str] = []
        self._learnt = False
        self._made: dict[tuple[object, ...], Taps] = {}
        self._arrivals: list[Arrival | Incomplete] = []

    def __getstate__(self) -> dict[str, Any]:
        """For deepcopy and pickle: without what hangs on identities."""
        return {name: getattr(self, name) for name in ("_allowed", "_compiled", "_model", "_unlike")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({"_unlike": set()} | state)  # states that were pickled before have none
        self.forget()

    def wants_rehearsal(self, *, unchecked: bool) -> bool:
        """Whether the next statistics step would run uncompiled to show the layers, or to check them."""
        may = self._allowed and self.is_compiled and lacking() is None
        return may and (unchecked or not self._learnt) and not self._unlike and not self._obstacles

    @property
    def is_compiled(self) -> bool:
        """Whether torch.compile compiled the model, as far as that can be seen."""
        self._compiled = self._compiled or _is_compiled(self._model)
        return self._compiled

    def check(self) -> None:
        """See that statistics steps can run uncompiled, as the first one does.

        Raises:
            RuntimeError: this torch has no way to run what torch.compile compiled as it was written.
        """
        if not can_run_eagerly() and self.is_compiled:
            raise RuntimeError(NOT_EAGERLY.format(torch.__version__))

    def saved(self, covered: Iterable[str]) -> dict[str, list[list[int | float]]]:
        """What is known of layers, as numbers, so that a resumed run takes the same steps compiled.

        For each use of a layer its turn (0: nothing is known) and the numbers of `sights.to_numbers`.
        """
        covered = list(covered)
        unlike = self._used_otherwise(covered)
        order = list(self._sights)
        return {
            name: [to_numbers(order.index(name) + 1, sight) for sight in self._sights[name]]
            if self._may_save(name) and not unlike
            else [to_numbers(UNLIKE if name in unlike else 0, None)]
            for name in covered
        }

    def _may_save(self, name: str) -> bool:
        """Obstacles are learnt anew; they may be gone."""
        known = self._sights.get(name, ())
        return bool(known) and not self._obstacles and all(map(may_save, known))

    def restore(self, saved: Mapping[str, Sequence[Sequence[int | float]]]) -> None:
        """Go on from what `saved` gave; where it does not know every layer, learn anew."""
        self.forget()
        self._unlike = {name for name, uses in saved.items() if uses[0][0] == UNLIKE}
        found = sorted((uses[0][0], name, uses) for name, uses in saved.items())
        if found and all(is_known(use) for _, _, uses in found for use in uses):
            self.learn({name: tuple(map(from_numbers, uses)) for _, name, uses in found}, ())

    def learn(self, sights: Mapping[str, tuple[Sight, ...]], obstacles: Iterable[str], *, parts: int = 1) -> None:
        """Take note of an uncompiled statistics step.

        Args:
            sights: of the layers that can be tapped, each of their uses; the one that sees the batch first.
            obstacles: why others cannot.
            parts: how many such batches those of further steps are as large as.
        """
        self._learnt = True
        # Layers of other rows than the batch's (of a learned constant, once for all examples) keep theirs.
        batch = next((uses[0].examples for uses in sights.values()), 1)
        whole = {
            name: tuple(s if s.examples % batch else s.times(parts) for s in uses) for name, uses in sights.items()
        }
        self._sights = {**whole, **{name: s for name, s in self._sights.items() if name not in whole}}
        self._obstacles = list(obstacles)
        self._made.clear()

    def obstacle(self, covered: Iterable[str]) -> str | None:
        """Why the next statistics step of these layers runs uncompiled; None if it does not."""
        if not self._allowed:
            return "compiled_statistics=False"
        if (lack := lacking()) is not None:
            return TOO_OLD.format(torch.__version__, lack)
        covered = list(covered)
        unlike = self._used_otherwise(covered)
        if not self._learnt and not unlike:
            return "the first one does"
        if self._obstacles:
            return listed(self._obstacles)
        if unlike:
            return f"layer {listed(unlike)} is not used in the same way at every step"
        unseen = [name for name in covered if name not in self._sights]
        return f"layer {listed(unseen)} was not called so far" if unseen else None

    def _used_otherwise(self, covered: Iterable[str]) -> list[str]:
        """The layers of these that proved to be used in another way than was learnt.

        Their statistics of that step are left out of the averages. How many calls there will be at the next one
        cannot be known beforehand: it runs uncompiled from then on.
        """
        found = dict(pair for arrival in self._arrivals for pair in arrival.unlike() if pair[0] not in self._unlike)
        self._arrivals.clear()
        if found:
            self._unlike |= set(found)
            warn(
                f"layer {listed(found)} was {' and '.join(dict.fromkeys(found.values()))} in a statistics step "
                "that ran compiled, and not so in the one before that ran uncompiled, by which the graphs go: its "
                "statistics of that step are left out, and further statistics steps run uncompiled"
            )
        return [name for name in covered if name in self._unlike]

    def note(self, covered: Iterable[str]) -> str | None:
        """What to say of the statistics steps of a model; None of one that is not compiled."""
        if not self.is_compiled:
            return None
        reason = self.obstacle(covered)
        return "statistics steps run compiled" if reason is None else f"statistics steps run uncompiled: {reason}"

    def taps(
        self,
        covered: Mapping[str, CoveredLayer],
        candidates: Candidates,
        rows: RowLimit,
        sequence_first: Iterable[str],
        recorder: MakeRecorder,
    ) -> Taps | None:
        """The taps of a statistics step; None where it runs uncompiled.

        Args:
            covered: the layers.
            candidates: descriptions of their positions.
            rows: `KFACConfig.row_limit`.
            sequence_first: names of parameters whose modules say that inputs are (T, N, features).
            recorder: makes that of a layer, with factors of a dtype.
        """
        if not self.is_compiled or self.obstacle(covered) is not None:
            return None
        described = apart(candidates)
        if described is None:
            return None
        forms, masks = described
        leave_whole()
        # Models are cast and moved.
        weights = tuple(
            (layer.spec, id(layer.weight), layer.weight.dtype, layer.weight.device) for layer in covered.values()
        )
        made = self._made.get((forms, weights))
        if made is None:
            made = self._make(covered, candidates, rows, set(sequence_first), forms, recorder)
            self._made[forms, weights] = made
        made.clear()
        return dataclasses.replace(made, masks=masks)

    def _make(
        self,
        covered: Mapping[str, CoveredLayer],
        candidates: Candidates,
        rows: RowLimit,
        sequence_first: set[str],
        forms: Forms,
        recorder: MakeRecorder,
    ) -> Taps:
        taps: list[Tap] = []
        table: Table = {}
        lookups: Table = {}
        products: Products = {}
        readers: dict[int, Tensor] = {}
        turned: dict[tuple[int, int], tuple[list[int], list[Tensor]]] = {}
        for name in (name for name in self._sights if name in covered):
            layer = covered[name]
            spec, weight = layer.spec, layer.weight
            dtype = torch.promote_types(weight.dtype, torch.float32)
            zero = torch.zeros((), dtype=dtype, device=weight.device)
            limit = rows.fitted(spec.block_sizes, candidates_for(name, candidates))
            for use, sight in enumerate(self._sights[name]):

                def make(spec: LayerSpec = spec, dtype: torch.dtype = dtype, use: int = use) -> Recorder:
                    return recorder(spec, dtype).uses[use]

                shapes: list[tuple[int, ...]] = [(spec.groups, n, n) for sizes in make().block_sizes for n in sizes]
                if sight.calls > 1:
                    shapes = joining.shapes(make(), sight.examples, limit)
                zeros = [zero.expand(shape).requires_grad_() for shape in (*shapes, (COUNTS,))]
                first = spec.weight in sequence_first
                tap = Tap(spec, make, sight, dtype, limit, forms, first, zeros)
                taps.append(tap)
                bias = None if layer.bias is None else id(layer.bias)
                if sight.function in TURNED:
                    products[id(weight)] = (weight.shape[1], weight.shape[0], tap.number, zeros)
                else:
                    entry = (tap.number, zeros, sight.function, bias)
                    (lookups if sight.function in LOOKUPS else table)[id(weight)] = entry
                for param in layer.params if not use else ():
                    readers.setdefault(id(param), zeros[-1])
                if weight.dim() == 2 and not use:
                    tap.keep(weight)
                    numbers, counts = turned.setdefault((weight.shape[1], weight.shape[0]), ([], []))
                    numbers.append(tap.number)
                    counts.append(zeros[-1])
        by_sizes = [(*sizes, *known) for sizes, known in turned.items()]
        return Taps(taps, table, lookups, readers, by_sizes, products, [], self._arrivals)


def _is_compiled(model: nn.Module) -> bool:
    """Whether a model is in torch.compile's wrapper, or its module or a part of it was compiled in place."""
    if "torch._dynamo" not in sys.modules:
        return False
    return any(
        "_orig_mod" in module._modules or module._compiled_call_impl is not None for module in model.modules()
    )
