"""K-FAC for users: the model's layers, their statistics and the optax transformation under one roof."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

from jax.sharding import Mesh

from algoperf_kfac.cadence import is_statistics_step
from algoperf_kfac.config import KFACConfig
from algoperf_kfac.jax import monitoring
from algoperf_kfac.jax.capture import check_gradients, idle_layers, value_grad_and_statistics
from algoperf_kfac.jax.checks import in_short
from algoperf_kfac.jax.discovery import discover
from algoperf_kfac.jax.monitoring import FactorPair
from algoperf_kfac.jax.pacing import Pacing
from algoperf_kfac.jax.tracing import check_takes
from algoperf_kfac.jax.transform import Mask, Schedule, kfac
from algoperf_kfac.jax.types import ApplyFn, LossFn, LossTypeLike, Tree
from algoperf_kfac.layers import Coverage


class KFAC:
    """K-FAC-expand and K-FAC-reduce (arXiv 2311.00636) for any function of parameters.

    ```
    optimizer = KFAC(apply_fn, loss_fn, params, x, y, approximation="reduce", learning_rate=1e-3)
    state = optimizer.init(params)

    @jax.jit
    def plain(params, state, x, y):
        loss, gradient = jax.value_and_grad(lambda p: loss_fn(apply_fn(p, x, y), x, y))(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    @jax.jit
    def with_statistics(params, state, x, y):
        loss, gradient, statistics = optimizer.value_grad_and_statistics(params, x, y)
        updates, state = optimizer.update(gradient, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state, loss

    for step, (x, y) in enumerate(batches):
        run = with_statistics if optimizer.is_statistics_step(step) else plain
        params, state, loss = run(params, state, x, y)
    ```

    It holds nothing that changes but what it said and what `check` found: the state is a pytree of arrays. `init`
    and `update` are those of `kfac`, and `transformation` goes into `optax.chain`.

    Args:
        apply_fn: function of (params, *args) to the model's outputs, or to (outputs, aux) with `has_aux`.
        loss_fn: function of (outputs, *args) to the loss; see `value_grad_and_statistics`.
        params: parameters, or their shapes.
        *args: example arguments, or their shapes; the model is traced, not run.
        config: a configuration; keyword arguments override its fields.
        has_aux: see `apply_fn`.
        loss_type: see `losses.LossType`; needed for fisher="mc" and "exact".
        class_dim: dimension of the outputs over classes, for these; 1 for (N, C, H, W).
        exclude: patterns (fnmatch) of layer or parameter names to leave to the fallback.
        schedule: an optax schedule in place of the constant learning rate; `learning_rate` may be one, too.
        weight_decay_mask: as optax.add_decayed_weights takes it.
        mesh: a one-dimensional mesh whose devices share batch, refreshes and directions; arrays stay where the
            caller puts them, see `shard_batch`.
        **hyperparameters: fields of `KFACConfig`.

    Raises:
        TypeError: if `apply_fn` is a module instead of a function, or one of both functions takes other arguments.
        ValueError: for a hyperparameter out of range or parameters of mixed precision.
    """

    def __init__(
        self,
        apply_fn: ApplyFn,
        loss_fn: LossFn,
        params: Tree,
        *args: Tree,
        config: KFACConfig | None = None,
        has_aux: bool = False,
        loss_type: LossTypeLike | None = None,
        class_dim: int = -1,
        exclude: str | Iterable[str] = (),
        schedule: Schedule | None = None,
        weight_decay_mask: Mask = None,
        mesh: Mesh | None = None,
        **hyperparameters: object,
    ) -> None:
        if callable(hyperparameters.get("learning_rate")):
            if schedule is not None:
                raise ValueError("learning_rate is a schedule and schedule= another: give one of them")
            schedule = cast("Schedule", hyperparameters.pop("learning_rate"))
        self.config = KFACConfig.updated(config, hyperparameters)
        check_takes("loss_fn(outputs, *args)", loss_fn, len(args))
        self.layers = discover(apply_fn, params, *args, config=self.config, exclude=exclude, has_aux=has_aux)
        self._apply_fn, self._loss_fn, self._has_aux = apply_fn, loss_fn, has_aux
        self._mesh = mesh
        self._mistakes = mistakes = self.layers.mistakes
        self.value_grad_and_statistics = value_grad_and_statistics(
            apply_fn,
            loss_fn,
            self.layers,
            self.config,
            has_aux=has_aux,
            loss_type=loss_type,
            class_dim=class_dim,
            mistakes=mistakes,
        )
        self.transformation = kfac(
            self.layers,
            self.config,
            learning_rate=schedule,
            weight_decay_mask=weight_decay_mask,
            mesh=mesh,
            mistakes=mistakes,
        )
        self.init, self.update = self.transformation

    def coverage(self) -> Coverage:
        """The covered layers, and every other parameter with the reason why it is not covered."""
        return self.layers.coverage()

    def idle(self, params: Tree, *args: Tree) -> tuple[str, ...]:
        """The covered layers that the model does not call with these arguments: for `update(..., idle=...)`.

        The model is traced, not run. Statistics know it by themselves; on other steps a layer without gradient
        would go on along its momentum.
        """
        return idle_layers(self._apply_fn, self.layers, params, *args, has_aux=self._has_aux)

    def check(self, params: Tree, *args: Tree) -> dict[str, float]:
        """Compare what is captured of each layer with its weight's gradient, on one batch.

        The sum of output gradients times inputs, G^T A, is the gradient of a weight whose uses are all recorded. A
        layer that falls short of it is named by a warning. To be called outside of jit. Where
        `value_grad_and_statistics` runs outside of jit it does this at its first step anyway; `metrics` gives the
        relative errors as "<layer>/gradient_error".

        Returns:
            By layer, the relative error.
        """
        compared = check_gradients(self._apply_fn, self._loss_fn, self.layers, params, *args, has_aux=self._has_aux)
        errors, wrong = in_short(compared)
        self._mistakes.gradients(errors, wrong)
        return errors

    def is_statistics_step(self, step: int) -> bool:
        """Whether the update number `step`, counted from 0, takes statistics; traced if `step` is."""
        return is_statistics_step(self.config, step)

    def pacing(self) -> Pacing:
        """What goes into the loop for a `refresh_budget`: `state = pacing(state, step)` after each update."""
        return Pacing(self.layers, self.config, self._mesh)

    def factors(self, state: Tree, *, reduction: str = "sum") -> dict[str, FactorPair]:
        """Each covered layer's A and B from the moving averages; see `monitoring.factors`."""
        return monitoring.factors(state, self.layers, reduction=reduction)

    def metrics(self, state: Tree) -> dict[str, float]:
        """Counts and ratios for monitoring; see `monitoring.metrics`.

        "<layer>/gradient_error" is there for layers whose gradient was compared (`check`).
        """
        out = monitoring.metrics(state, self.layers, self.config)
        self._judge(out)
        return out | {f"{name}/gradient_error": error for name, error in self._mistakes.errors.items()}

    def summary(self, state: Tree, worst: int = 8) -> str:
        """A table of the layers whose directions are the most doubtful, for a person to read.

        By layer: the graft ratio (the length of NadamW's step over that of K-FAC's: far below 1 where factors are
        all but singular), the cosine between K-FAC direction and momentum, the share of eigenvalues of A and B that
        are hardly more than damping, refreshes, and statistics steps in a row that went by without the layer. It
        waits for the device, and decomposes the factors of the layers it shows.

        Args:
            state: of `init` and `update`.
            worst: number of layers, those with the smallest graft ratio first.
        """
        self._judge(monitoring.metrics(state, self.layers, self.config))
        return monitoring.summary(state, self.layers, self.config, worst)

    def _judge(self, metrics: Mapping[str, float]) -> None:
        """Say, once, if most directions are noise."""
        if self.config.length_rule == "graft":
            ratios = {
                name: metrics[f"{name}/graft_ratio"]
                for name in self.layers.covered
                if f"{name}/graft_ratio" in metrics
            }
            self._mistakes.directions(metrics["steps"], ratios)
