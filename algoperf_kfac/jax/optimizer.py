"""K-FAC for users: the model's layers, their statistics and the optax transformation under one roof."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from jax.sharding import Mesh

from algoperf_kfac.cadence import is_statistics_step
from algoperf_kfac.config import KFACConfig
from algoperf_kfac.jax import monitoring
from algoperf_kfac.jax.capture import value_grad_and_statistics
from algoperf_kfac.jax.discovery import discover
from algoperf_kfac.jax.mistakes import Mistakes
from algoperf_kfac.jax.monitoring import FactorPair
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

    It holds nothing that changes: the state is a pytree of arrays. `init` and `update` are those of `kfac`, and
    `transformation` goes into `optax.chain`.

    Args:
        apply_fn: function of (params, *args) to the model's outputs, or to (outputs, aux) with `has_aux`.
        loss_fn: function of (outputs, *args) to the loss; see `value_grad_and_statistics`.
        params: parameters, or their shapes.
        *args: example arguments, or their shapes; the model is traced, not run.
        config: a configuration; keyword arguments override its fields.
        has_aux: see `apply_fn`.
        loss_type: see `losses.LossType`; needed for fisher="mc" and "exact".
        exclude: patterns (fnmatch) of layer or parameter names to leave to the fallback.
        schedule: an optax schedule in place of the constant learning rate; `learning_rate` may be one, too.
        weight_decay_mask: as optax.add_decayed_weights takes it.
        mesh: a one-dimensional mesh whose devices share batch and refreshes; arrays stay where the caller puts
            them, see `shard_batch`.
        **hyperparameters: fields of `KFACConfig`.

    Raises:
        TypeError: if `apply_fn` is a module instead of a function.
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
        self.layers = discover(apply_fn, params, *args, config=self.config, exclude=exclude, has_aux=has_aux)
        mistakes = Mistakes()
        self.value_grad_and_statistics = value_grad_and_statistics(
            apply_fn, loss_fn, self.layers, self.config, has_aux=has_aux, loss_type=loss_type, mistakes=mistakes
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

    def is_statistics_step(self, step: int) -> bool:
        """Whether the update number `step`, counted from 0, takes statistics; traced if `step` is."""
        return is_statistics_step(self.config, step)

    def factors(self, state: Tree, *, reduction: str = "sum") -> dict[str, FactorPair]:
        """Each covered layer's A and B from the moving averages; see `monitoring.factors`."""
        return monitoring.factors(state, self.layers, reduction=reduction)

    def metrics(self, state: Tree) -> dict[str, float]:
        """Counts and ratios for monitoring; see `monitoring.metrics`."""
        return monitoring.metrics(state, self.layers, self.config)
