"""K-FAC as an optax transformation: NadamW for every parameter, a K-FAC direction for the covered ones."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.jax import capture, preconditioner
from algoperf_kfac.jax.directions import Tree, second_order
from algoperf_kfac.jax.discovery import Layers, discover
from algoperf_kfac.jax.nadamw import nadamw_directions, nesterov
from algoperf_kfac.jax.preconditioner import Blocks, LayerState
from algoperf_kfac.jax.refresh import refresh_due
from algoperf_kfac.jax.stacks import layer_states, stack_trees, stacks_of, take_apart
from algoperf_kfac.jax.statistics import Statistics
from algoperf_kfac.layers import Coverage


class KFACState(NamedTuple):
    """State of `scale_by_kfac`; a pytree of arrays alone.

    Attributes:
        steps: updates made so far, int32 ().
        mu: first moments, shapes of the parameters.
        nu: second moments, shapes of the parameters.
        stacks: statistics and preconditioners of the covered layers, layers of equal shape together under the name
            of the first of them; `layer_states` takes them apart.
        stand_ins: K-FAC directions that vanished or overflowed and were replaced by first-order ones, int32 ().
    """

    steps: Array
    mu: Tree
    nu: Tree
    stacks: dict[str, LayerState]
    stand_ins: Array


class FactorPair(NamedTuple):
    """A and B of a layer: (P, P), or (groups, P, P) for several groups; a tuple of diagonal blocks above
    `max_factor_dim` (empty where the factor is taken as the identity)."""

    A: Array | tuple[Array, ...]
    B: Array | tuple[Array, ...]


def scale_by_kfac(
    layers: Layers, config: KFACConfig, mesh: Mesh | None = None
) -> optax.GradientTransformationExtraArgs:
    """Replaces gradients by directions, without learning rate, sign and weight decay.

    Covered layers move along their K-FAC direction, by default with the length of their NadamW update; all other
    parameters take the NadamW update itself. `update` takes the keyword argument `statistics`: those of this step,
    as `value_grad_and_statistics` returns them, or None on steps without. Refreshes happen on steps with
    statistics, layers taking turns; everything that depends on the step number is decided on the device, so that
    `jit` compiles a step with and a step without statistics, once each.

    Args:
        layers: from `discover`.
        config: the configuration.
        mesh: a one-dimensional mesh whose devices share the decompositions.
    """
    beta1 = 1 - config.one_minus_beta1
    stacks = stacks_of(layers)

    def init(params: Tree) -> KFACState:
        capture.check_params(layers, params)
        states = {
            key: stack_trees(
                [preconditioner.init_layer(la.spec, la.stack, config, stack.dtype) for la in stack.layers]
            )
            for key, stack in stacks.items()
        }
        zeros = functools.partial(jax.tree.map, jnp.zeros_like)
        return KFACState(jnp.zeros((), jnp.int32), zeros(params), zeros(params), states, jnp.zeros((), jnp.int32))

    def update(
        updates: Tree,
        state: KFACState,
        params: Tree | None = None,
        *,
        statistics: Mapping[str, Statistics] | None = None,
        **extra: Any,
    ) -> tuple[Tree, KFACState]:
        del params, extra
        states = state.stacks
        if statistics is not None:
            states = move_averages(states, statistics, layers, config)
            states = refresh_due(states, stacks, state.steps, config, mesh)
        count = state.steps + 1
        mu, momenta = nesterov(updates, state.mu, count, beta1)
        nu, directions = nadamw_directions(updates, momenta, state.nu, count, config.beta2, config.eps)
        directions, states, failed = second_order(
            stacks, config, updates, momenta, directions, states, statistics is not None
        )
        return directions, KFACState(count, mu, nu, states, state.stand_ins + failed)

    return optax.GradientTransformationExtraArgs(init, update)


def kfac(
    layers: Layers,
    config: KFACConfig,
    *,
    learning_rate: float | Callable[[Array], Array] | None = None,
    weight_decay_mask: Any = None,
    mesh: Mesh | None = None,
) -> optax.GradientTransformationExtraArgs:
    """K-FAC with decoupled weight decay and learning rate: p <- p - lr (direction + weight_decay p).

    Args:
        layers: from `discover`.
        config: the configuration.
        learning_rate: a number or an optax schedule in place of the configuration's.
        weight_decay_mask: as optax.add_decayed_weights takes it.
        mesh: see `scale_by_kfac`.
    """
    rate = config.learning_rate if learning_rate is None else learning_rate
    return optax.chain(
        scale_by_kfac(layers, config, mesh),
        optax.add_decayed_weights(config.weight_decay, weight_decay_mask),
        optax.scale_by_learning_rate(rate),
    )


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
        loss_type: an AlgoPerf loss type or its name; needed for fisher="mc" and "exact".
        exclude: patterns (fnmatch) of layer or parameter names to leave to the fallback.
        schedule: an optax schedule in place of the constant learning rate.
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
        apply_fn: Callable[..., Any],
        loss_fn: Callable[..., Any],
        params: Tree,
        *args: Any,
        config: KFACConfig | None = None,
        has_aux: bool = False,
        loss_type: Any = None,
        exclude: Iterable[str] = (),
        schedule: Callable[[Array], Array] | None = None,
        weight_decay_mask: Any = None,
        mesh: Mesh | None = None,
        **hyperparameters: Any,
    ) -> None:
        defaults = {} if config is None else {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        self.config = KFACConfig.from_hyperparameters(hyperparameters, **defaults)
        self.layers = discover(apply_fn, params, *args, config=self.config, exclude=exclude)
        self.value_grad_and_statistics = capture.value_grad_and_statistics(
            apply_fn, loss_fn, self.layers, self.config, has_aux=has_aux, loss_type=loss_type
        )
        self.transformation = kfac(
            self.layers,
            self.config,
            learning_rate=schedule,
            weight_decay_mask=weight_decay_mask,
            mesh=mesh,
        )
        self.init, self.update = self.transformation

    def coverage(self) -> Coverage:
        """The covered layers, and every other parameter with the reason why it is not covered."""
        return self.layers.coverage()

    def is_statistics_step(self, step: int) -> bool:
        """Whether the update number `step`, counted from 0, takes statistics."""
        return is_statistics_step(self.config, step)

    def factors(self, state: Any, *, reduction: str = "sum") -> dict[str, FactorPair]:
        """Each covered layer's A and B from the moving averages; see `factors`."""
        return factors(state, self.layers, reduction=reduction)

    def metrics(self, state: Any) -> dict[str, float]:
        """Counts and ratios for monitoring; see `metrics`."""
        return metrics(state, self.layers)


def is_statistics_step(config: KFACConfig, step: int) -> bool:
    """Whether the update number `step`, counted from 0, takes statistics."""
    return step < config.initial_statistics or step % config.factor_interval == 0


def move_averages(
    states: Mapping[str, LayerState], statistics: Mapping[str, Statistics], layers: Layers, config: KFACConfig
) -> dict[str, LayerState]:
    """The states with their averages moved towards the statistics of one step.

    Args:
        states: by stack.
        statistics: by layer, from `value_grad_and_statistics`.
        layers: from `discover`.
        config: the configuration.

    Raises:
        ValueError: naming layers that are missing in `statistics` or unknown to K-FAC.
    """
    for name in sorted(layers.covered.keys() ^ statistics.keys()):
        what = "missing" if name in layers.covered else "of a layer that K-FAC does not know"
        raise ValueError(f"statistics of {name} are {what}: they must come from the same Layers")
    move = jax.vmap(functools.partial(preconditioner.update_statistics, decay=config.factor_decay))
    return {
        key: move(states[key], stack_trees([statistics[name] for name in stack.names]))
        for key, stack in stacks_of(layers).items()
    }


def find_state(state: Any) -> KFACState:
    """The `KFACState` inside the state of a chain.

    Raises:
        ValueError: if there is none, or more than one.
    """
    leaves = jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, KFACState))
    found = [leaf for leaf in leaves if isinstance(leaf, KFACState)]
    if len(found) != 1:
        raise ValueError(f"the optimizer state holds {len(found)} states of K-FAC, not one")
    return found[0]


def factors(state: Any, layers: Layers, *, reduction: str = "sum") -> dict[str, FactorPair]:
    """Each covered layer's A and B from the moving averages: undamped, bias-corrected.

    The product of B and A approximates the layer's block of the Gauss-Newton matrix of the summed loss,
    B = sum_n sum_r ... as in the paper (section 3.2), n over the (average) number of examples of a step; with
    reduction="mean", of the loss averaged over examples. Zero for a layer that no gradient reached yet.

    Args:
        state: of `scale_by_kfac`, `kfac`, or a chain with one of them.
        layers: from `discover`.
        reduction: "sum" or "mean".

    Raises:
        RuntimeError: before the first statistics step; inside a transformation all factors are zero then.
        ValueError: for an unknown reduction, or a state without K-FAC.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction={reduction!r}: allowed is 'sum' or 'mean'")
    pairs = {}
    states = layer_states(find_state(state).stacks, layers)
    weights = [layer.weight for layer in states.values()]
    known = not any(isinstance(weight, jax.core.Tracer) for weight in weights)
    if states and known and not any(float(weight) for weight in weights):
        raise RuntimeError("no layer has statistics yet: make a statistics step first")
    for name, covered in layers.covered.items():
        layer = states[name]
        a, b = preconditioner.corrected(layer)
        if reduction == "sum":
            examples = layer.examples / jnp.maximum(layer.weight, jnp.finfo(layer.weight.dtype).tiny)
            scale = examples[:, None, None] if examples.ndim else examples
            if covered.spec.kind == "embedding":  # B is the identity, and the whole product in A
                a = tuple(m * scale for m in a)
            else:
                b = tuple(m * scale for m in b)
        pairs[name] = FactorPair(_present(a), _present(b))
    return pairs


def metrics(state: Any, layers: Layers) -> dict[str, float]:
    """Counts and ratios for monitoring; reading them waits for the device.

    `stand_ins` counts K-FAC directions that vanished or overflowed and were replaced by first-order ones. Per
    layer: refreshes, failures, skipped refreshes, dropped statistics, drift, the graft ratio and the cosine between
    K-FAC direction and momentum, both at the last statistics step; and their totals or means over layers.

    Args:
        state: of `scale_by_kfac`, `kfac`, or a chain with one of them.
        layers: from `discover`.
    """
    inner = find_state(state)
    out = {
        "steps": float(inner.steps),
        "stand_ins": float(inner.stand_ins),
        "coverage": layers.coverage().fraction,
    }
    for key in ("refreshes", "failures", "skipped", "dropped", "drift", "graft_ratio", "cosine"):
        rows = jax.device_get({name: getattr(stacked, key) for name, stacked in inner.stacks.items()})
        values = {name: float(value) for name, value in take_apart(rows, layers).items()}
        out |= {f"{name}/{key}": value for name, value in values.items()}
        total = sum(values.values())
        if key in ("graft_ratio", "cosine") and values:
            out[key] = total / len(values)
        elif key != "drift":
            out[key] = total
    return out


def _present(blocks: Blocks) -> Array | tuple[Array, ...]:
    """One block as a matrix, without the group dimension where there is one group."""
    squeezed = [m[0] if m.shape[0] == 1 else m for m in blocks]
    return squeezed[0] if len(squeezed) == 1 else tuple(squeezed)
