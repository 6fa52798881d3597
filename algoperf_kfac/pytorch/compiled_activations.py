"""What a model that torch.compile compiles keeps for its backward pass: less than autograd would."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class _Counted(Exception):
    """The forward pass was made a graph of, and counted: there is no need to run it."""


def kept_when_compiled(model: nn.Module, run: Callable[[Any], object]) -> float | None:
    """Bytes that the graph of the forward pass hands to that of the backward pass; outputs and parameters not.

    The graphs are those of torch.compile's default backend, which computes again in the backward pass what it would
    otherwise read from memory (the minimal cut of the joint graph). Neither runs: the batch may be of any size.

    Args:
        model: on the CPU, where attention is fused as on a GPU, and not on the meta device.
        run: its forward pass in training.

    Returns:
        None where the model is not one graph, or this torch makes none of it.
    """
    try:
        from torch._dynamo.backends.common import aot_autograd
        from torch._functorch.partitioners import min_cut_rematerialization_partition
        from torch._guards import TracingContext
        from torch._inductor import lowering  # noqa: F401 - decompositions ask for it
        from torch._inductor.decomposition import select_decomp_table
    except ImportError:
        return None
    kept: list[float] = []

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        context = TracingContext.get()
        metadata = None if context is None else context.fw_metadata
        assert metadata is not None
        (handed,) = next(node for node in graph.graph.nodes if node.op == "output").args
        saved = dict.fromkeys(handed[metadata.num_forward_returns :])
        values = [node.meta.get("val") for node in saved if node is not None and node.op != "placeholder"]
        storages = [value.untyped_storage() for value in values if isinstance(value, Tensor)]
        kept.append(float(sum({storage._cdata: storage.nbytes() for storage in storages}.values())))
        raise _Counted

    partition = functools.partial(min_cut_rematerialization_partition, compiler="inductor")
    backend = aot_autograd(
        fw_compiler=count, bw_compiler=count, partition_fn=partition, decompositions=select_decomp_table()
    )
    torch._dynamo.reset()
    try:
        run(torch.compile(model, backend=backend, fullgraph=True, dynamic=False))
    except Exception:
        return kept[0] if kept else None
    finally:
        torch._dynamo.reset()
    return None
