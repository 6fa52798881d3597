"""A submission from any optax optimizer, in one call; see docs/references.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from submissions.common.api import Batch, EvalResults, Hyperparameters, Rng, Tree, Workload
from submissions.common.batch_sizes import get_batch_size
from submissions.common.description import Config, Description, Hyperparameter, describe
from submissions.common.functions import Functions
from submissions.common.hyperparameters import TrainingConfig
from submissions.common.jax import Step, clip_gradient, compile_step, compute_gradient
from submissions.common.jax_submission import OptimizerState, Submission
from submissions.common.packages import Package, require
from submissions.common.pass_through import data_selection, prepare_for_eval
from submissions.common.schedule import WARMUP_DECAY, Schedule
from submissions.common.spec import LossType, ParameterType


class Parameters(NamedTuple):
    """What an optimizer may know of the parameters, each as a pytree like them.

    Attributes:
        roles: "matrix", "embedding", "head" or "vector", as in `submissions.common.parameters`.
        shapes: as `jax.ShapeDtypeStruct`; inputs first, a convolution's output channels last.
        types: of AlgoPerf's `ParameterType`.
    """

    roles: Tree
    shapes: Tree
    types: Tree


Make: TypeAlias = Callable[[Parameters, Any, jax.Array], optax.GradientTransformation]
"""Makes the optimizer of the parameters, a point by attributes, and the learning rate, which is traced."""

Change: TypeAlias = Callable[[Tree, Tree, Any], Tree]
"""Other parameters, of the optax state, parameters, and a point by attributes."""


class Averaging(NamedTuple):
    """How an optimizer evaluates at other parameters than it trains at.

    Attributes:
        for_evaluation: from the parameters trained at to those to evaluate at.
        for_training: back.
    """

    for_evaluation: Change
    for_training: Change


class State(NamedTuple):
    """The state of an averaging optimizer.

    Attributes:
        optimizer: optax's.
        evaluated: whether the parameters outside are those of an evaluation; bool ().
    """

    optimizer: Tree
    evaluated: jax.Array


class FirstOrderRun:
    """A run of an optimizer that sees gradients alone.

    Args:
        training: what the step around the optimizer reads.
        config: what the optimizer reads.
        workload: the workload.
        init: function of the parameters to the optimizer state.
        update: traced function of gradient, optimizer state, parameters and learning rate to new parameters and
            state.
        at: traced function of optimizer state and parameters to those to differentiate at; None for the given ones.

    Attributes:
        compiled: the step.
    """

    def __init__(
        self,
        training: TrainingConfig,
        workload: Workload,
        init: Callable[[Tree], Tree],
        update: Callable[[Tree, Tree, Tree, jax.Array], tuple[Tree, Tree]],
        at: Callable[[Tree, Tree], Tree] | None = None,
    ) -> None:
        self._training, self._workload = training, workload
        self._init, self._update, self._at = init, update, at
        self.compiled = compile_step(self._step)

    def initial_state(self, params: Tree, rng: Rng) -> Tree:
        """The optimizer state before the first step."""
        del rng
        return self._init(params)

    def prepare(self, params: Tree, opt_state: Tree, model_state: Tree, batch: Batch, rng: Rng) -> Tree:
        """Nothing to prepare."""
        return opt_state

    def step(self, global_step: int, *args: Tree) -> Step:
        """The same step always."""
        return self.compiled(*args)

    def _step(
        self,
        params: Tree,
        opt_state: Tree,
        model_state: Tree,
        batch: Batch,
        rng: jax.Array,
        learning_rate: jax.Array,
    ) -> Step:
        """The traced part of a step."""
        training = self._training
        if self._at is not None:
            params = self._at(opt_state, params)
        gradient, result = compute_gradient(
            self._workload, params, batch, model_state, rng, training.dropout_rate, training.label_smoothing
        )
        gradient, grad_norm = clip_gradient(gradient, training.grad_clip)
        params, opt_state = self._update(gradient, opt_state, params, learning_rate)
        return params, opt_state, result.new_model_state, {"loss": result.loss, "grad_norm": grad_norm}


def from_optax(
    *,
    title: str,
    text: str,
    hyperparameters: Mapping[str, Hyperparameter],
    make: Make,
    training: Mapping[str, object] | None = None,
    schedule: Schedule = WARMUP_DECAY,
    packages: Sequence[Package] = (),
    averaging: Averaging | None = None,
) -> Functions:
    """The functions of a submission, to be unpacked in its `submission.py`; as `from_torch`.

    Args:
        title: its name to people.
        text: what it does, in one paragraph.
        hyperparameters: the optimizer's own: name -> (default, check), `learning_rate` among them.
        make: see `Make`. The structure of the optimizer's state must not depend on the learning rate.
        training: defaults of `TrainingConfig`'s fields where they differ from its own.
        schedule: of the learning rate.
        packages: what `make` needs beside jax, flax and AlgoPerf's optax.
        averaging: of an optimizer that evaluates at an average. Statistics of batch norm stay those of training.

    Raises:
        MissingPackage: a package is not installed.
        ValueError: of the hyperparameters, as `describe`.
    """
    require(packages, title)
    description = describe(title, text, hyperparameters, training, packages)

    def make_run(training: TrainingConfig, point: Any, workload: Workload) -> FirstOrderRun:
        def optimizer(params: Tree, learning_rate: jax.Array) -> optax.GradientTransformation:
            return make(parameters_of(params, workload), point, learning_rate)

        def init(params: Tree) -> Tree:
            state = optimizer(params, jnp.zeros(())).init(params)
            return state if averaging is None else State(state, jnp.zeros((), bool))

        def update(gradient: Tree, state: Tree, params: Tree, learning_rate: jax.Array) -> tuple[Tree, Tree]:
            own = state if averaging is None else state.optimizer
            updates, own = optimizer(params, learning_rate).update(gradient, own, params)
            state = own if averaging is None else State(own, jnp.zeros((), bool))
            return optax.apply_updates(params, updates), state

        def back(state: State, params: Tree) -> Tree:
            assert averaging is not None
            trained = averaging.for_training(state.optimizer, params, point)
            return jax.tree.map(lambda a, b: jnp.where(state.evaluated, a, b), trained, params)

        return FirstOrderRun(training, workload, init, update, None if averaging is None else back)

    submission = Submission(description, make_run, schedule)
    return Functions(
        description,
        submission.init_optimizer_state,
        submission.update_params,
        prepare_for_eval if averaging is None else _prepare_for_eval(description, averaging),
        data_selection,
        get_batch_size,
    )


def _prepare_for_eval(description: Description[Config], averaging: Averaging) -> Callable[..., Tree]:
    def prepare_for_eval(
        workload: Workload,
        current_param_container: Tree,
        current_params_types: Tree,
        model_state: Tree,
        hyperparameters: Hyperparameters,
        loss_type: LossType,
        optimizer_state: OptimizerState,
        eval_results: EvalResults,
        global_step: int,
        rng: Rng,
    ) -> tuple[OptimizerState, Tree, Tree]:
        """The average, until the next step."""
        del workload, current_params_types, loss_type, eval_results, global_step, rng
        _, point = description.configure(hyperparameters)
        state, run = optimizer_state
        if bool(state.evaluated):
            return optimizer_state, current_param_container, model_state
        params = averaging.for_evaluation(state.optimizer, current_param_container, point)
        return (State(state.optimizer, jnp.ones((), bool)), run), params, model_state

    return prepare_for_eval


def parameters_of(params: Tree, workload: Workload) -> Parameters:
    """Sorts the parameters by shapes, by the types in `model_params_types`, and by `is_output_params`."""

    def role(path: tuple[Any, ...], leaf: jax.Array, kind: object) -> str:
        if kind is ParameterType.EMBEDDING:
            return "embedding"
        if workload.is_output_params(path[0].key):
            return "head"
        # Of two and three dimensions a first 1 is broadcast over the batch; a convolution's leading sides may be 1.
        return "matrix" if leaf.ndim > 3 or (leaf.ndim > 1 and leaf.shape[0] > 1) else "vector"

    types = workload.model_params_types
    return Parameters(
        jax.tree_util.tree_map_with_path(role, params, types),
        jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params),
        types,
    )
