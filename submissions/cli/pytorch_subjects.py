"""The PyTorch models a plan can be made for: AlgoPerf's workloads, the embedded ones, and any of the user's."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from algoperf_kfac.pytorch.meta import on_meta
from algoperf_kfac.pytorch.probe import tensors
from commands.errors import UserError
from submissions.cli import references
from submissions.cli.pytorch_probe import Subject
from submissions.common.api import Batch, Tree, Workload
from submissions.common.positions import graph_rows
from submissions.common.spec import ForwardPassMode
from workloads import algoperf


def official(name: str, batch_size: int) -> Subject:
    """One of AlgoPerf's workloads, of the size it is scored with.

    Raises:
        UserError: AlgoPerf is not installed, or has no such workload.
    """
    algoperf.import_torchvision()
    workload = references.official_workload(name, "pytorch")
    base = algoperf.base_of(name)
    make_batch = BATCHES[base]

    def outputs(model: nn.Module, examples: int) -> Tree:
        return _model_fn(workload, model, make_batch(examples))

    def build() -> nn.Module:
        vars(workload).pop("_model", None)  # finewebedu_lm hands out what it made first, on whatever device
        return workload.init_model_fn([0, 0])[0]

    small = None if base == "ogbg" else 2
    return Subject(
        build,
        outputs,
        batch_size,
        small,
        algoperf.graph_rows(batch_size) if base == "ogbg" else {},
        compiled=base in algoperf.compiled(algoperf.version()),
        workload=workload,
    )


def embedded(name: str, batch_size: int) -> Subject:
    """One of this repository's workloads.

    Raises:
        UserError: there is no such workload, or its data are not installed.
    """
    from workloads import registry, seeds
    from workloads.data.trees import map_arrays

    workload = registry.load(name, "pytorch")

    def batch(examples: int) -> Batch:
        return next(workload._build_input_queue(seeds.root(0), "train", "", examples))

    def outputs(model: nn.Module, examples: int) -> Tree:
        device = next(model.parameters()).device

        def moved(value: Tree) -> Tree:
            return value.to(device)

        return _model_fn(workload, model, map_arrays(moved, batch(examples)))

    return Subject(
        lambda: workload.init_model_fn(seeds.root(0))[0],
        outputs,
        batch_size,
        None,
        graph_rows(batch(batch_size)["inputs"]),
        workload=workload,
    )


def custom(reference: str, batch_size: int | None) -> Subject:
    """A model of the user's.

    Args:
        reference: "package.module:function"; the function returns the model and its inputs: a tensor, a tuple of
            positional arguments or a dict of keyword arguments, batch first.
        batch_size: examples on one device; None for those of the example inputs.

    Raises:
        UserError: there is no such function, or it returns something else.
    """
    function = references.load(reference)
    made: dict[int, Tree] = {}

    def build() -> nn.Module:
        result = function()
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], nn.Module)):
            raise UserError(f"{reference} must be a function that returns (model, example inputs)")
        made[id(result[0])] = result[1]
        return result[0]

    def outputs(model: nn.Module, examples: int) -> Tree:
        device = next(model.parameters()).device
        inputs = _adapt(made[id(model)], device, None if batch_size is None else examples)
        if isinstance(inputs, Mapping):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)

    examples = _examples(build, made)  # also shows whether it is such a function
    return Subject(build, outputs, batch_size or examples)


def _examples(build: Callable[[], nn.Module], made: Mapping[int, Tree]) -> int:
    """How many examples the example inputs hold; 1 if no tensor is among them."""
    try:
        with on_meta():
            model = build()
    except UserError:
        raise
    except Exception:
        try:
            model = build()
        except Exception as error:
            raise UserError(f"the model cannot be made: {references.line(error)}") from error
    return next((len(t) for t in tensors(made[id(model)]) if t.dim()), 1)


def _adapt(inputs: Tree, device: torch.device, examples: int | None) -> Tree:
    """Inputs on a device, their first dimension repeated or cut to so many examples."""
    if isinstance(inputs, Tensor):
        inputs = inputs.to(device)
        if examples is not None and inputs.dim():
            times = -(-examples // len(inputs))
            inputs = inputs.repeat(times, *[1] * (inputs.dim() - 1))[:examples]
        return inputs
    if isinstance(inputs, Mapping):
        return {key: _adapt(value, device, examples) for key, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(_adapt(value, device, examples) for value in inputs)
    return inputs


def _model_fn(workload: Workload, model: nn.Module, batch: Batch) -> Tree:
    return workload.model_fn(
        model,
        batch,
        model_state=None,
        mode=ForwardPassMode.TRAIN,
        rng=np.zeros(2, np.int32),
        update_batch_norm=True,
    )[0]


def _images(channels: int, size: int) -> Callable[[int], Batch]:
    return lambda n: {"inputs": torch.zeros(n, channels, size, size)}


def _speech(n: int) -> Batch:
    return {"inputs": (torch.randn(n, algoperf.AUDIO_SAMPLES), torch.zeros(n, algoperf.AUDIO_SAMPLES))}


def _sentences(n: int) -> Batch:
    """Packed rows, as in training."""
    keys = [f"{side}{suffix}" for side in ("inputs", "targets") for suffix in ("", "_position", "_segmentation")]
    return {key: torch.ones(n, algoperf.SENTENCE, dtype=torch.long) for key in keys}


def _graphs(n: int) -> Batch:
    """n molecules of average size and the padding graph."""
    from jraph import GraphsTuple

    nodes, edges = algoperf.GRAPH_NODES * n + 1, algoperf.GRAPH_EDGES * n
    graph = GraphsTuple(
        nodes=torch.zeros(nodes, 9),
        edges=torch.zeros(edges, 3),
        receivers=torch.zeros(edges, dtype=torch.long),
        senders=torch.zeros(edges, dtype=torch.long),
        globals={},
        n_node=torch.tensor([algoperf.GRAPH_NODES] * n + [1]),
        n_edge=torch.tensor([algoperf.GRAPH_EDGES] * n + [0]),
    )
    return {"inputs": graph}


BATCHES: dict[str, Callable[[int], Batch]] = {
    "criteo1tb": lambda n: {"inputs": torch.zeros(n, 39)},
    "finewebedu_lm": lambda n: {"inputs": torch.zeros(n, algoperf.DOCUMENT, dtype=torch.int32)},
    "fastmri": lambda n: {"inputs": torch.zeros(n, 320, 320)},
    "imagenet_resnet": _images(3, 224),
    "imagenet_vit": _images(3, 224),
    "librispeech_conformer": _speech,
    "librispeech_deepspeech": _speech,
    "ogbg": _graphs,
    "wmt": _sentences,
    "mnist": _images(1, 28),
    "cifar": _images(3, 32),
}
