"""AlgoPerf's API as types: what a submission is given, what it may read of it, and what it gives back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeAlias

from algoperf_kfac.config import Point
from submissions.common.spec import ForwardPassMode, LossType

Tree: TypeAlias = Any
"""A tensor, an array, a module, or a nest of them: parameters, model state, inputs, logits, optimizer state."""

Batch: TypeAlias = dict[str, Tree]
"""A training batch: "inputs" and "targets", often "weights"; each with the examples first."""

Rng: TypeAlias = Any
"""Two integers, as a list, as an int32 or uint32 array of shape (2,), or as a key of JAX."""

EvalResults: TypeAlias = list[tuple[int, dict[str, float]]]
"""Step and metrics of each evaluation so far."""

Update: TypeAlias = tuple[Tree, Tree, Tree]
"""What a step leaves: optimizer state, parameters, model state."""

Hyperparameters: TypeAlias = Point | Mapping[str, object] | None
"""A point of the search space; None in the self-tuning ruleset."""


class MetricsLogger(Protocol):
    """Where a submission may log."""

    def append_scalar_metrics(self, metrics: dict[str, float], global_step: int, /) -> None: ...


class Workload(Protocol):
    """What AlgoPerf's rules let a submission read of a workload, and nothing else; a test holds it to that."""

    @property
    def step_hint(self) -> int: ...

    @property
    def max_allowed_runtime_sec(self) -> float: ...

    @property
    def loss_type(self) -> LossType: ...

    @property
    def model_params_types(self) -> Tree: ...

    @property
    def metrics_logger(self) -> MetricsLogger | None: ...

    def is_output_params(self, param_key: str, /) -> bool: ...

    def init_model_fn(self, rng: Rng, /) -> tuple[Tree, Tree]: ...

    # The first two go by position: AlgoPerf's workloads do not call them alike.
    def model_fn(
        self,
        params: Tree,
        batch: Batch,
        /,
        model_state: Tree,
        mode: ForwardPassMode,
        rng: Rng,
        update_batch_norm: bool,
        dropout_rate: float = ...,
    ) -> tuple[Tree, Tree]: ...

    def loss_fn(
        self, labels: Tree, logits: Tree, /, mask_batch: Tree = ..., label_smoothing: float = ...
    ) -> dict[str, Tree]: ...


class InitOptimizerState(Protocol):
    """Makes a submission's state."""

    def __call__(
        self,
        workload: Workload,
        model_params: Tree,
        model_state: Tree,
        hyperparameters: Hyperparameters,
        rng: Rng,
        /,
    ) -> Tree: ...


class UpdateParams(Protocol):
    """Makes one step."""

    def __call__(
        self,
        *,
        workload: Workload,
        current_param_container: Tree,
        current_params_types: Tree,
        model_state: Tree,
        hyperparameters: Hyperparameters,
        batch: Batch,
        loss_type: LossType,
        optimizer_state: Tree,
        eval_results: EvalResults,
        global_step: int,
        rng: Rng,
    ) -> Update: ...


class PrepareForEval(Protocol):
    """May change the parameters before an evaluation."""

    def __call__(
        self,
        *,
        workload: Workload,
        current_param_container: Tree,
        current_params_types: Tree,
        model_state: Tree,
        hyperparameters: Hyperparameters,
        loss_type: LossType,
        optimizer_state: Tree,
        eval_results: EvalResults,
        global_step: int,
        rng: Rng,
    ) -> Update: ...


class DataSelection(Protocol):
    """Draws a batch."""

    def __call__(
        self,
        workload: Workload,
        input_queue: Iterator[Batch],
        optimizer_state: Tree,
        current_param_container: Tree,
        model_state: Tree,
        hyperparameters: Hyperparameters,
        global_step: int,
        rng: Rng,
        /,
    ) -> Batch: ...
