"""What K-FAC knows of a model: its covered layers, and why each other parameter is not covered."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

from algoperf_kfac.config import TABLE, KFACConfig
from algoperf_kfac.positions import name_fits

Sizes = tuple[int, ...]
Layout = tuple[Sizes, ...]  # see `LayerSpec.layout`

# Reasons for not covering a parameter, where both frameworks or several places give them.
EXCLUDED = "excluded by the user"
RAW = "raw parameter: covered from the first statistics step on if an operation with a rule reads it"
REST = "what no operation with a rule has read so far of a parameter that is read in parts"
BIAS_APART = "bias that is read apart from its weight"
BIAS_OF_SHARED = "bias of a layer whose weight other modules share"
EMBEDDING = "embedding: its inputs are one-hot, A would be a diagonal of counts"
NORMALISATION = "normalisation"  # of which module follows
UNREAD = "no operation with a rule reads it"
SHARED_BIAS = "bias that several layers share"
PARTIAL_BIAS = "bias of a layer whose output is read without it, too"
WITHOUT_ELEMENTS = "its weight has no elements"
SCRIPTED = "in a torch.jit program, of which no operation is seen: torch.compile takes its place"
STOPPED = "its gradient is stopped before it is read"

# What a layer may miss.
INPUTS = "its inputs"
OUTPUT_GRADIENTS = "its output gradients"
TRANSFORMED_INPUTS = "its inputs, inside torch.func"

# Statistics steps after which a layer that none of them has seen is taken for a mistake.
NEVER_SEEN = 10
# How far captured pairs may be from a weight's gradient: a share of it, and rounding units of what was summed.
MAX_ERROR = 0.02
ROUNDING = 16.0


def too_large(config: KFACConfig) -> str:
    """The reason of a layer both of whose factors are the identity."""
    return f"both factors above max_factor_dim={config.max_factor_dim}"


def also_read_by(operation: str) -> str:
    """The reason of a weight with another use than those that are recorded."""
    return f"also read by {operation}: K-FAC would miss that use"


def no_rule(operation: str) -> str:
    """The reason of a parameter that an operation without a rule reads."""
    return f"read by {operation}, which has no rule"


def computed_before(operation: str) -> str:
    """The reason of a weight that an operation reads as a function of itself (scaled, normalised, masked)."""
    return f"{operation} reads a function of it, not the parameter itself"


def unrecorded(operation: str) -> str:
    """The reason of a weight that an operation reads and no rule records: a function of it, or a form that is named
    in words."""
    return no_rule(operation) if " " in operation else computed_before(operation)


def not_its_gradient(share: float) -> str:
    """The reason of a layer whose captured inputs and output gradients do not make up its weight's gradient."""
    return (
        f"its captured inputs and output gradients miss {100 * share:.0f} % of its gradient: a use is not recorded"
    )


def one_parameter(names: Sequence[str]) -> str:
    """The reason of a parameter that several modules share."""
    return f"tied weight: {' and '.join(names)} are one parameter"


def missed_statistics(what: str) -> str:
    """The reason of a layer that left because it missed something."""
    return f"missed {what} on a statistics step"


def inputs_of_gone(weight: str) -> str:
    """What a layer missed whose weight another one has replaced, or that was removed."""
    return f"its inputs, as the model has no {weight} any more"


def gradients_of_calls(lost: int, calls: int) -> str:
    """What a layer missed some of whose calls had no part in the loss, once they were in its sums."""
    return f"the output gradients of {lost} of its {calls} calls, too many to be kept apart until it was known"


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """A covered weight-sharing layer s = W a (+ bias), per channel group.

    Attributes:
        name: path of the module that owns the weight.
        kind: "linear", "conv", "conv_transpose", "embedding" for a table that is the output layer, too, or that of
            a file in `kinds`.
        weight: name of the weight parameter.
        bias: name of the bias parameter, or None.
        weight_shape: the parameter's shape as the framework stores it.
        groups: channel groups; each has factors of its own.
        in_dim: P_in per group: input features, for convolutions times the kernel positions.
        out_dim: P_out per group.
        approximation: "expand", "reduce" or "mixed".
        in_blocks: sizes of A's diagonal blocks, the bias coordinate included; empty for A = identity.
        out_blocks: sizes of B's diagonal blocks; empty for B = identity.
        layout: where the matrix lies in the stored weight, if not simply in its order: sizes, strides and (offset,)
            of the view that runs over outputs, then inputs; see `pytorch/views.py`. It may be a part of the weight.
        bias_start: where its bias begins in the stored one, of a layer that has a part of it.
        spatial: of a "mixed" layer, whether its kernel reads several positions.
    """

    name: str
    kind: str
    weight: str
    bias: str | None
    weight_shape: tuple[int, ...]
    groups: int
    in_dim: int
    out_dim: int
    approximation: str
    in_blocks: tuple[int, ...]
    out_blocks: tuple[int, ...]
    layout: Layout = ()
    bias_start: int | None = None
    spatial: bool = False

    @property
    def reduces_inputs(self) -> bool:
        """Whether A is formed of inputs averaged over positions.

        Patches averaged over positions are nearly the same at all offsets of a kernel: A would be almost singular
        in all other directions, and the update go where the loss does not see it.
        """
        return self.approximation == "reduce" or (self.approximation == "mixed" and not self.spatial)

    @property
    def reduces_outputs(self) -> bool:
        """Whether B is formed of output gradients summed over positions."""
        return self.approximation != "expand"

    @property
    def watches_sums(self) -> bool:
        """Whether the identity stands for B where these sums vanish."""
        return self.approximation == "mixed" and bool(self.out_blocks)

    @property
    def is_part(self) -> bool:
        """Whether the weight has other elements, too."""
        return bool(self.layout) and math.prod(self.layout[0]) < math.prod(self.weight_shape)

    @property
    def load_name(self) -> str:
        """What a load (`cost.py`) is listed by: the weight's name, or the layer's where it is a part of one."""
        return self.name if self.is_part else self.weight

    @property
    def factor_in_dim(self) -> int:
        """Dimension of A: P_in, plus one for the homogeneous coordinate of the bias."""
        return self.in_dim + (self.bias is not None)

    @property
    def num_parameters(self) -> int:
        return self.groups * self.out_dim * self.factor_in_dim

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Sizes of all diagonal blocks of one group: of A, then of B."""
        return (*self.in_blocks, *self.out_blocks)

    @property
    def has_factors(self) -> bool:
        """Whether A or B is more than the identity."""
        return bool(self.block_sizes)


def make_spec(
    *,
    name: str,
    kind: str,
    weight: str,
    bias: str | None,
    weight_shape: tuple[int, ...],
    groups: int,
    in_dim: int,
    out_dim: int,
    config: KFACConfig,
    kernel: int = 1,
    parts: int = 1,
    layout: Layout = (),
    bias_start: int | None = None,
) -> LayerSpec:
    """The spec of a layer; without factors (`has_factors`) where both are too large.

    The vocabulary side of a tied table is taken as the identity.

    Args:
        name, kind, weight, bias, weight_shape, groups, in_dim, out_dim: see `LayerSpec`.
        config: decides the approximation and the block sizes.
        kernel: positions that a kernel reads.
        parts: into how many equal parts the outputs are cut before large factors are.
        layout, bias_start: see `LayerSpec`.
    """
    in_blocks, part = (
        split_blocks(dim, config.max_factor_dim, config.large_factor)
        for dim in (in_dim + (bias is not None), out_dim // parts)
    )
    approximation = config.approximation_for(kind)
    return LayerSpec(
        name=name,
        kind=kind,
        weight=weight,
        bias=bias,
        weight_shape=weight_shape,
        groups=groups,
        in_dim=in_dim,
        out_dim=out_dim,
        approximation=approximation,
        in_blocks=in_blocks,
        out_blocks=() if kind == TABLE else part * parts,
        layout=layout,
        bias_start=bias_start,
        spatial=approximation == "mixed" and kernel > 1,
    )


def parts_of(name: str, kind: str, shape: Sequence[int], splits: Mapping[str, int]) -> int:
    """Into how many parts a layer's outputs are cut.

    Args:
        name: the layer's.
        kind: its kind.
        shape: of its weight, outputs first.
        splits: pattern (fnmatch) of names -> number of parts.

    Raises:
        ValueError: if they cannot be cut into equal parts.
    """
    for pattern, parts in splits.items():
        if not name_fits(name, pattern):
            continue
        if kind != "linear" or parts < 1 or shape[0] % parts:
            raise ValueError(
                f"output_splits[{pattern!r}]={parts} does not fit {name}, a {kind} layer of shape {tuple(shape)}: "
                "allowed are linear layers and a divisor of their outputs"
            )
        return parts
    return 1


def matches(names: Iterable[str], patterns: Iterable[str]) -> bool:
    """Whether one of the names fits one of the patterns (fnmatch)."""
    patterns = list(patterns)
    return any(name_fits(name, pattern) for name in names for pattern in patterns)


@dataclasses.dataclass(frozen=True)
class FallbackSpec:
    """A parameter that takes the first-order update.

    Attributes:
        name: the parameter's name.
        shape: its shape.
        reason: why K-FAC does not cover it.
    """

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclasses.dataclass(frozen=True)
class Coverage:
    """Which parameters K-FAC handles; `print` it for a table.

    Attributes:
        layers: the covered layers.
        fallbacks: the other parameters.
        note: what else is to say, below the table: of a model that torch.compile compiled, how statistics
            steps run.
    """

    layers: tuple[LayerSpec, ...]
    fallbacks: tuple[FallbackSpec, ...]
    note: str = ""

    @property
    def num_covered(self) -> int:
        return sum(layer.num_parameters for layer in self.layers)

    @property
    def num_parameters(self) -> int:
        return self.num_covered + sum(math.prod(f.shape) for f in self.fallbacks)

    @property
    def fraction(self) -> float:
        """Share of the trainable parameters with a K-FAC direction, in [0, 1]."""
        return self.num_covered / self.num_parameters if self.num_parameters else 0.0

    def __str__(self) -> str:
        rows = [("parameters", "treatment", "A", "B", "note")]
        for layer in self.layers:
            note = "" if layer.groups == 1 else f"{layer.groups} groups"
            names = layer.weight if layer.bias is None else f"{layer.weight} + bias"
            rows.append(
                (
                    names,
                    f"{layer.kind} {layer.approximation}",
                    _blocks(layer.in_blocks),
                    _blocks(layer.out_blocks),
                    note,
                )
            )
        rows += [(f.name, "fallback", "", "", f.reason) for f in self.fallbacks]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]]).rstrip()
            for row in rows
        ]
        covered, total = self.num_covered, self.num_parameters
        lines.append(f"K-FAC covers {covered:,} of {total:,} parameters ({100 * self.fraction:.1f} %)")
        if self.note:
            lines.append(self.note)
        return "\n".join(lines)


def _blocks(blocks: tuple[int, ...]) -> str:
    return "+".join(map(str, blocks)) if blocks else "identity"


def split_blocks(dim: int, max_factor_dim: int, large_factor: str) -> tuple[int, ...]:
    """Sizes of a factor's diagonal blocks: one where it fits, near-equal ones above, none for the identity.

    Args:
        dim: dimension of the factor.
        max_factor_dim: largest matrix to decompose.
        large_factor: "block" or "one_sided".
    """
    if dim <= max_factor_dim:
        return (dim,)
    if large_factor == "one_sided":
        return ()
    count = -(-dim // max_factor_dim)
    base, extra = divmod(dim, count)
    return tuple(base + (i < extra) for i in range(count))
