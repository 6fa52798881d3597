"""The JAX models a plan can be made for: AlgoPerf's workloads, the embedded ones, and any of the user's."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from commands.errors import UserError
from submissions.cli import references
from submissions.cli.jax_probe import Subject
from submissions.common.api import Batch, Tree, Workload
from submissions.common.positions import graph_rows
from submissions.common.spec import ForwardPassMode
from workloads import algoperf


def official(name: str, batch_size: int) -> Subject:
    """One of AlgoPerf's workloads, of the size it is scored with.

    Raises:
        UserError: AlgoPerf is not installed, or has no such workload.
    """
    workload = references.official_workload(name, "jax")
    base = algoperf.base_of(name)
    segments = algoperf.graph_rows(batch_size) if base == "ogbg" else {}
    return _of_workload(workload, BATCHES[base](batch_size), segments)


def embedded(name: str, batch_size: int) -> Subject:
    """One of this repository's workloads.

    Raises:
        UserError: there is no such workload in JAX, or its data are not installed.
    """
    from workloads import registry, seeds

    workload = registry.load(name, "jax")
    batch = next(workload._build_input_queue(seeds.root(0), "train", "", batch_size))
    return _of_workload(workload, jax.tree.map(jnp.asarray, batch), graph_rows(batch["inputs"]))


def custom(reference: str, batch_size: int | None) -> Subject:
    """A model of the user's.

    Args:
        reference: "package.module:function"; the function returns (apply function, parameters, its other arguments
            as a tuple), arrays or shapes.
        batch_size: examples on one device, first in every argument; None for those of the arguments.

    Raises:
        UserError: there is no such function, or it returns something else.
    """
    function = references.load(reference)
    try:
        made = function()
    except Exception as error:
        raise UserError(f"the model cannot be made: {references.line(error)}") from error
    if not (isinstance(made, tuple) and len(made) == 3 and callable(made[0]) and isinstance(made[2], tuple)):
        raise UserError(
            f"{reference} must be a function that returns (apply function, parameters, tuple of arguments)"
        )
    apply, params, args = made
    if batch_size is not None:
        args = jax.tree.map(lambda leaf: _shape(batch_size, *leaf.shape[1:], dtype=leaf.dtype), args)
    return Subject(apply, params, args)


def _of_workload(workload: Workload, batch: Batch, segments: Mapping[int, int] | None = None) -> Subject:
    key = jax.eval_shape(lambda: jax.random.PRNGKey(0))
    params, state = jax.eval_shape(workload.init_model_fn, key)

    def apply(params: Tree, state: Tree, batch: Tree, rng: Tree) -> Tree:
        return workload.model_fn(
            params,
            batch,
            model_state=state,
            mode=ForwardPassMode.TRAIN,
            rng=rng,
            update_batch_norm=True,
        )[0]

    return Subject(apply, params, (state, dict(batch), key), segments or {})


def _shape(*shape: int, dtype: Tree = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _images(size: int, channels: int) -> Callable[[int], Batch]:
    return lambda n: {"inputs": _shape(n, size, size, channels)}


def _speech(n: int) -> Batch:
    return {"inputs": (_shape(n, algoperf.AUDIO_SAMPLES), _shape(n, algoperf.AUDIO_SAMPLES))}


def _sentences(n: int) -> Batch:
    """Packed rows, as in training."""
    keys = [f"{side}{suffix}" for side in ("inputs", "targets") for suffix in ("", "_position", "_segmentation")]
    return {key: _shape(n, algoperf.SENTENCE, dtype=jnp.int32) for key in keys}


def _graphs(n: int) -> Batch:
    """n molecules of average size and the padding graph."""
    from jraph import GraphsTuple

    nodes, edges = algoperf.GRAPH_NODES * n + 1, algoperf.GRAPH_EDGES * n
    graph = GraphsTuple(
        nodes=_shape(nodes, 9),
        edges=_shape(edges, 3),
        receivers=_shape(edges, dtype=jnp.int32),
        senders=_shape(edges, dtype=jnp.int32),
        globals={},
        n_node=_shape(n + 1, dtype=jnp.int32),
        n_edge=_shape(n + 1, dtype=jnp.int32),
    )
    return {"inputs": graph}


BATCHES: dict[str, Callable[[int], Batch]] = {
    "criteo1tb": lambda n: {"inputs": _shape(n, 39)},
    "finewebedu_lm": lambda n: {"inputs": _shape(n, algoperf.DOCUMENT, dtype=jnp.int32)},
    "fastmri": lambda n: {"inputs": _shape(n, 320, 320)},
    "imagenet_resnet": _images(224, 3),
    "imagenet_vit": _images(224, 3),
    "librispeech_conformer": _speech,
    "librispeech_deepspeech": _speech,
    "ogbg": _graphs,
    "wmt": _sentences,
    "mnist": _images(28, 1),
    "cifar": _images(32, 3),
}
