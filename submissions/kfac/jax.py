"""AlgoPerf's API around `algoperf_kfac.jax`, for one approximation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.serialization import from_state_dict, to_state_dict

from algoperf_kfac.cadence import is_statistics_step
from algoperf_kfac.config import KFACConfig
from algoperf_kfac.jax import KFACState, Layers, Positions, discover, scale_by_kfac, value_grad_and_statistics
from submissions.kfac.defaults import DEFAULTS
from submissions.kfac.model_call import initial_call
from submissions.training_step.jax import (
    apply_directions,
    clip_gradient,
    compile_step,
    compute_gradient,
    forward,
    log_step,
    losses_of,
    mesh,
    replicate,
)
from submissions.training_step.positions import graph_in
from submissions.training_step.schedule import learning_rate_factor


class Training:
    """What a run needs beside arrays: it follows from the workload and the configuration.

    The layers are found twice. Before the first step, in the model as `init_model_fn` calls it, so that there is a
    whole state for a checkpoint to be restored into; and in the first batch, which has the last word.

    Args:
        config: the configuration.
        workload: the workload.

    Attributes:
        layers: what K-FAC covers; None as long as nothing showed it.
    """

    def __init__(self, config: KFACConfig, workload: Any) -> None:
        self.config = config
        self.layers: Layers | None = None
        self._workload = workload
        self._forward = partial(forward, workload, dropout_rate=config.dropout_rate)
        self._optimizer: optax.GradientTransformationExtraArgs | None = None
        self._steps: dict[bool, Callable[..., Any]] = {}

    def initial_state(self, params: Any, rng: Any) -> Any:
        """The state before the first step; empty where the layers show only in the first batch."""
        call = initial_call(self._workload.init_model_fn, rng)
        if call is None:
            return {}
        return self._initialised(discover(call.apply, params, *call.arguments, config=self.config), params)

    def prepare(self, params: Any, opt_state: Any, model_state: Any, batch: Any, rng: Any) -> Any:
        """The optimizer state to go on with, at the first step of a run.

        Args:
            opt_state: from `initial_state`, or what a checkpoint gave back in its place.

        Raises:
            ValueError: the state has other layers than the model has on this batch.
        """
        if self._steps:
            return opt_state
        before, state = self.layers, opt_state
        layers = discover(self._forward, params, batch, model_state, rng, config=self.config)
        if before is None or before.coverage() != layers.coverage():
            fresh = self._initialised(layers, params)
            # Of such a model a checkpoint gives back nested dictionaries, or the structure of `initial_state`.
            is_new = not opt_state or (isinstance(opt_state, KFACState) and int(opt_state.steps) == 0)
            state = fresh if is_new else from_state_dict(fresh, to_state_dict(opt_state))
        self._steps = {taken: compile_step(partial(self._step, taken)) for taken in (False, True)}
        return state

    def _initialised(self, layers: Layers, params: Any) -> KFACState:
        """The zero state for these layers, which are this run's from now on."""
        devices = mesh()
        self.layers = layers
        self._optimizer = scale_by_kfac(layers, self.config, devices if devices.size > 1 else None)
        # Compiled as one: a state has some thirty arrays for each shape of a layer.
        return jax.jit(self._optimizer.init)(params)

    def step(self, global_step: int, *args: Any) -> tuple[Any, Any, Any, dict[str, jax.Array]]:
        """The compiled step with or without statistics, as the step number demands."""
        return self._steps[is_statistics_step(self.config, global_step)](*args)

    def _step(
        self,
        takes_statistics: bool,
        params: Any,
        opt_state: KFACState,
        model_state: Any,
        batch: dict[str, Any],
        rng: jax.Array,
        learning_rate: jax.Array,
    ) -> tuple[Any, Any, Any, dict[str, jax.Array]]:
        """The traced part of a step: new parameters, optimizer state and model state, and what may be logged."""
        config, workload = self.config, self._workload
        assert self._optimizer is not None
        assert self.layers is not None
        if takes_statistics:
            # Not through the mean loss of the plain step: the sum and its divisor are needed apart.
            run = value_grad_and_statistics(
                self._forward,
                lambda logits, batch, *rest: losses_of(workload, logits, batch, config.label_smoothing),
                self.layers,
                config,
                has_aux=True,
                loss_type=workload.loss_type,
            )
            (loss, model_state), gradient, statistics = run(
                params,
                batch,
                model_state,
                rng,
                positions=positions(batch),
                rng=jax.random.fold_in(rng, 1),  # apart from what dropout draws
                loss_mask=batch.get("weights"),
            )
        else:
            gradient, result = compute_gradient(
                workload, params, batch, model_state, rng, config.dropout_rate, config.label_smoothing
            )
            loss, model_state, statistics = result.loss, result.new_model_state, None
        gradient, grad_norm = clip_gradient(gradient, config.grad_clip)
        directions, opt_state = self._optimizer.update(gradient, opt_state, statistics=statistics)
        params = apply_directions(params, directions, learning_rate, config.weight_decay)
        return params, opt_state, model_state, {"loss": loss, "grad_norm": grad_norm}


def positions(batch: dict[str, Any]) -> list[Positions]:
    """Which rows are positions of one example, and which of them count; as in `submissions.kfac.pytorch`."""
    graph = graph_in(batch["inputs"])
    if graph is None:
        return [Positions(mask="gradient")]
    graphs = jnp.arange(len(graph.n_node))
    sizes = [len(rows) for rows in (graph.nodes, graph.edges) if isinstance(rows, jax.Array)]
    if len(sizes) < 2 or len({*sizes, len(graphs)}) < 3:
        # Which rows a layer has would not show in their number.
        warnings.warn(
            f"K-FAC: a batch of {len(graphs)} graphs with {sizes} nodes and edges does not tell which rows are "
            "which: each row counts as an example of its own",
            stacklevel=2,
        )
        return [Positions(mask="gradient")]
    counts = (graph.n_node, graph.n_edge)
    ids = [jnp.repeat(graphs, n, total_repeat_length=size) for n, size in zip(counts, sizes, strict=True)]
    return [Positions("gradient", i, len(graphs), readout="sum") for i in (*ids, graphs)]


# The state that a checkpoint holds, and what is made anew when a run is resumed.
OptimizerState = tuple[Any, Training]


class KFACSubmission:
    """The submission API for one approximation; `submission.py` of each algorithm exports its methods.

    Args:
        approximation: "expand" or "reduce".
    """

    def __init__(self, approximation: str) -> None:
        self._approximation = approximation

    def init_optimizer_state(
        self, workload: Any, model_params: Any, model_state: Any, hyperparameters: Any, rng: Any
    ) -> OptimizerState:
        """Statistics and moments at zero.

        Raises:
            ValueError: a hyperparameter is unknown or out of range.
        """
        del model_state
        defaults = DEFAULTS[self._approximation]
        config = KFACConfig.from_hyperparameters(hyperparameters, **defaults, approximation=self._approximation)
        training = Training(config, workload)
        return replicate(training.initial_state(model_params, rng)), training

    def update_params(
        self,
        workload: Any,
        current_param_container: Any,
        current_params_types: Any,
        model_state: Any,
        hyperparameters: Any,
        batch: dict[str, Any],
        loss_type: Any,
        optimizer_state: OptimizerState,
        eval_results: list[tuple[int, dict[str, float]]],
        global_step: int,
        rng: Any,
        train_state: Any = None,
    ) -> tuple[OptimizerState, Any, Any]:
        """One step; statistics steps gather curvature in the same forward and backward pass."""
        del current_params_types, hyperparameters, loss_type, eval_results, train_state
        opt_state, training = optimizer_state
        config = training.config
        opt_state = training.prepare(current_param_container, opt_state, model_state, batch, rng)
        factor = learning_rate_factor(workload.step_hint, config.horizon_factor, config.warmup_factor, global_step)
        learning_rate = np.float32(config.learning_rate * factor)
        params, opt_state, model_state = replicate((current_param_container, opt_state, model_state))
        params, opt_state, model_state, metrics = training.step(
            global_step, params, opt_state, model_state, batch, rng, learning_rate
        )
        log_step(workload, global_step=global_step, **metrics)
        return (opt_state, training), params, model_state
