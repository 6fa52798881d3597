"""K-FAC as a `torch.optim.Optimizer`: NadamW for every parameter, a K-FAC direction for the covered ones."""

from __future__ import annotations

import copy
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from algoperf_kfac import cadence
from algoperf_kfac.config import KFACConfig
from algoperf_kfac.judging import WHEN_JUDGED
from algoperf_kfac.layers import Coverage
from algoperf_kfac.positions import PositionsLike, as_candidates
from algoperf_kfac.pytorch import checkpoint, distributed, monitoring
from algoperf_kfac.pytorch.capture import Capture
from algoperf_kfac.pytorch.compiled import CompiledStatistics
from algoperf_kfac.pytorch.curvature import Curvature
from algoperf_kfac.pytorch.dealing import Dealer
from algoperf_kfac.pytorch.decay import narrowed
from algoperf_kfac.pytorch.directions import Direction, first_order, second_order
from algoperf_kfac.pytorch.discovery import check_model, check_parameter, unwrap
from algoperf_kfac.pytorch.layer_book import Layers
from algoperf_kfac.pytorch.mistakes import Mistakes
from algoperf_kfac.pytorch.monitoring import FactorPair
from algoperf_kfac.pytorch.options import Options
from algoperf_kfac.pytorch.scalings import Scaling, scaling_of
from algoperf_kfac.pytorch.stacks import Stacks
from algoperf_kfac.pytorch.statistics import Scalar


class KFAC(torch.optim.Optimizer):
    """K-FAC-expand and K-FAC-reduce (arXiv 2311.00636) for any `nn.Module`.

    ```
    optimizer = KFAC(model, approximation="reduce", learning_rate=1e-3)
    for x, y in batches:
        optimizer.zero_grad()
        with optimizer.capture():
            loss = criterion(model(x), y)
            loss.backward()
        optimizer.step()
    ```

    Covered layers (`print(optimizer.coverage())`) move along their K-FAC direction, by default with the length
    of their NadamW update (`KFACConfig.length`); all other parameters take the NadamW update itself. `capture()`
    costs nothing except on statistics steps.

    Args:
        model: the model, before or after torch.compile or DistributedDataParallel.
        params: parameters or groups to update, as for any optimizer; all trainable ones by default. Groups may
            set lr, betas, eps and weight_decay; a layer takes betas and eps from its weight's group.
        config: a configuration; keyword arguments override its fields.
        exclude: patterns of module paths to leave to the fallback, e.g. ["decoder.*"].
        output_splits: patterns of module paths -> into how many equal parts the outputs of a linear layer are cut,
            e.g. {"*.in_proj": 3} for fused query, key and value: B then has a block for each (or several, above
            max_factor_dim), while they share A.
        allow_partial_coverage: move a layer that misses its statistics to the fallback, with a warning, instead
            of stopping.
        seed: of the label draws of fisher="mc".
        process_group: processes that train the same model on parts of a batch, and share statistics and refreshes.
            Default: those of DistributedDataParallel around the model, now or at the first capture; without it
            every process is on its own.
        share_directions: whether they share the work of making directions as well, each for some of the layers: a
            step then sends as many numbers as the covered layers have parameters. Takes gradients that are averaged
            before `step()`; where a network is slow beside the products, all may be computed in each process.
        compiled_statistics: of a model that torch.compile compiled, whether statistics steps run compiled, too,
            where they can. The first one never does; `coverage()` says why others do not.
        lr: the learning rate by torch's name, for `learning_rate`.
        betas: decays of the first and second moment by torch's name, for `one_minus_beta1` and `beta2`.
        **hyperparameters: fields of `KFACConfig`; `eps` and `weight_decay` have torch's names anyway.

    Raises:
        TypeError: if it is given parameters in place of the model, or a number in place of parameters.
        ValueError: for a hyperparameter out of range or given twice, a parameter that is not the model's, or a
            model without trainable parameters.
    """

    config: KFACConfig
    scaling: Scaling
    _complete: bool
    _params: dict[str, Tensor]
    _layers: Layers
    _steps: int
    _graft: dict[str, Tensor]
    _cosine: dict[str, Tensor]
    _stand_ins: Tensor
    _seed: int
    _model: nn.Module
    _mistakes: Mistakes
    _processes: distributed.Processes
    _stacks: Stacks
    _dealer: Dealer
    _compiled: CompiledStatistics
    _curvature: Curvature

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | None = None,
        *,
        config: KFACConfig | None = None,
        exclude: Iterable[str] = (),
        output_splits: Mapping[str, int] | None = None,
        allow_partial_coverage: bool = False,
        seed: int = 0,
        process_group: ProcessGroup | None = None,
        share_directions: bool = True,
        compiled_statistics: bool = True,
        lr: float | None = None,
        betas: tuple[float, float] | None = None,
        **hyperparameters: object,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"KFAC takes the model itself, not {type(model).__name__}: KFAC(model, ...), parameters or groups "
                "of them as params=[...]"
            )
        processes = distributed.Processes.of(model, process_group)
        config = KFACConfig.updated(config, hyperparameters | _by_torch_names(lr, betas, hyperparameters))
        self._complete = False
        self.config = config
        self.scaling = scaling_of(config)
        wrapped, model = model, unwrap(model)
        check_model(model)
        names = {id(p): name for name, p in model.named_parameters()}  # the first of several
        if isinstance(params, int | float):
            raise TypeError(f"params={params!r} are no parameters: the learning rate is lr={params!r}")
        if params is None:
            params = [p for p in model.parameters() if p.requires_grad]
            if not params:
                raise ValueError("the model has no trainable parameter")
        group_defaults = {
            "lr": config.learning_rate,
            "betas": (1 - config.one_minus_beta1, config.beta2),
            "eps": config.eps,
            "weight_decay": config.weight_decay,
        }
        super().__init__(params, group_defaults)
        self._complete = True
        given = [p for group in self.param_groups for p in group["params"]]
        for p in given:
            check_parameter(p, names.get(id(p)))
        if not any(p.requires_grad for p in given):
            raise ValueError("the model has no trainable parameter")
        self._params = {names[id(p)]: p for p in given}
        self._model = model
        self._mistakes = Mistakes(model, self._params)
        self._layers = Layers(model, config, self.scaling, self._params, exclude, output_splits or {})
        self._steps = 0
        self._graft = {}
        self._cosine = {}
        self._stand_ins = torch.zeros((), device=given[0].device)
        self._seed = seed
        self._processes = processes
        self._stacks = Stacks(self.scaling)
        self._dealer = Dealer(self.scaling, processes, wanted=share_directions)
        self._compiled = CompiledStatistics(wrapped, allowed=compiled_statistics)
        self._curvature = Curvature(
            config,
            self.scaling,
            self._layers,
            processes,
            self._compiled,
            self._mistakes,
            allow_partial_coverage=allow_partial_coverage,
        )
        self._keep_entries()

    def coverage(self) -> Coverage:
        """The covered layers, and every other trainable parameter with the reason why it is not covered."""
        coverage, note = self._layers.coverage(), self._compiled.note(self._layers.covered)
        return coverage if note is None else dataclasses.replace(coverage, note=note)

    @property
    def refresh_interval(self) -> int:
        """Steps between refreshes of a layer, in force: those configured, or what a budget makes of them."""
        return self._curvature.refresh_interval

    # Statistics --------------------------------------------------------------------------------------------

    @property
    def is_statistics_step(self) -> bool:
        """Whether the coming `step()` takes statistics."""
        return cadence.is_statistics_step(self.config, self._steps)

    def capture(
        self,
        positions: PositionsLike | Mapping[str, PositionsLike] | None = None,
        loss_normalizer: Scalar | None = None,
        *,
        force: bool = False,
    ) -> Capture:
        """Context around forward and backward pass; watches them on statistics steps, else does nothing.

        Args:
            positions: which positions count and to which example they belong: "gradient" (those that the loss
                depends on, see `Positions`), a mask, a `Positions`, a list of these, of which a layer takes the
                first that fits its leading dimensions, or a mapping from patterns of layer names to any of them.
                Given for the whole model, a mask applies to the layers it fits. Of several segmentations in a
                list only one may fit a layer.
            loss_normalizer: what the summed loss is divided by before `backward` (see `Capture`), so that
                output gradients can be scaled back to the loss of single examples. Default: the number of
                examples in this capture, right for a loss that is a mean over them; give it where a mask leaves out
                whole examples. See below.
            force: take statistics on this step whatever the interval; on all processes alike.

        What to pass, with n examples (or tokens, if the loss is a mean over tokens) here and N in the whole step:

        - loss averaged over n: nothing, or n for tokens. Loss summed over n: 1.
        - gradient accumulation, a capture per micro-batch, each loss divided by N: N. (Micro-batches of one
          size in a single capture, each mean divided by their number: nothing.) With one backward pass for all
          micro-batches their targets have to be slices of one tensor.
        - DistributedDataParallel, each of W processes calling backward on its own mean: nothing, as on one
          process; DDP averages parameter gradients only, and output gradients never leave the process.
        - AlgoPerf's convention, loss = all_reduce(summed) / all_reduce(n_valid) with the all_reduce of
          torch.distributed.nn: N / W, because the backward pass of that all_reduce sums the gradients of the
          W processes and so multiplies them by W (which DDP's averaging undoes for parameters alone).
        - a GradScaler: the above, divided by scaler.get_scale().
        """
        options = self._options(active=bool(force or self.is_statistics_step), positions=positions)
        layers = self._layers
        # What joins this process to others shows in an uncompiled step alone.
        if options.active and not options.checks and not self._processes.may_join:
            taps = self._compiled.taps(
                layers.covered,
                options.positions,
                self.config.row_limit,
                layers.sequence_first,
                functools.partial(layers.recorder, one_pass=True, checks=False),
            )
            options = dataclasses.replace(options, taps=taps)
        return Capture(layers, self._curvature.take, options, loss_normalizer)

    @property
    def wants_rehearsal(self) -> bool:
        """Whether the coming `step()` is the statistics step of a compiled model that would run uncompiled."""
        empirical = self.config.fisher == "empirical"  # others run uncompiled throughout
        unchecked = self._curvature.unchecked
        return empirical and self.is_statistics_step and self._compiled.wants_rehearsal(unchecked=unchecked)

    def rehearsal(
        self, positions: PositionsLike | Mapping[str, PositionsLike] | None = None, *, parts: int = 1
    ) -> Capture:
        """Context around a forward and backward pass that shows how a compiled model applies its layers.

        The first statistics step of a compiled model runs uncompiled, and so needs the memory of an uncompiled
        step. After a rehearsal on a part of a batch it runs compiled, as all others; see `wants_rehearsal`. Nothing
        else is taken from the pass: clear its gradients.

        Args:
            positions: as in `capture`, of the part.
            parts: how many of it a batch has.

        Raises:
            ValueError: if that is no whole number from 1 on.
        """
        if not isinstance(parts, int) or parts < 1:
            raise ValueError(f"parts={parts!r}: allowed is a whole number from 1 on")
        options = self._options(active=True, positions=positions)
        return Capture(self._layers, functools.partial(self._curvature.learn, parts=parts), options)

    def _options(self, *, active: bool, positions: PositionsLike | Mapping[str, PositionsLike] | None) -> Options:
        """Of a capture that runs uncompiled."""
        if active:
            self._compiled.check()
        curvature, step = self._curvature, self._steps
        number = curvature.before_capture(draws=active and self.config.fisher == "mc")
        return Options(
            self.config,
            active,
            as_candidates(positions),
            lambda: distributed.generator_for(self._seed, step, number, self._stand_ins.device, self._processes),
            active and curvature.unchecked and self.config.fisher == "empirical",
            curvature.before_backward,
            curvature.after_backward,
            functools.partial(curvature.meet, params=self._params),
            curvature.pending,
        )

    def check(self) -> None:
        """Compare, at the next capture, what is captured of each layer with its weight's gradient.

        The sum of output gradients times inputs, G^T A, is the gradient of a weight whose uses are all recorded. A
        layer that falls short of it takes the fallback, with a warning. This is done at the first statistics step
        anyway; `metrics()` gives the relative errors as "<layer>/gradient_error".
        """
        self._curvature.unchecked = True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, and the statistics captured with them."""
        super().zero_grad(set_to_none)
        self._curvature.pending.forget()

    def factors(self, *, reduction: str = "sum") -> dict[str, FactorPair]:
        """Each covered layer's A and B from the moving averages: undamped, bias-corrected.

        The product of B and A approximates the layer's block of the Gauss-Newton matrix of the summed loss,
        B = sum_n sum_r ... as in the paper (section 3.2), n over the (average) number of examples of a step;
        with reduction="mean", of the loss averaged over examples. Zero for a layer that no gradient reached yet.

        Raises:
            RuntimeError: before the first statistics step.
            ValueError: for an unknown reduction.
        """
        return monitoring.factors(self._layers, reduction)

    # The update --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one update. A closure runs inside `capture()`, with gradients enabled; its loss is returned."""
        loss = None
        self._curvature.pending.check_outside()
        if closure is not None:
            with torch.enable_grad(), self.capture():
                loss = closure()
        # Where a function around it is compiled, this runs as it is: it depends on step numbers throughout.
        disable = getattr(torch.compiler, "disable", None) if "torch._dynamo" in sys.modules else None
        update = self._update if disable is None else disable(self._update)
        update()
        return loss

    def _update(self) -> None:
        self._mistakes.gradient_at_step(self._processes.strangers)
        for name, layer in self._layers.covered.items():
            self._layers.states[name].move(layer.factor_dtype, layer.weight.device)
        if self._curvature.pending.statistics or self.is_statistics_step:
            self._curvature.update(self._steps)
        plain = self._without_second_moment()
        directions = first_order(self.param_groups, self.state, plain)
        self._second_order(directions, plain)
        for group in self.param_groups:
            params = [p for p in group["params"] if id(p) in directions]
            if not params:
                continue
            lr = group["lr"].item() if isinstance(group["lr"], Tensor) else group["lr"]
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            steps = [directions[id(p)].step.to(p.dtype) for p in params]
            torch._foreach_add_(params, steps, alpha=-lr)
        self._curvature.keep_pace(self._steps, self._stand_ins.device)
        self._steps += 1
        self._curvature.pending.forget()

    def _without_second_moment(self) -> set[int]:
        """Identities of the parameters whose NadamW direction nothing needs: covered ones, without grafting.

        What layers have only parts of is not among them.
        """
        if self.config.length_rule == "graft":
            return set()
        partly = {id(self._params[f.name]) for f in self._layers.fallbacks}
        return {id(p) for layer in self._layers.covered.values() for p in layer.params} - partly

    def _second_order(self, directions: dict[int, Direction], plain: set[int]) -> None:
        """Replace the directions of covered layers by their K-FAC directions."""
        beta2s = {id(p): group["betas"][1] for group in self.param_groups for p in group["params"]}
        outcome = second_order(
            directions,
            self._layers.covered,
            self._layers.states,
            beta2s,
            plain,
            self._stacks,
            self._dealer,
            monitor=self.is_statistics_step,
        )
        self._stand_ins += outcome.stand_ins
        grafted = self.config.length_rule == "graft"
        if grafted and self._steps in WHEN_JUDGED:
            self._mistakes.directions(outcome.ratios)
        if self.is_statistics_step and outcome.cosines:
            self._cosine = outcome.cosines
            if grafted:
                self._graft = outcome.ratios

    # Monitoring --------------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """Counts and ratios for monitoring; reading them synchronises with the device.

        `stand_ins` counts K-FAC directions that vanished or overflowed and were replaced by first-order ones (the
        momentum, where no NadamW update is made: at its length for length="none", at the rule's for "rms").
        `refresh_interval` is the one in force, which a `refresh_budget` may have stretched.
        Per layer: refreshes, failures, skipped refreshes, dropped statistics, drift, the eigenvalues of A and B on
        the level of rounding ("noise", see `KFACConfig.noise_level`), the share of its outputs for which the
        identity stands for B ("vanished", with approximation="mixed"; of all, how many layers these are), the graft
        ratio and the cosine between K-FAC direction and momentum gradient, both at the last statistics step; and
        their totals or means over layers.
        """
        run = {
            "steps": float(self._steps),
            "stand_ins": float(self._stand_ins),
            "refresh_interval": float(self.refresh_interval),
        }
        judged = {"graft_ratio": self._graft, "cosine": self._cosine}
        return run | monitoring.metrics(self._layers, self.config, judged, self._curvature.gradient_errors)

    def summary(self, worst: int = 8) -> str:
        """A table of the layers whose directions are the most doubtful, for a person to read.

        By layer: the graft ratio (the length of NadamW's step over that of K-FAC's: far below 1 where factors are
        all but singular), the cosine between K-FAC direction and momentum, the share of eigenvalues of A and B that
        are hardly more than damping, refreshes, statistics steps in a row that went by without the layer, and how
        many eigenvalues of A and B are on the level of rounding.

        Args:
            worst: number of layers, those with the smallest graft ratio first.
        """
        return monitoring.summary(self._layers, self.config, self._graft, self._cosine, worst)

    # State -------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take further parameters of the model: their layers start as new, all others go on bit for bit.

        Parameters that the model no longer has (`model.head = nn.Linear(...)`) are let go. Where the optimizer has
        names with its parameters (torch 2.6 and later), new ones come as pairs (name, parameter), too.

        Raises:
            ValueError: if a parameter does not belong to the model, or cannot be trained.
        """
        if not self._complete:  # called by the constructor
            super().add_param_group(param_group)
            return
        given = param_group["params"]
        if not isinstance(given, Tensor | set):  # a set has no order, and torch says so
            given = list(given)
        names = {id(p): name for name, p in self._model.named_parameters()}
        params = [p[1] if isinstance(p, tuple) else p for p in ([given] if isinstance(given, Tensor) else given)]
        for p in params:
            check_parameter(p, names.get(id(p)))
        super().add_param_group({**param_group, "params": given})
        order = list(self._layers.covered)
        self._let_go({name: p for name, p in self._params.items() if id(p) not in names})
        self._params |= {names[id(p)]: p for p in params}
        self._mistakes.take(self._params)
        self._layers.extend(self._model, self._params)
        # A layer in the place of another has its turn, so that the others keep theirs.
        self._layers.order(name for name in order if name in self._layers.covered)
        self._curvature.unchecked = True
        self._compiled.forget()
        self._keep_entries()

    def _let_go(self, gone: Mapping[str, Tensor]) -> None:
        """Train these parameters no longer; their groups stay, if empty."""
        if not gone:
            return
        self._curvature.pending.forget()
        self._layers.let_go(gone)
        identities = {id(p) for p in gone.values()}
        for group in self.param_groups:
            group |= narrowed(group, {id(p) for p in group["params"]} - identities)
        for name, p in gone.items():
            self.state.pop(p, None)
            del self._params[name]

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue bit for bit; loadable with torch.load(weights_only=True).

        With a `refresh_budget` the pace is in it that the clock set; a run that is resumed before the clock is read
        the last time may come to another one there.

        K-FAC's part stands in the entry "kfac", and once more, as tensors, beside the moments of a parameter:
        torch.distributed.checkpoint passes on what belongs to parameters, and drops everything else.
        """
        state = super().state_dict()
        state["state"] = {
            number: {key: value for key, value in moments.items() if value is not None}
            for number, moments in state["state"].items()
        }
        state["kfac"] = checkpoint.to_dict(
            [layer.spec for layer in self._layers.covered.values()],
            self._layers.states,
            self._layers.fallbacks,
            self.config,
            steps=self._steps,
            seed=self._seed,
            missed=dict(self._layers.missed),
            stand_ins=self._stand_ins,
            gradient_errors=dict(self._curvature.gradient_errors),
            missed_steps=dict(self._layers.missed_steps),
            **({} if self.config.refresh_budget is None else {"pace": self._curvature.pace}),
            sights=self._compiled.saved(self._layers.covered),
        )
        number, _ = self._first_trained()
        state["state"][number]["kfac"] = checkpoint.to_tensors(state["kfac"], self._stand_ins)
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict` of the same model and configuration.

        One of another `length` loads, too: second moments that are not needed any more are dropped, those that were
        not kept begin with the momentum.

        Raises:
            ValueError: naming the layer or parameter that does not fit.
        """
        kfac, rest = checkpoint.take_apart(state_dict)
        specs = {name: layer.spec for name, layer in self._layers.covered.items()}
        checkpoint.check(kfac, self.scaling, specs, {name: tuple(p.shape) for name, p in self._params.items()})
        # A copy, so that the optimizer that gave the state may go on.
        super().load_state_dict(copy.deepcopy(rest))
        layers = self._layers
        layers.restore(checkpoint.specs_of(kfac), checkpoint.fallbacks_of(kfac), kfac["missed"])
        for name, zeros in list(layers.states.items()):
            layers.states[name] = checkpoint.layer_state(kfac, name, zeros, self.scaling)
        layers.missed_steps = dict(kfac.get("missed_steps", {}))  # version 0.1.0 had none, nor gradient errors
        layers.seen = {name for name, state in layers.states.items() if float(state.weight)}
        self._steps = kfac["steps"]
        self._stand_ins.copy_(kfac["stand_ins"])
        self._seed = checkpoint.seed_of(kfac)
        self._compiled.restore(kfac.get("sights", {}))  # version 0.1.0 had none
        self._processes.reopen()
        self._curvature.restore(
            pace=kfac.get("pace", 1),  # of a run without a budget
            unchecked=self._steps == 0,
            gradient_errors=kfac.get("gradient_errors", {}),
        )
        self._keep_entries()
        plain = self._without_second_moment()
        for p in self._params.values():
            if id(p) in plain:
                self.state[p]["exp_avg_sq"] = None

    def _keep_entries(self) -> None:
        """An entry for every parameter, if an empty one: where there is none at all,
        torch.distributed.checkpoint makes a step of its own to have some. Of a state it has flattened it loads the
        names that stand there."""
        for group in self.param_groups:
            for p in group["params"]:
                moments = self.state[p]
                moments.setdefault("step", 0)
                moments.setdefault("exp_avg", None)
                moments.setdefault("exp_avg_sq", None)
        self.state[self._first_trained()[1]].setdefault("kfac", None)

    def _first_trained(self) -> tuple[int, Tensor]:
        """The first parameter that is not frozen, the only ones whose state torch.distributed.checkpoint passes on,
        and its number."""
        params = [p for group in self.param_groups for p in group["params"]]
        return next(((number, p) for number, p in enumerate(params) if p.requires_grad), (0, params[0]))

    def __getstate__(self) -> dict[str, Any]:
        """For deepcopy and pickle, together with the model: torch's own, and the attributes declared above."""
        return {**super().__getstate__(), **{name: getattr(self, name) for name in KFAC.__annotations__}}


def _by_torch_names(
    lr: float | None, betas: tuple[float, float] | None, hyperparameters: Mapping[str, object]
) -> dict[str, object]:
    """`lr` and `betas` as fields of `KFACConfig`.

    Raises:
        ValueError: if one of them is given by both names.
    """
    fields: dict[str, object] = {}
    if lr is not None:
        fields["learning_rate"] = lr
    if betas is not None:
        if len(betas) != 2:
            raise ValueError(f"betas={betas!r}: allowed are two numbers in [0, 1)")
        fields |= {"one_minus_beta1": 1 - betas[0], "beta2": betas[1]}
    for name in fields.keys() & hyperparameters.keys():
        torch_name = "lr" if name == "learning_rate" else "betas"
        raise ValueError(f"hyperparameter {name} is given twice, as {torch_name}, too: leave one of them out")
    return fields
