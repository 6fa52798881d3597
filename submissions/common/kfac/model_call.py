"""A flax model before its first batch: the call of it that AlgoPerf's `init_model_fn` makes.

K-FAC's state has a matrix or two for each layer, and which layers there are shows in a trace of the model alone. A
trace needs inputs. `init_optimizer_state` has none, but the fixed `init_model_fn`, which submissions may call, runs
the model on inputs of its own making: their shapes are enough. So the state is whole before the first step, as a
checkpoint to be restored into it requires.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax

from submissions.common.api import Rng, Tree


class ModelCall(NamedTuple):
    """A call of a model, to be traced.

    Attributes:
        apply: function of (params, *arguments) to what the model returns.
        arguments: shapes of its other collections (batch statistics) and of the inputs.
    """

    apply: Callable[..., Tree]
    arguments: tuple[Tree, ...]


def initial_call(init_model_fn: Callable[[Rng], Tree], rng: Rng) -> ModelCall | None:
    """The first call of a flax.linen model in `init_model_fn`, which is traced and not run.

    Args:
        init_model_fn: of an AlgoPerf workload.
        rng: a raw key.

    Returns:
        None if no such model is called.
    """
    recorder = _Recorder()
    with nn.intercept_methods(recorder):
        jax.eval_shape(init_model_fn, rng)
        if recorder.call is None:
            # A compiled function that was called before is not traced again.
            with jax.disable_jit():
                jax.eval_shape(init_model_fn, rng)
    return recorder.call


class _Recorder:
    """Keeps the first call of an outermost module."""

    def __init__(self) -> None:
        self.call: ModelCall | None = None

    def __call__(
        self,
        next_fun: Callable[..., Tree],
        args: tuple[Tree, ...],
        kwargs: dict[str, Tree],
        context: nn.module.InterceptorContext,
    ) -> Tree:
        outermost = context.method_name == "__call__" and not context.module.path
        if self.call is not None or not outermost:
            return next_fun(*args, **kwargs)
        # Only now, because the model may change what it was given.
        leaves, tree = jax.tree.flatten((args, kwargs))
        result = next_fun(*args, **kwargs)
        model, variables = context.module.unbind()
        collections = {name: _shapes(leaf) for name, leaf in variables.items() if name != "params"}
        self.call = _model_call(model, collections, leaves, tree)
        return result


def _model_call(
    model: nn.Module, collections: dict[str, Tree], leaves: list[Tree], tree: jax.tree_util.PyTreeDef
) -> ModelCall:
    arrays = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]
    static = [None if i in arrays else leaf for i, leaf in enumerate(leaves)]

    def apply(params: Tree, collections: dict[str, Tree], *inputs: Tree) -> Tree:
        values = list(static)
        for i, value in zip(arrays, inputs, strict=True):
            values[i] = value
        args, kwargs = jax.tree.unflatten(tree, values)
        key = jax.random.PRNGKey(0)
        rngs = {"params": key, "dropout": key}
        variables = {"params": params, **collections}
        return model.apply(variables, *args, rngs=rngs, mutable=sorted(collections) or False, **kwargs)

    return ModelCall(apply, (collections, *(_shapes(leaves[i]) for i in arrays)))


def _shapes(tree: Tree) -> Tree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
