"""AlgoPerf's API around `algoperf_kfac.jax`, for one approximation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax.serialization import from_state_dict, to_state_dict

from algoperf_kfac.cadence import is_statistics_step
from algoperf_kfac.config import KFACConfig
from algoperf_kfac.jax import (
    KFACState,
    Layers,
    Pacing,
    Positions,
    discover,
    scale_by_kfac,
    value_grad_and_statistics,
)
from algoperf_kfac.pace import interval_at
from submissions.common.api import Batch, Rng, Tree, Workload
from submissions.common.description import Description
from submissions.common.hyperparameters import TrainingConfig
from submissions.common.jax import (
    Step,
    apply_directions,
    clip_gradient,
    compile_step,
    compute_gradient,
    forward,
    losses_of,
    mesh,
)
from submissions.common.jax_submission import Submission
from submissions.common.kfac.model_call import initial_call
from submissions.common.positions import graph_in, rows_tell


class Run:
    """What a run needs beside arrays: it follows from the workload and the configuration.

    The layers are found twice. Before the first step, in the model as `init_model_fn` calls it, so that there is a
    whole state for a checkpoint to be restored into; and in the first batch, which has the last word.

    Args:
        training: what the step around the optimizer reads.
        config: what the optimizer reads.
        workload: the workload.

    Attributes:
        layers: what K-FAC covers; None as long as nothing showed it.
    """

    def __init__(self, training: TrainingConfig, config: KFACConfig, workload: Workload) -> None:
        self.training = training
        self.config = config
        self.layers: Layers | None = None
        self._workload = workload
        self._forward = partial(forward, workload, dropout_rate=training.dropout_rate)
        self._optimizer: optax.GradientTransformationExtraArgs | None = None
        self._steps: dict[bool, Callable[..., Step]] = {}
        self._pacing: Pacing | None = None

    def initial_state(self, params: Tree, rng: Rng) -> Tree:
        """The state before the first step; empty where the layers show only in the first batch."""
        call = initial_call(self._workload.init_model_fn, rng)
        if call is None:
            return {}
        return self._initialised(discover(call.apply, params, *call.arguments, config=self.config), params)

    def prepare(self, params: Tree, opt_state: Tree, model_state: Tree, batch: Batch, rng: Rng) -> Tree:
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
        self._steps = {taken: compile_step(partial(self._step, takes_statistics=taken)) for taken in (False, True)}
        return state

    def _initialised(self, layers: Layers, params: Tree) -> KFACState:
        """The zero state for these layers, which are this run's from now on."""
        devices = mesh()
        self.layers = layers
        self._optimizer = scale_by_kfac(layers, self.config, devices if devices.size > 1 else None)
        self._pacing = Pacing(layers, self.config, devices)
        # Compiled as one: a state has some thirty arrays for each shape of a layer.
        return jax.jit(self._optimizer.init)(params)

    def step(self, global_step: int, *args: Tree) -> Step:
        """The compiled step with or without statistics, as the step number demands, and the clock after it."""
        assert self._pacing is not None
        params, opt_state, *rest = self._steps[is_statistics_step(self.config, global_step)](*args)
        return params, self._pacing(opt_state, global_step), *rest

    def _step(
        self,
        params: Tree,
        opt_state: KFACState,
        model_state: Tree,
        batch: Batch,
        rng: jax.Array,
        learning_rate: jax.Array,
        *,
        takes_statistics: bool,
    ) -> Step:
        """The traced part of a step."""
        training, config, workload = self.training, self.config, self._workload
        assert self._optimizer is not None
        assert self.layers is not None
        if takes_statistics:
            # Not through the mean loss of the plain step: the sum and its divisor are needed apart.
            differentiate = value_grad_and_statistics(
                self._forward,
                lambda logits, batch, *rest: losses_of(workload, logits, batch, training.label_smoothing),
                self.layers,
                config,
                has_aux=True,
                loss_type=workload.loss_type,
            )
            (loss, model_state), gradient, statistics = differentiate(
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
                workload, params, batch, model_state, rng, training.dropout_rate, training.label_smoothing
            )
            loss, model_state, statistics = result.loss, result.new_model_state, None
        gradient, grad_norm = clip_gradient(gradient, training.grad_clip)
        directions, opt_state = self._optimizer.update(gradient, opt_state, statistics=statistics)
        params = apply_directions(params, directions, learning_rate, config.weight_decay)
        logged = {"loss": loss, "grad_norm": grad_norm}
        if (pace := opt_state.stacks.pace) is not None:
            logged["refresh_interval"] = interval_at(config, pace)
        return params, opt_state, model_state, logged


def positions(batch: Batch) -> list[Positions]:
    """Which rows are positions of one example, and which of them count; as in `submissions.common.kfac.pytorch`."""
    graph = graph_in(batch["inputs"])
    if graph is None:
        return [Positions(mask="gradient")]
    graphs = jnp.arange(len(graph.n_node))
    sizes = [len(rows) for rows in (graph.nodes, graph.edges) if isinstance(rows, jax.Array)]
    if not rows_tell(len(graphs), sizes):
        return [Positions(mask="gradient")]
    counts = (graph.n_node, graph.n_edge)
    ids = [jnp.repeat(graphs, n, total_repeat_length=size) for n, size in zip(counts, sizes, strict=True)]
    return [Positions("gradient", i, len(graphs), readout="sum") for i in (*ids, graphs)]


def submission(description: Description[KFACConfig]) -> Submission[KFACConfig]:
    """The submission API for one approximation; `submission.py` of each algorithm exports its methods."""
    return Submission(description, Run)
