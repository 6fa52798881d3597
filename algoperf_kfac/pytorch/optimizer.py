"""K-FAC as a `torch.optim.Optimizer`: NadamW for every parameter, a K-FAC direction for the covered ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from algoperf_kfac import cadence
from algoperf_kfac.config import TABLE, KFACConfig
from algoperf_kfac.errors import MissingStatisticsError, check_reduction, missing_statistics, no_statistics
from algoperf_kfac.layers import Coverage
from algoperf_kfac.positions import PositionsLike, as_candidates
from algoperf_kfac.pytorch import checkpoint, distributed
from algoperf_kfac.pytorch.capture import Capture, Gathered, Options
from algoperf_kfac.pytorch.directions import Direction, first_order, second_order
from algoperf_kfac.pytorch.discovery import unwrap
from algoperf_kfac.pytorch.layer_book import Layers
from algoperf_kfac.pytorch.scalings import Scaling, scaling_of
from algoperf_kfac.pytorch.statistics import Scalar, Statistics


class FactorPair(NamedTuple):
    """A and B of a layer: (P, P), or (groups, P, P) for grouped convolutions; a tuple of diagonal blocks above
    `max_factor_dim` (empty where the factor is taken as the identity)."""

    A: Tensor | tuple[Tensor, ...]
    B: Tensor | tuple[Tensor, ...]


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
    of their NadamW update; all other parameters take the NadamW update itself. `capture()` costs nothing except
    on statistics steps.

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
        lr: the learning rate by torch's name, for `learning_rate`.
        betas: decays of the first and second moment by torch's name, for `one_minus_beta1` and `beta2`.
        **hyperparameters: fields of `KFACConfig`; `eps` and `weight_decay` have torch's names anyway.

    Raises:
        TypeError: if it is given parameters in place of the model.
        ValueError: for a hyperparameter out of range or given twice, a parameter that is not the model's, or a
            model without trainable parameters.
    """

    config: KFACConfig
    scaling: Scaling
    _complete: bool
    _params: dict[str, Tensor]
    _allow_partial_coverage: bool
    _layers: Layers
    _steps: int
    _pending: dict[str, Statistics]
    _graft: dict[str, Tensor]
    _cosine: dict[str, Tensor]
    _stand_ins: Tensor
    _seed: int
    _captures: int

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
        lr: float | None = None,
        betas: tuple[float, float] | None = None,
        **hyperparameters: object,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"KFAC takes the model itself, not {type(model).__name__}: KFAC(model, ...), parameters or groups "
                "of them as params=[...]"
            )
        config = KFACConfig.updated(config, hyperparameters | _by_torch_names(lr, betas, hyperparameters))
        self.config = config
        self.scaling = scaling_of(config)
        self._complete = False
        model = unwrap(model)
        names = {id(p): name for name, p in model.named_parameters()}  # the first of several
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
        trainable = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        for p in trainable:
            if id(p) not in names:
                raise ValueError(f"a parameter of shape {tuple(p.shape)} in params does not belong to the model")
        if not trainable:
            raise ValueError("the model has no trainable parameter")
        self._params = {names[id(p)]: p for p in trainable}
        self._allow_partial_coverage = allow_partial_coverage
        self._layers = Layers(model, config, self.scaling, self._params, exclude, output_splits or {})
        self._steps = 0
        self._pending: dict[str, Statistics] = {}
        self._graft: dict[str, Tensor] = {}
        self._cosine: dict[str, Tensor] = {}
        self._stand_ins = torch.zeros((), device=trainable[0].device)
        self._seed = seed
        self._captures = 0  # of the coming step

    def coverage(self) -> Coverage:
        """The covered layers, and every other trainable parameter with the reason why it is not covered."""
        return self._layers.coverage()

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

        - loss averaged over n: nothing, or n for tokens.
        - gradient accumulation, a capture per micro-batch, each loss divided by N: N. (Micro-batches of one
          size in a single capture, each mean divided by their number: nothing.)
        - DistributedDataParallel, each of W processes calling backward on its own mean: nothing, as on one
          process; DDP averages parameter gradients only, and output gradients never leave the process.
        - AlgoPerf's convention, loss = all_reduce(summed) / all_reduce(n_valid) with the all_reduce of
          torch.distributed.nn: N / W, because the backward pass of that all_reduce sums the gradients of the
          W processes and so multiplies them by W (which DDP's averaging undoes for parameters alone).
        - a GradScaler: the above, divided by scaler.get_scale().
        """
        active = bool(force or self.is_statistics_step)
        generator = None
        if active and self.config.fisher == "mc":
            device = self._stand_ins.device
            generator = distributed.generator_for(self._seed, self._steps, self._captures, device)
            self._captures += 1
        options = Options(self.config, active, as_candidates(positions), generator)
        return Capture(self._layers, self._finish_capture, options, loss_normalizer)

    def _finish_capture(self, gathered: Gathered) -> None:
        layers, missing = self._layers, gathered.missing
        if missing and not self._allow_partial_coverage:
            remedy = (
                "Run the forward and the backward pass inside capture(), leave unused layers out with "
                "exclude=[...], or pass allow_partial_coverage=True to move them to the fallback"
            )
            raise missing_statistics(missing, len(layers.covered), remedy)
        for name, what in missing.items():
            layers.leave_out(name, what)
        for name, operation in gathered.also_read.items():
            layers.give_up(name, operation)
        for name in (*missing, *gathered.also_read):
            self._pending.pop(name, None)
        for name, new in gathered.statistics.items():
            if name in self._pending:
                self._pending[name].add(new)
            else:
                self._pending[name] = new

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, and the statistics captured with them."""
        super().zero_grad(set_to_none)
        self._pending.clear()

    def _update_statistics(self) -> None:
        if not self._pending and not self.is_statistics_step:
            return
        names = self._agree_on_layers()
        covered, states = self._layers.covered, self._layers.states
        distributed.all_reduce_statistics([self._pending[name] for name in names])
        for name in names:
            s = self._pending[name]
            a, b = s.averages()
            states[name].update(a, b, s.examples, self.config.factor_decay)
        self._pending.clear()
        due = self._due()
        if due:
            distributed.refresh([(covered[name].spec, states[name]) for name in due], self.scaling)

    def _agree_on_layers(self) -> list[str]:
        """The layers with statistics on every process, in one order; the others are left out everywhere.

        Raises:
            MissingStatisticsError: on every process, if one has layers and captured nothing.
        """
        layers = self._layers
        mine = [name for name in layers.covered if name in self._pending]
        gathered = distributed.all_gather(None if layers.covered and not mine else mine)
        silent = [rank for rank, names in enumerate(gathered) if names is None]
        if silent:
            where = f" on process {silent[0]}" if len(gathered) > 1 else ""
            raise MissingStatisticsError(
                f"step {self._steps} is a statistics step and nothing was captured{where}: run the forward and "
                "the backward pass inside `with optimizer.capture():` on every step"
            )
        everywhere = set.intersection(*(set(names or ()) for names in gathered))
        for name in mine:
            if name not in everywhere:
                layers.leave_out(name, "its statistics on another process")
        names = [name for name in gathered[0] or () if name in everywhere]
        # Raw parameters joined in the order of their use, which may differ; refreshes take turns in this one.
        layers.order(names)
        return names

    def _due(self) -> list[str]:
        """Layers to refresh at this statistics step: staggered, but all of them while the statistics are young."""
        states = self._layers.states
        return [
            name
            for number, name in enumerate(self._layers.covered)
            if cadence.is_due(self.config, self._steps, number, states[name].refreshes)
        ]

    def factors(self, *, reduction: str = "sum") -> dict[str, FactorPair]:
        """Each covered layer's A and B from the moving averages: undamped, bias-corrected.

        The product of B and A approximates the layer's block of the Gauss-Newton matrix of the summed loss,
        B = sum_n sum_r ... as in the paper (section 3.2), n over the (average) number of examples of a step;
        with reduction="mean", of the loss averaged over examples. Zero for a layer that no gradient reached yet.

        Raises:
            RuntimeError: before the first statistics step.
            ValueError: for an unknown reduction.
        """
        check_reduction(reduction)
        states = self._layers.states
        if states and not any(float(state.weight) for state in states.values()):
            raise no_statistics()
        pairs = {}
        for name, state in states.items():
            a, b = state.corrected()
            if reduction == "sum":
                examples = state.examples / state.weight.clamp(min=torch.finfo(state.weight.dtype).tiny)
                if self._layers.covered[name].spec.kind == TABLE:  # one factor for both
                    a = [m * examples for m in a]
                b = [m * examples for m in b]
            pairs[name] = FactorPair(_present(a), _present(b))
        return pairs

    # The update --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one update. A closure runs inside `capture()`, with gradients enabled; its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad(), self.capture():
                loss = closure()
        self._update_statistics()
        directions = first_order(self.param_groups, self.state, self._without_second_moment())
        self._second_order(directions)
        for group in self.param_groups:
            params = [p for p in group["params"] if id(p) in directions]
            if not params:
                continue
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            steps = [directions[id(p)].step.to(p.dtype) for p in params]
            torch._foreach_add_(params, steps, alpha=-group["lr"])
        self._steps += 1
        self._captures = 0
        return loss

    def _without_second_moment(self) -> set[int]:
        """Identities of the parameters whose NadamW direction nothing needs: covered ones, without grafting."""
        if self.config.grafting:
            return set()
        return {id(p) for layer in self._layers.covered.values() for p in layer.params}

    def _second_order(self, directions: dict[int, Direction]) -> None:
        """Replace the directions of covered layers by their K-FAC directions."""
        beta2s = {id(p): group["betas"][1] for group in self.param_groups for p in group["params"]}
        outcome = second_order(
            directions,
            self._layers.covered,
            self._layers.states,
            beta2s,
            self.scaling,
            monitor=self.is_statistics_step,
        )
        self._stand_ins += outcome.stand_ins
        if self.is_statistics_step and outcome.cosines:
            self._cosine = outcome.cosines
            if self.config.grafting:
                self._graft = outcome.ratios

    # Monitoring --------------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """Counts and ratios for monitoring; reading them synchronises with the device.

        `stand_ins` counts K-FAC directions that vanished or overflowed and were replaced by first-order ones.
        Per layer: refreshes, failures, skipped refreshes, dropped statistics, drift, the graft ratio
        and the cosine between K-FAC direction and momentum gradient, both at the last statistics step; and
        their totals or means over layers.
        """
        states = self._layers.states
        out: dict[str, float] = {
            "steps": float(self._steps),
            "coverage": self.coverage().fraction,
            "missed_layers": float(len(self._layers.missed)),
        }
        for key in ("refreshes", "failures", "skipped"):
            out[key] = float(sum(getattr(state, key) for state in states.values()))
        out["stand_ins"] = float(self._stand_ins)
        out["dropped"] = sum(float(state.dropped) for state in states.values())
        for key, values in (("graft_ratio", self._graft), ("cosine", self._cosine)):
            numbers = {name: float(value) for name, value in values.items() if name in states}
            if numbers:
                out[key] = sum(numbers.values()) / len(numbers)
            out |= {f"{name}/{key}": number for name, number in numbers.items()}
        for name, state in states.items():
            for key in ("refreshes", "failures", "skipped", "drift"):
                out[f"{name}/{key}"] = float(getattr(state, key))
            out[f"{name}/dropped"] = float(state.dropped)
        return out

    # State -------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused after construction: the layers of new parameters would not be known.

        Raises:
            RuntimeError: always, once the optimizer exists.
        """
        if getattr(self, "_complete", False):
            raise RuntimeError(
                "KFAC cannot take further parameter groups: make a new KFAC over the whole model, with all "
                "groups in params=[...], and load the old state_dict into it"
            )
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue bit for bit; loadable with torch.load(weights_only=True)."""
        state = super().state_dict()
        state["kfac"] = checkpoint.to_dict(
            [layer.spec for layer in self._layers.covered.values()],
            self._layers.states,
            self._layers.fallbacks,
            self.config,
            steps=self._steps,
            seed=self._seed,
            missed=dict(self._layers.missed),
            stand_ins=self._stand_ins,
        )
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict` of the same model and configuration.

        Raises:
            ValueError: naming the layer or parameter that does not fit.
        """
        if "kfac" not in state_dict:
            raise ValueError("this state_dict is not KFAC's: it has no entry 'kfac'")
        kfac = state_dict["kfac"]
        specs = {name: layer.spec for name, layer in self._layers.covered.items()}
        checkpoint.check(kfac, self.config, specs, {name: tuple(p.shape) for name, p in self._params.items()})
        # A copy, so that the optimizer that gave the state may go on.
        super().load_state_dict(copy.deepcopy({k: v for k, v in state_dict.items() if k != "kfac"}))
        self._layers.restore(checkpoint.specs_of(kfac), checkpoint.fallbacks_of(kfac), kfac["missed"])
        states = self._layers.states
        for name, zeros in list(states.items()):
            states[name] = checkpoint.layer_state(kfac, name, zeros, self.scaling)
        self._steps = kfac["steps"]
        self._stand_ins.copy_(kfac["stand_ins"])
        self._seed = checkpoint.seed_of(kfac)
        self._captures = 0
        self._pending.clear()

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


def _present(blocks: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
    """One block as a matrix, without the group dimension where there is one group."""
    squeezed = [m[0] if len(m) == 1 else m for m in blocks]
    return squeezed[0] if len(squeezed) == 1 else tuple(squeezed)
