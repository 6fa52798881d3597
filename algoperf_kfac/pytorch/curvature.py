"""From what captures saw to refreshed layers: what processes agree on, moving averages, and whose turn it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from algoperf_kfac import cadence
from algoperf_kfac.config import KFACConfig
from algoperf_kfac.cost import cubes
from algoperf_kfac.errors import MissingStatisticsError, listed, missing_statistics
from algoperf_kfac.layers import INPUTS, NEVER_SEEN
from algoperf_kfac.pace import Pacer, interval_at
from algoperf_kfac.pytorch import distributed
from algoperf_kfac.pytorch.agreement import Entry, common_layers
from algoperf_kfac.pytorch.compiled import CompiledStatistics
from algoperf_kfac.pytorch.gathering import Gathered
from algoperf_kfac.pytorch.layer_book import Layers
from algoperf_kfac.pytorch.mistakes import Mistakes
from algoperf_kfac.pytorch.pending import Pending
from algoperf_kfac.pytorch.preconditioner import move_averages
from algoperf_kfac.pytorch.scalings import Scaling

REMEDY = (
    "Run the forward and the backward pass inside capture(), leave unused layers out with exclude=[...], or pass "
    "allow_partial_coverage=True to move them to the fallback"
)
# Layers whose weight the model no longer has.
GONE = (
    "It was tied to another, replaced or removed after the optimizer was made: make the optimizer afterwards, or "
    "let go of what the model no longer has by add_param_group({'params': []})"
)


class Curvature:
    """Keeps the states of a book of layers up to date.

    Args:
        config: the configuration.
        scaling: makes the operators of refreshed layers.
        layers: the book, with their states.
        processes: those that share statistics and refreshes.
        compiled: learns what compiled graphs have to know.
        mistakes: names what is wrong in a loop.
        allow_partial_coverage: leave a layer out that misses its statistics, in place of stopping.

    Attributes:
        pending: the statistics of the coming step.
        unchecked: whether the next capture is to compare what it saw with the weights' gradients.
        gradient_errors: what that gave, relative, by layer.
        pace: how many times the configured interval lies between refreshes, as a budget of time has it.
    """

    def __init__(
        self,
        config: KFACConfig,
        scaling: Scaling,
        layers: Layers,
        processes: distributed.Processes,
        compiled: CompiledStatistics,
        mistakes: Mistakes,
        *,
        allow_partial_coverage: bool,
    ) -> None:
        self.pending = Pending()
        self.unchecked = True
        self.gradient_errors: dict[str, float] = {}
        self.pace = 1
        self._config, self._scaling = config, scaling
        self._layers, self._processes = layers, processes
        self._compiled, self._mistakes = compiled, mistakes
        self._allow_partial_coverage = allow_partial_coverage
        self._pacer = Pacer(config)
        self._rehearsed = False  # since the latest capture

    @property
    def refresh_interval(self) -> int:
        """Steps between refreshes of a layer, in force."""
        return interval_at(self._config, self.pace)

    def restore(self, *, pace: int, unchecked: bool, gradient_errors: Mapping[str, float]) -> None:
        """Go on as a checkpoint says; statistics of a coming step are not in it."""
        self.pace, self.unchecked, self.gradient_errors = pace, unchecked, dict(gradient_errors)
        self._pacer.forget()
        self.pending.forget()

    # Within a step: captures ---------------------------------------------------------------------------------

    def before_capture(self, *, draws: bool) -> int:
        """A capture is about to open; which of the step's it is, of those that draw labels."""
        self._mistakes.forget_gradient()
        number = self.pending.captures
        self.pending.captures += draws
        self.pending.forget_stale(self._layers.covered)
        return number

    def meet(self, seen: Iterable[DistributedDataParallel], params: Mapping[str, Tensor]) -> None:
        """DistributedDataParallel may come around the model after the optimizer was made."""
        self._processes.meet(seen, params)

    def before_backward(self, adds: bool) -> None:
        """Loops may clear gradients as late as between the forward and the backward pass.

        Those that `torch.autograd.grad` returns take the place of the ones that are there, which are old.
        """
        covered = self._layers.covered
        self.pending.forget_stale(covered)
        if adds and not self.pending.statistics:
            self._mistakes.gradients_before(layer.weight for layer in covered.values())

    def after_backward(self) -> None:
        if self._processes.strangers:
            self._mistakes.gradient_after(layer.weight for layer in self._layers.covered.values())

    def take(self, gathered: Gathered) -> None:
        """Add what a capture gathered to the statistics of the coming step.

        Raises:
            MissingStatisticsError: naming layers that miss theirs, unless partial coverage is allowed.
        """
        layers, pending = self._layers, self.pending
        self._mistakes.strangers(gathered.strangers)
        uncalled = {n: layers.covered[n].spec.weight for n, what in gathered.missing.items() if what == INPUTS}
        gone = self._mistakes.gone(uncalled)
        missing = gathered.missing | gone
        layers.note_readers(gathered.readers)
        self._check_earlier(gathered)
        layers.give_up(gathered.wrong)
        for name in gathered.wrong:
            pending.drop(name)
        pending.unfinished = {} if gathered.backward else dict(missing)
        pending.hint = gathered.hint
        if not gathered.backward:
            return  # a batch that was given up before its backward pass
        # A layer that is called and whose gradient does not come back, or that no layer's statistics stand beside.
        lost = {name: what for name, what in missing.items() if what != INPUTS}
        if not gathered.statistics and not pending.statistics and self._processes.size == 1:
            lost = missing
        if lost and not self._allow_partial_coverage:
            raise missing_statistics(lost, len(layers.covered), gathered.hint or (GONE if gone else REMEDY))
        layers.leave_out(lost)
        for name in lost:
            pending.drop(name)
        pending.add(gathered.statistics, layers.covered)
        uncompiled = bool(gathered.sights or gathered.obstacles)
        if uncompiled:
            self._compiled.learn(gathered.sights, gathered.obstacles)
        self.gradient_errors |= gathered.errors
        self.unchecked = self.unchecked and not (gathered.errors or gathered.penalised)
        self._mistakes.loss_scaled(
            gathered.loss_gradient, gathered.sum_gradient, gathered.inner_sizes, scaled=gathered.scaled
        )
        if uncompiled or self._rehearsed:  # graphs have the rows of the batch that was learnt, whatever the batch
            self._mistakes.rows(gathered.rows, gathered.calls, scaled=gathered.scaled)
            self._mistakes.batch_second(gathered.second)
            self._mistakes.more_rows(gathered.more_rows, scaled=gathered.scaled)
            self._mistakes.in_parts(gathered.in_parts, scaled=gathered.scaled)
        self._rehearsed = False

    def learn(self, gathered: Gathered, parts: int) -> None:
        """Take from a rehearsal what a capture shows of layers, and no statistics.

        Args:
            gathered: of a part of a batch.
            parts: how many of it a batch has.
        """
        self._mistakes.strangers(gathered.strangers)
        self._layers.note_readers(gathered.readers)
        self._layers.give_up(gathered.wrong)
        if gathered.backward:
            self._compiled.learn(gathered.sights, gathered.obstacles, parts=parts)
            self.gradient_errors |= gathered.errors
            self.unchecked = False
            self._rehearsed = True
            self._processes.look()

    def _check_earlier(self, gathered: Gathered) -> None:
        """Raises MissingStatisticsError if gradients come of a forward pass in an earlier capture, too."""
        far = [name for name in gathered.wrong if name in gathered.errors]
        if far and self.pending.unfinished and not self._allow_partial_coverage:
            raise MissingStatisticsError(
                f"the gradients of {listed(far)} are more than what this capture saw, and a forward pass in an "
                "earlier capture() had no backward pass: run forward passes whose losses are added up inside one "
                "capture(), or call backward() for each in its own"
            )

    # At a step: averages and refreshes -----------------------------------------------------------------------

    def update(self, step: int) -> None:
        """Move the averages by the statistics of this step, and refresh the layers that are due.

        Args:
            step: how many steps were made before.

        Raises:
            MissingStatisticsError: naming layers that miss theirs, unless partial coverage is allowed.
            RuntimeError: on every process, if they read a weight in different ways.
        """
        layers, mine = self._layers, self.pending.statistics
        captured = self.pending.captured
        names = self._agree_on_layers(step)
        shared = [mine[n] if n in mine else layers.no_statistics(n) for n in names]
        self._processes.close()
        distributed.all_reduce_statistics(shared, self._processes)
        states = [layers.states[name] for name in names]
        move_averages(
            states, [s.averages() for s in shared], [s.examples for s in shared], self._config.factor_decay
        )
        for name, state, s in zip(names, states, shared, strict=True):
            if layers.covered[name].spec.watches_sums:
                vanished, examples = (
                    torch.as_tensor(n, device=state.vanished.device).to(state.vanished.dtype)
                    for n in (s.vanished, s.examples)
                )
                share = vanished / examples.clamp(min=1)
                state.vanished = torch.where(share.isfinite(), share, state.vanished)
        self.pending.forget()
        if not layers.covered and not layers.left:  # what left was named
            self._mistakes.uncovered(layers.fallbacks, self._config, captured=captured)
        self._stop_at_unseen(layers.idle(names))
        due = [name for name in self.due(step) if name in layers.seen]
        if due:
            pairs = [(layers.covered[name].spec, layers.states[name]) for name in due]
            distributed.refresh(pairs, self._scaling, self._processes)

    def due(self, step: int) -> list[str]:
        """Layers to refresh at this statistics step: staggered, but all of them while the statistics are young."""
        states = self._layers.states
        return [
            name
            for number, name in enumerate(self._layers.covered)
            if cadence.is_due(self._config, step, number, states[name].refreshes, self.pace)
        ]

    def keep_pace(self, step: int, device: torch.device) -> None:
        """Read the clock after an update, where a `refresh_budget` asks for it, and agree on what follows."""

        def wait() -> None:
            synchronize = getattr(getattr(torch, device.type, None), "synchronize", None)
            if synchronize is not None:
                synchronize()

        if not self._pacer.after(step, wait):
            return
        costs = [cubes(layer.spec) for layer in self._layers.covered.values()]
        paces = self._processes.all_gather(self._pacer.pace(costs, self._processes.size))
        self.pace = max((pace for pace in paces if pace is not None), default=self.pace)

    def _stop_at_unseen(self, unseen: Mapping[str, int]) -> None:
        """Stop at layers that no statistics step has seen so far.

        Raises:
            MissingStatisticsError: naming them, unless partial coverage is allowed.
        """
        lost = {name: INPUTS for name, count in unseen.items() if count >= NEVER_SEEN}
        if lost and not self._allow_partial_coverage:
            raise missing_statistics(lost, len(self._layers.covered), REMEDY)
        self._layers.leave_out(lost)

    def _agree_on_layers(self, step: int) -> list[str]:
        """The layers with statistics on some process, in one order on all.

        A process whose model did not call a layer (dropped, an expert without tokens) adds nothing to it. What one
        of them left out is left out by all.

        Raises:
            MissingStatisticsError: on every process, if one has layers and captured nothing.
            RuntimeError: on every process, if they read a weight in different ways.
        """
        layers, pending = self._layers, self.pending
        mine = {
            name: Entry(
                layer.spec,
                settled=name in pending.statistics or name in layers.seen,
                rounding=pending.statistics[name].rounding if name in pending.statistics else None,
            )
            for name, layer in layers.covered.items()
        }
        gathered = self._processes.all_gather((pending.captured or not layers.covered, mine, sorted(layers.left)))
        silent = [rank for rank, (captured, _, _) in enumerate(gathered) if not captured]
        entries = [(name, entry) for _, book, _ in gathered for name, entry in book.items()]
        if silent or (layers.covered and all(entry.rounding is None for _, entry in entries)):
            where = f" on process {silent[0]}" if silent and len(gathered) > 1 else ""
            raise self._nothing_captured(step, where)
        left = {name for _, _, names in gathered for name in names}
        layers.leave_out({name: "its statistics on another process" for name in left if name in layers.covered})
        books = [{name: entry for name, entry in book.items() if name not in left} for _, book, _ in gathered]
        common = common_layers(books)
        for spec in common.values():
            layers.take(spec)  # a raw parameter that only another process has used so far, and what all have
        # Raw parameters joined in the order of their use, which may differ; refreshes take turns in this one.
        layers.order(common)
        everywhere: dict[str, float] = {}
        for name, entry in entries:
            if name not in left and entry.rounding is not None:
                everywhere[name] = max(everywhere.get(name, 0.0), entry.rounding)
        for name, rounding in everywhere.items():
            layers.states[name].rounding = max(layers.states[name].rounding, rounding)
        return list(everywhere)

    def _nothing_captured(self, step: int, where: str) -> MissingStatisticsError:
        missed = self.pending.unfinished
        lost = f" ({str(missing_statistics(missed, len(self._layers.covered), '')).rstrip('. ')})" if missed else ""
        nothing = f"step {step} is a statistics step and nothing was captured{where}{lost}"
        if self.pending.hint:
            return MissingStatisticsError(f"{nothing}. {self.pending.hint}")
        return MissingStatisticsError(
            f"{nothing}: run the forward and the backward pass inside `with optimizer.capture():` on every step"
        )
