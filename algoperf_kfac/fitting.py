"""Fits of the curvature for the evidence, in either framework: what they ask of data and configuration."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.errors import listed
from algoperf_kfac.evidence import Likelihood
from algoperf_kfac.layers import LayerSpec
from algoperf_kfac.losses import LossType, loss_type_of

FITTED_FISHERS = ("exact", "mc")


def fitting_config(
    loss_type: enum.Enum | str, config: KFACConfig | None, hyperparameters: Mapping[str, object]
) -> tuple[LossType, KFACConfig]:
    """The loss and the configuration of a fit: the exact Fisher, if nothing is said.

    Raises:
        ValueError: for the empirical Fisher, which is no curvature at a minimum; for a loss without likelihood, or
            a hyperparameter out of range.
    """
    kind = loss_type_of(loss_type)
    Likelihood(kind)
    said = config is not None or "fisher" in hyperparameters
    config = KFACConfig.updated(config, hyperparameters if said else {**hyperparameters, "fisher": "exact"})
    if config.fisher not in FITTED_FISHERS:
        raise ValueError(
            f"fisher={config.fisher!r}: the evidence needs the curvature of the likelihood, allowed is one of "
            f"{FITTED_FISHERS}"
        )
    return kind, config


class Example(NamedTuple):
    """What a batch is made of.

    Attributes:
        args: of the model.
        targets: labels: whole numbers or probabilities (..., C) for softmax cross-entropy; else the outputs' shape.
        mask: 1 where a label counts, shape of the labels or of its first dimensions; None where all do.
    """

    args: tuple[Any, ...]
    targets: Any
    mask: Any = None


Split: TypeAlias = Callable[[Any], tuple[Any, ...]]
"""From a batch to (args, targets) or (args, targets, mask)."""


def split_batch(batch: Any) -> Example:
    """A batch as it usually comes: (inputs, targets), (inputs, targets, mask), or a mapping with "inputs",
    "targets" and perhaps "weights". Inputs that are a tuple are several arguments.

    Raises:
        ValueError: for another batch.
    """
    if isinstance(batch, Mapping) and {"inputs", "targets"} <= batch.keys():
        inputs, targets, mask = batch["inputs"], batch["targets"], batch.get("weights")
    elif isinstance(batch, list | tuple) and len(batch) in (2, 3):
        inputs, targets, mask = (*batch, None)[:3]
    else:
        what = f"keys {sorted(batch)}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
        raise ValueError(
            f"a batch of the loader has {what}: give split=, a function from a batch to (args, targets) or "
            "(args, targets, mask), args being a tuple of the model's arguments"
        )
    return Example(inputs if isinstance(inputs, tuple) else (inputs,), targets, mask)


def batches_of(loader: Iterable[Any]) -> Iterator[Any]:
    """The batches of a loader, which all have the same form.

    Raises:
        ValueError: without a batch, or naming the batch whose keys are others than those of the first.
    """
    first: object = None
    for number, batch in enumerate(loader):
        if isinstance(batch, Mapping):
            keys: object = sorted(batch)
        else:
            keys = len(batch) if isinstance(batch, list | tuple) else type(batch).__name__
        if number == 0:
            first = keys
        elif keys != first:
            what = "keys" if isinstance(batch, Mapping) else "parts"
            raise ValueError(
                f"batch {number} of the loader has {what} {keys}, the first has {first}: all batches must be of "
                "one form"
            )
        yield batch
    if first is None:
        raise ValueError("the loader has no batch: an iterator can be gone through once, give a loader or a list")


def check_examples(num_examples: float) -> None:
    """Raises ValueError where nothing counted."""
    if not num_examples > 0:
        raise ValueError("the loader's batches have no example that counts: look at their mask")


def check_scale(spec: LayerSpec, *, whole_in_a: bool) -> None:
    """Raises ValueError, naming the layer, where a factor is the identity without being meant to be.

    Args:
        spec: the layer.
        whole_in_a: whether A stands for the whole product, as for a tied table.
    """
    if spec.in_blocks and (spec.out_blocks or whole_in_a):
        return
    raise ValueError(
        f"layer {spec.name}: its {'B' if spec.in_blocks else 'A'} is taken as the identity, which has no scale: "
        "take large_factor='block', or a larger max_factor_dim"
    )


def described(config: KFACConfig, num_batches: int) -> str:
    """What factors of a pass over a loader come from."""
    choice = config.approximation
    how = choice if isinstance(choice, str) else "/".join(sorted({"expand", *choice.values()}))
    drawn = f"sampled Fisher, {config.fisher_samples} per example" if config.fisher == "mc" else "exact Fisher"
    return f"K-FAC-{how}, {drawn}, {num_batches} batches of the loader"


def of_averages(config: KFACConfig) -> str:
    """What factors of an optimizer come from."""
    return f"moving averages of the optimizer, fisher={config.fisher!r}"


NO_DIAGONAL = "the optimizer keeps no curvature of it"
UNCALLED = "no batch called it"
IN_PARTS = "read in parts, of which some have factors"


def check_targets(loss_type: LossType, outputs: Sequence[int], targets: Sequence[int]) -> None:
    """Raises ValueError, with both shapes, where labels do not fit the outputs (classes last)."""
    outputs, targets = tuple(outputs), tuple(targets)
    allowed = [outputs]
    if loss_type is LossType.SOFTMAX_CROSS_ENTROPY:
        allowed.append(outputs[:-1])
    if targets not in allowed:
        raise ValueError(
            f"targets of shape {targets} do not fit outputs of shape {outputs} for {loss_type.name.lower()}: "
            f"allowed is {listed(map(str, allowed))}; class_dim= says where the classes are"
        )
