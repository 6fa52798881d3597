"""The two spellings of everything the rules ask: the optimizers of PyTorch and JAX behind the same few words."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, Protocol

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import algoperf_kfac.jax
import algoperf_kfac.pytorch
from algoperf_kfac.jax.transform import find_state, move_averages
from algoperf_kfac.layers import Coverage, LayerSpec
from tests.contract.models import Model

NAMES = ("pytorch", "jax")
# Every step takes statistics, so that one step is enough to see them.
EVERY_STEP = {"factor_interval": 1, "refresh_interval": 1, "learning_rate": 1e-3}


class Run(Protocol):
    """A model in training. Its loss is the sum of weighted squares over `loss_normalizer`."""

    def coverage(self) -> Coverage: ...
    def step(self, weights: Any = 1.0, positions: Any = None, loss_normalizer: float | None = None) -> None:
        """One update, with statistics where the optimizer wants them.

        Args:
            weights: of the outputs in the loss, broadcast to them; 0 where the loss does not depend on an output.
            positions: as the optimizer takes them, with numpy arrays inside.
            loss_normalizer: what the loss is divided by, and told the optimizer; None for 1, untold.
        """

    def observe(self, weights: Any = 1.0, positions: Any = None, loss_normalizer: float | None = None) -> None:
        """As `step`, for what is asked of the factors alone: JAX does without the update, which compiles longer."""

    def is_statistics_step(self) -> bool:
        """Whether the coming update takes statistics."""

    def factors(self, reduction: str = "sum") -> Any: ...
    def metrics(self) -> dict[str, float]: ...
    def parameters(self) -> list[np.ndarray]: ...
    def kfac_bytes(self) -> int:
        """What the optimizer keeps between steps beside moments of parameters."""

    def checkpoint_bytes(self) -> int:
        """Size of a file with the state of the optimizer."""


class InPyTorch:
    """A `Run` of an nn.Module."""

    def __init__(self, model: Model, dtype: Any, options: Mapping[str, Any]) -> None:
        self._model, self._dtype = model, dtype
        torch.manual_seed(0)
        self.module = model.module().to(getattr(torch, dtype))
        self.optimizer = algoperf_kfac.pytorch.KFAC(self.module, **options)

    def coverage(self) -> Coverage:
        return self.optimizer.coverage()

    def step(self, weights: Any = 1.0, positions: Any = None, loss_normalizer: float | None = None) -> None:
        inputs = [array("pytorch", x, self._dtype) for x in self._model.inputs]
        weights = torch.as_tensor(weights, dtype=getattr(torch, self._dtype))
        self.optimizer.zero_grad()
        with self.optimizer.capture(_translate(positions, torch.as_tensor, "pytorch"), loss_normalizer):
            loss = (weights * (self.module(*inputs) - 0.3).square()).sum() / (loss_normalizer or 1.0)
            loss.backward()
        self.optimizer.step()

    observe = step

    def is_statistics_step(self) -> bool:
        return self.optimizer.is_statistics_step

    def factors(self, reduction: str = "sum") -> Any:
        return self.optimizer.factors(reduction=reduction)

    def metrics(self) -> dict[str, float]:
        return self.optimizer.metrics()

    def parameters(self) -> list[np.ndarray]:
        return [p.detach().numpy().copy() for p in self.module.parameters()]

    def kfac_bytes(self) -> int:
        # What two fields share is kept, and saved, once.
        kept = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(self._state()["kfac"])
        }
        return sum(kept.values())

    def checkpoint_bytes(self) -> int:
        file = io.BytesIO()
        torch.save(self._state(), file)
        return len(file.getvalue())

    def _state(self) -> Any:
        return self.optimizer.state_dict()


class InJAX:
    """A `Run` of a function of parameters; steps are compiled, as users compile them."""

    def __init__(self, model: Model, dtype: Any, options: Mapping[str, Any]) -> None:
        self._model, self._dtype = model, dtype
        self.params = parameters_of(model, dtype)
        self._inputs = [array("jax", x, dtype) for x in model.inputs]
        one = jnp.ones((), dtype)  # for the weights and for the normalizer
        self.optimizer = algoperf_kfac.jax.KFAC(model.apply, _loss, self.params, *self._inputs, one, one, **options)
        self.state = self.optimizer.init(self.params)
        self.pacing = self.optimizer.pacing()
        self._steps = 0
        self._compiled: dict[Any, Any] = {}

    def coverage(self) -> Coverage:
        return self.optimizer.coverage()

    def step(self, weights: Any = 1.0, positions: Any = None, loss_normalizer: float | None = None) -> None:
        numbers = (jnp.asarray(weights, self._dtype), jnp.asarray(loss_normalizer or 1.0, self._dtype))
        args = (*self._inputs, *numbers)
        kind = (self.is_statistics_step(), id(positions), loss_normalizer)
        if kind not in self._compiled:
            run = jax.jit(self._with_statistics(positions, loss_normalizer) if kind[0] else self._plain)
            self._compiled[kind] = run, positions  # kept, so that no other takes its identity
        self.params, self.state = self._compiled[kind][0](self.params, self.state, *args)
        self.state = self.pacing(self.state, self._steps)
        self._steps += 1

    def observe(self, weights: Any = 1.0, positions: Any = None, loss_normalizer: float | None = None) -> None:
        assert self.is_statistics_step()
        options = {"positions": _translate(positions, jnp.asarray, "jax"), "loss_normalizer": loss_normalizer}

        @jax.jit
        def observed(params: Any, state: Any, *args: Any) -> Any:
            _, _, statistics = self.optimizer.value_grad_and_statistics(params, *args, **options)
            return move_averages(state.stacks, statistics, self.optimizer.layers, self.optimizer.config)

        numbers = (jnp.asarray(weights, self._dtype), jnp.asarray(loss_normalizer or 1.0, self._dtype))
        state = find_state(self.state)
        self.state = state._replace(stacks=observed(self.params, state, *self._inputs, *numbers))

    def _plain(self, params: Any, state: Any, *args: Any) -> Any:
        gradient = jax.grad(lambda p: _loss(self._model.apply(p, *args), *args))(params)
        updates, state = self.optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    def _with_statistics(self, positions: Any, loss_normalizer: float | None) -> Any:
        options = {"positions": _translate(positions, jnp.asarray, "jax"), "loss_normalizer": loss_normalizer}

        def step(params: Any, state: Any, *args: Any) -> Any:
            _, gradient, statistics = self.optimizer.value_grad_and_statistics(params, *args, **options)
            updates, state = self.optimizer.update(gradient, state, params, statistics=statistics)
            return optax.apply_updates(params, updates), state

        return step

    def is_statistics_step(self) -> bool:
        return self.optimizer.is_statistics_step(self._steps)

    def factors(self, reduction: str = "sum") -> Any:
        return self.optimizer.factors(self.state, reduction=reduction)

    def metrics(self) -> dict[str, float]:
        return self.optimizer.metrics(self.state)

    def parameters(self) -> list[np.ndarray]:
        return [np.asarray(p) for p in jax.tree.leaves(self.params)]

    def kfac_bytes(self) -> int:
        inner = find_state(self.state)
        kept, *moments = (
            sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (self.state, inner.mu, inner.nu)
        )
        return kept - sum(moments)

    def checkpoint_bytes(self) -> int:
        return len(flax.serialization.to_bytes(self.state))


def start(framework: str, model: Model, *, dtype: str = "float64", **options: Any) -> Run:
    """The model and its optimizer in a framework, before the first step."""
    return {"pytorch": InPyTorch, "jax": InJAX}[framework](model, dtype, options)


def array(framework: str, x: np.ndarray, dtype: str) -> Any:
    """An input of a model as an array of the framework; whole numbers stay whole."""
    x = x if x.dtype.kind == "i" else x.astype(dtype)
    return torch.as_tensor(x) if framework == "pytorch" else jnp.asarray(x)


def parameters_of(model: Model, dtype: str) -> Any:
    """Parameters of a model in JAX, the same at each call."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal(shape) / 2, dtype),
        model.shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def module_of(framework: str) -> Any:
    """`algoperf_kfac.pytorch` or `algoperf_kfac.jax`."""
    return {"pytorch": algoperf_kfac.pytorch, "jax": algoperf_kfac.jax}[framework]


def examples(run: Run, layer: str) -> float:
    """How many examples a layer counted: the factor between the sum and the mean over examples."""
    summed, mean = (
        [np.asarray(m) for pair in (run.factors(reduction)[layer],) for m in (*_blocks(pair.A), *_blocks(pair.B))]
        for reduction in ("sum", "mean")
    )
    ratios = {round(float(np.abs(s).max() / np.abs(m).max()), 9) for s, m in zip(summed, mean, strict=True)}
    return max(ratios)  # the other factor is the same in both


def fields(spec: LayerSpec) -> dict[str, Any]:
    """What a spec says, without the names and the layout that differ between frameworks."""
    names = ("name", "kind", "groups", "in_dim", "out_dim", "approximation", "in_blocks", "out_blocks")
    found = {name: getattr(spec, name) for name in names}
    return found | {"bias": spec.bias is not None, "size": int(np.prod(spec.weight_shape))}


class Described(dict[str, Any]):
    """Arguments of `Positions`, with numpy arrays, for either framework."""


def positions(mask: Any = None, segment_ids: Any = None, num_segments: int | None = None, **more: Any) -> Described:
    return Described(mask=mask, segment_ids=segment_ids, num_segments=num_segments, **more)


def _translate(given: Any, array: Any, framework: str) -> Any:
    """Descriptions and arrays, as they stand in lists and mappings, as those of a framework."""
    if isinstance(given, Described):
        values = {k: array(v) if isinstance(v, np.ndarray) else v for k, v in given.items()}
        return module_of(framework).Positions(**values)
    if isinstance(given, Mapping):
        return {pattern: _translate(value, array, framework) for pattern, value in given.items()}
    if isinstance(given, list):
        return [_translate(item, array, framework) for item in given]
    return array(given) if isinstance(given, np.ndarray) else given


def _loss(outputs: Any, *args: Any) -> Any:
    weights, normalizer = args[-2:]
    return (weights * jnp.square(outputs - 0.3)).sum() / normalizer


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value] if value.numel() else []
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [t for v in values for t in _tensors(v)]


def _blocks(factor: Any) -> tuple[Any, ...]:
    return factor if isinstance(factor, tuple) else (factor,)
