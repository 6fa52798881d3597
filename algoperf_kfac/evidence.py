"""The marginal likelihood of a model by Laplace's approximation, from Kronecker factors; free of any framework.

With data D, weights theta of the loss' minimum, a prior N(0, 1/delta_j) for each weight and the curvature H of the
negative log-likelihood summed over the data, log p(D, theta) is replaced by its second-order expansion at theta,
and the integral over P weights is that of a Gaussian, (2 pi)^(P/2) |H + Delta|^(-1/2). The prior's own density is
(2 pi)^(-P/2) |Delta|^(1/2) exp(-theta^T Delta theta / 2). Their 2 pi cancel:

    log p(D) = log p(D | theta) + 1/2 [ sum_j log delta_j - sum_j delta_j theta_j^2 - log |H + Delta| ].

(MacKay 1992; Immer et al., arXiv 2104.04975; Eschenhagen et al., arXiv 2311.00636.) H is
the Gauss-Newton matrix in blocks. For a layer with factors it is N A (x) B, N the number of examples, B per example
and A as in `docs/library.md` (expand: averaged over examples and positions; reduce: of the averaged inputs). With
eigenvalues a_i and b_j of both, and one delta for the layer,

    log |N A (x) B + delta I| = sum_ij log(N a_i b_j + delta).

Channel groups and the blocks of factors above `max_factor_dim` are blocks of this matrix, a bias is a column of the
layer. For weights without factors H is a diagonal. With the eigenvalues h of a block and gamma = sum h / (h +
delta), its effective number of parameters,

    d log p(D) / d log delta = 1/2 (gamma - delta |theta|^2).

H scales with the likelihood: for y ~ N(f, s^2) it is 1 / (2 s^2) times that of sum (f - y)^2, for a Laplace
distribution of scale s it is 1 / s^2 times that of s = 1. Either way d log|H + Delta| / d log s = -2 gamma.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, TypeAlias

from algoperf_kfac.errors import check_patterns
from algoperf_kfac.losses import LossType
from algoperf_kfac.positions import most_said

ALL = "*"
KRONECKER, DIAGONAL = "kronecker", "diagonal"
NOISY = (LossType.MEAN_SQUARED_ERROR, LossType.MEAN_ABSOLUTE_ERROR)

Precision: TypeAlias = float | Mapping[str, float]
"""One prior precision for all weights, or by pattern of names; see `assign`."""


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """p(y | f) of which a loss is the negative logarithm, up to scale and constants.

    Attributes:
        loss_type: softmax or sigmoid cross-entropy (categorical and Bernoulli labels), squared error (Gaussian) or
            absolute error (Laplace distribution).
        noise: standard deviation of the Gaussian, or scale of the Laplace distribution; 1 for the others.

    Raises:
        ValueError: for CTC, a noise <= 0, or a noise where there is none.
    """

    loss_type: LossType
    noise: float = 1.0

    def __post_init__(self) -> None:
        if self.loss_type is LossType.CTC_LOSS:
            known = [kind.name.lower() for kind in LossType if kind is not LossType.CTC_LOSS]
            raise ValueError(
                "loss_type 'ctc_loss' has no likelihood whose Gauss-Newton matrix the library knows: the evidence "
                f"is there for {known}"
            )
        if not (self.noise > 0 and math.isfinite(self.noise)):
            raise ValueError(f"noise={self.noise!r}: allowed is a finite number > 0")
        if not self.has_noise and self.noise != 1:
            raise ValueError(f"noise={self.noise!r}: {self.loss_type.name.lower()} has none, leave it out")

    @property
    def has_noise(self) -> bool:
        return self.loss_type in NOISY

    @property
    def per_loss(self) -> float:
        """What the summed loss is multiplied by to be the negative log-likelihood, up to constants."""
        if self.loss_type is LossType.MEAN_SQUARED_ERROR:
            return 0.5 / self.noise**2
        return 1 / self.noise

    @property
    def curvature(self) -> float:
        """What the Gauss-Newton matrix of the summed loss, as `fisher` has it, is multiplied by."""
        return 0.5 / self.noise**2 if self.loss_type is LossType.MEAN_SQUARED_ERROR else self.noise**-2

    def log_likelihood(self, summed_loss: float, num_labels: float) -> float:
        """log p(y | f) of all labels.

        Args:
            summed_loss: negative log-probabilities, squares or absolute values of f - y, summed.
            num_labels: how many numbers y that are.
        """
        constant = 0.0
        if self.loss_type is LossType.MEAN_SQUARED_ERROR:
            constant = 0.5 * math.log(2 * math.pi * self.noise**2)
        elif self.loss_type is LossType.MEAN_ABSOLUTE_ERROR:
            constant = math.log(2 * self.noise)
        return -self.per_loss * summed_loss - constant * num_labels

    def gradient_log_noise(self, summed_loss: float, num_labels: float) -> float:
        """d log p(y | f) / d log noise; 0 where there is none."""
        if not self.has_noise:
            return 0.0
        power = 2 if self.loss_type is LossType.MEAN_SQUARED_ERROR else 1
        return power * self.per_loss * summed_loss - num_labels


class Spectrum(Protocol):
    """The eigenvalues h of a block of H, arrays of a framework."""

    def log_det(self, scale: float, delta: float) -> tuple[float, float]:
        """sum log(scale h + delta), and gamma = sum scale h / (scale h + delta), in float64."""


@dataclasses.dataclass(frozen=True)
class Block:
    """A diagonal block of H, that of the summed loss.

    Attributes:
        name: of the layer, or of the parameter.
        kind: "kronecker" or "diagonal".
        parameters: names of its parameters.
        size: number of weights.
        squared_norm: |theta|^2 of these.
        spectrum: its eigenvalues.
    """

    name: str
    kind: str
    parameters: tuple[str, ...]
    size: int
    squared_norm: float
    spectrum: Spectrum


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What the evidence is made of: losses and curvature of the data; made by `fit_factors` or `factors_of`.

    Attributes:
        loss_type: of the loss.
        blocks: of H.
        summed_loss: the loss summed over the data; see `Likelihood.log_likelihood`.
        num_examples: number of examples N of the data.
        num_labels: number of labels that count.
        left_out: parameters that the evidence takes as fixed, with the reason.
        source: what the factors come from, for people to read.

    Raises:
        ValueError: without a layer with factors, or naming a layer whose curvature or weights are not finite.
    """

    loss_type: LossType
    blocks: tuple[Block, ...]
    summed_loss: float
    num_examples: float
    num_labels: float
    left_out: Mapping[str, str]
    source: str

    def __post_init__(self) -> None:
        if not any(block.kind == KRONECKER for block in self.blocks):
            raise no_factors()
        for block in self.blocks:
            if not math.isfinite(block.squared_norm):
                raise ValueError(f"the weights of {block.name} are not finite: take those of an earlier step")
        if not math.isfinite(self.summed_loss):
            raise ValueError(
                f"the summed loss is {self.summed_loss}: look for the batch that is not finite, or has labels "
                "outside of the classes (such as -100: labels that do not count have a mask)"
            )


@dataclasses.dataclass(frozen=True)
class Part:
    """What a block adds to the evidence.

    Attributes:
        name, kind, size: see `Block`.
        delta: its prior precision.
        prior: 1/2 (P log delta - delta |theta|^2), the logarithm of the prior's density but for its 2 pi.
        log_det: log |H + delta I|.
        effective: gamma, the effective number of parameters, in [0, size].
    """

    name: str
    kind: str
    size: int
    delta: float
    prior: float
    log_det: float
    effective: float


@dataclasses.dataclass(frozen=True)
class Evidence:
    """The log marginal likelihood, what it is made of, and its gradient; `print` it for a table.

    Attributes:
        value: log p(D), summed over the data.
        log_likelihood: log p(D | theta).
        parts: of each block; value = log_likelihood + sum over them of prior - log_det / 2.
        gradient: d value / d log delta, by the name that the prior precision was given under ("*" for one number).
        gradient_log_noise: d value / d log noise; None for a likelihood without noise.
        diagonal: names of the parameters whose curvature is a diagonal.
        left_out: see `Fitted`.
        num_examples: number of examples.
        source: what the factors come from.
    """

    value: float
    log_likelihood: float
    parts: tuple[Part, ...]
    gradient: Mapping[str, float]
    gradient_log_noise: float | None
    diagonal: tuple[str, ...]
    left_out: Mapping[str, str]
    num_examples: float
    source: str

    @property
    def effective(self) -> float:
        """The effective number of parameters of the model."""
        return sum(part.effective for part in self.parts)

    def __str__(self) -> str:
        rows = [("layer", "curvature", "weights", "effective", "delta", "log prior", "-log det / 2")]
        for part in self.parts:
            numbers = (
                f"{part.effective:.1f}",
                f"{part.delta:.3g}",
                f"{part.prior:.1f}",
                f"{-part.log_det / 2:.1f}",
            )
            rows.append((part.name, part.kind, str(part.size), *numbers))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        aligned = [
            [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
            for row in rows
        ]
        lines = ["  ".join(row).rstrip() for row in aligned]
        lines += [f"fixed: {name} ({reason})" for name, reason in self.left_out.items()]
        per_example = self.value / self.num_examples
        lines.append(
            f"log evidence {self.value:.1f} ({per_example:.4f} per example), log likelihood "
            f"{self.log_likelihood:.1f}; {self.source}"
        )
        return "\n".join(lines)


def evidence(fitted: Fitted, prior_precision: Precision = 1.0, *, noise: float = 1.0) -> Evidence:
    """The log marginal likelihood by Laplace's approximation; see the head of this file.

    Args:
        fitted: from `fit_factors` or `factors_of` of `algoperf_kfac.pytorch.evidence` or
        `algoperf_kfac.jax.evidence`.
        prior_precision: delta, one number, or a mapping from patterns of names to numbers; see `assign`.
        noise: see `Likelihood`.

    Raises:
        ValueError: for delta <= 0, a noise <= 0 or where there is none, patterns that do not fit, or naming a layer
            whose factors are not finite.
    """
    likelihood = Likelihood(fitted.loss_type, noise)
    assigned = assign(fitted.blocks, prior_precision)
    parts = []
    gradient = dict.fromkeys(assigned.deltas, 0.0)
    for block in fitted.blocks:
        key = assigned.keys[block.name]
        delta = assigned.deltas[key]
        log_det, effective = block.spectrum.log_det(likelihood.curvature, delta)
        if not math.isfinite(log_det):
            raise ValueError(f"the curvature of {block.name} is not finite: take factors of another step or batch")
        penalty = delta * block.squared_norm
        prior = 0.5 * (block.size * math.log(delta) - penalty)
        parts.append(Part(block.name, block.kind, block.size, delta, prior, log_det, effective))
        gradient[key] += 0.5 * (effective - penalty)
    log_likelihood = likelihood.log_likelihood(fitted.summed_loss, fitted.num_labels)
    of_noise = None
    if likelihood.has_noise:
        of_labels = likelihood.gradient_log_noise(fitted.summed_loss, fitted.num_labels)
        of_noise = of_labels + sum(part.effective for part in parts)
    return Evidence(
        value=log_likelihood + math.fsum(part.prior - 0.5 * part.log_det for part in parts),
        log_likelihood=log_likelihood,
        parts=tuple(parts),
        gradient=gradient,
        gradient_log_noise=of_noise,
        diagonal=tuple(block.name for block in fitted.blocks if block.kind == DIAGONAL),
        left_out=fitted.left_out,
        num_examples=fitted.num_examples,
        source=fitted.source,
    )


class Assigned(NamedTuple):
    """Prior precisions as they were given.

    Attributes:
        deltas: by pattern.
        keys: by name of a block, the pattern it takes.
    """

    deltas: dict[str, float]
    keys: dict[str, str]


def assign(blocks: Sequence[Block], prior_precision: Precision) -> Assigned:
    """Which block takes which prior precision.

    Args:
        blocks: of H.
        prior_precision: a number for all, or by pattern (fnmatch) of the names of blocks or of their parameters. Of
            several that match a block takes the one that fixes most characters, a name itself first.

    Raises:
        ValueError: for delta <= 0, a pattern that no block takes its precision from, or a block without one.
    """
    deltas, keys = check_precisions(prior_precision), {}
    for block in blocks:
        pattern = most_said("prior_precision", (block.name, *block.parameters), deltas)
        if pattern is None:
            raise ValueError(
                f"prior_precision: no pattern matches {block.name}; give it one, or {ALL!r} for what is left"
            )
        keys[block.name] = pattern
    check_patterns("prior_precision", deltas, deltas.keys() - keys.values(), "layer or parameter that is left")
    return Assigned(deltas, keys)


def check_precisions(prior_precision: Precision) -> dict[str, float]:
    """Prior precisions by pattern, "*" for a single number.

    Raises:
        ValueError: for delta <= 0.
    """
    deltas = dict(prior_precision) if isinstance(prior_precision, Mapping) else {ALL: prior_precision}
    for pattern, delta in deltas.items():
        if not (isinstance(delta, int | float) and delta > 0 and math.isfinite(delta)):
            where = "" if pattern == ALL else f" of {pattern!r}"
            raise ValueError(f"prior_precision={delta!r}{where}: allowed is a finite number > 0")
    return deltas


def per_layer(fitted: Fitted, prior_precision: float = 1.0) -> dict[str, float]:
    """The same prior precision for every layer by its weight's name, to be learned apart.

    Parts of one parameter (experts, fused projections) share one, as they share its weight decay.
    """
    return {block.parameters[0]: prior_precision for block in fitted.blocks}


def no_factors() -> ValueError:
    """The error for a model, or a batch of it, without a covered layer."""
    return ValueError(
        "the model has no layer with factors: the evidence needs one at least (print(KFAC(model).coverage()) says "
        "why each parameter has none)"
    )
