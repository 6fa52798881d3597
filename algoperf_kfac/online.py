"""Prior precisions that learn while a model trains: Adam on log delta of the evidence; free of any framework.

Every F epochs the curvature is fitted anew, K steps of Adam raise the evidence in log delta (and in log noise, if
it is to be learned) with weights and curvature held, and delta becomes the weight decay of its layer (Immer et al.,
arXiv 2104.04975, algorithm 1).

What delta is as a weight decay. The weights of largest posterior density minimise the negative log-likelihood plus
delta |theta|^2 / 2. Divided by what turns the negative log-likelihood into the loss that is trained on, c times the
summed loss over D (`Likelihood.per_loss`; D the number of examples for a mean over them),

    loss(theta) + w |theta|^2 / 2,    w = delta / (c D);

w = delta / N for cross-entropy averaged over examples, 2 s^2 delta / N for squared errors with noise s.

Where the decay acts. An optimizer moves along P g, P positive definite, g the gradient of the loss.

- Coupled (`add_prior_gradient`, `prior_gradient`): w theta is part of the gradient, p <- p - lr P (g + w theta). It
  rests where g + w theta = 0, whatever P is: at the most probable weights. Grafting multiplies P (g + w theta) by a
  positive number, and leaves that point where it is. Statistics do not see w theta, as they are of the likelihood.
- Decoupled (`set_weight_decay`, `decay_by_parameter`, what `weight_decay` is in KFAC and AdamW):
  p <- p - lr (P g + w theta). It rests where g = -w P^-1 theta, at the most probable weights of another prior, of
  precision matrix c D w P^-1. With P the inverse curvature (power 1, no damping) of a quadratic loss around theta*
  that is theta* / (1 + w): all directions shrink alike, those that the data say nothing of as little as the others.
  Only where P = 1 / lambda in units of the loss, for instance in flat directions under an absolute damping lambda,
  is the prior's precision c D w lambda. A decay of w / lambda would restore it there, and nowhere else.
- Decoupled with grafting: P becomes s P, s the length of NadamW's step over that of P g. Where gradients are mostly
  noise of root mean square r, that step is about g / r, and s sets the scale of P: precisions are of the size c D w
  r. Where they are not, NadamW's step does not shrink with g, and the weights of a layer whose root mean square is
  below 1 / w come to rest where they would without decay (Xie and Li, arXiv 2404.04454, for AdamW). w is a rate of
  decay whose ratios between layers the evidence has chosen, and no prior precision.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from algoperf_kfac.errors import check_loss_normalizer
from algoperf_kfac.evidence import (
    ALL,
    Evidence,
    Fitted,
    Likelihood,
    Precision,
    assign,
    check_precisions,
    evidence,
    per_layer,
)
from algoperf_kfac.losses import LossType

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
NOISE = "noise"  # among the names of what is learned; those of precisions have a prefix
LEARNED_BY = ("model", "layer")


@dataclasses.dataclass
class _Moments:
    """Adam's state of one number."""

    first: float = 0.0
    second: float = 0.0

    def step(self, gradient: float, count: int) -> float:
        """The direction to go up, of the length of about 1."""
        self.first += (1 - BETA1) * (gradient - self.first)
        self.second += (1 - BETA2) * (gradient**2 - self.second)
        return self.first / (1 - BETA1**count) / (math.sqrt(self.second / (1 - BETA2**count)) + EPS)


class OnlineEvidence:
    """Prior precisions that follow the evidence in training.

    ```
    online = OnlineEvidence(by="layer", every=5)
    for epoch in range(epochs):
        train(...)
        if online.is_due(epoch):
            found = online.update(fit_factors(model, loader, "softmax_cross_entropy"))
            set_weight_decay(optimizer, model, online.weight_decays())
    ```

    Args:
        prior_precision: where delta begins: a number, or a mapping from patterns of names (`evidence.assign`), each
            of which is learned for itself.
        by: with a number, whether the "model" has one or each "layer".
        every: F, epochs between updates.
        burn_in: epochs before the first one.
        steps: K, steps of Adam in an update.
        learning_rate: of Adam on log delta.
        noise: where the noise of the likelihood begins; see `Likelihood`.
        learn_noise: whether it is learned, too.

    Attributes:
        prior_precision: delta as it is now.
        noise: the same of the noise.

    Raises:
        ValueError: for an argument out of range.
    """

    def __init__(
        self,
        prior_precision: Precision = 1.0,
        *,
        by: str = "model",
        every: int = 1,
        burn_in: int = 0,
        steps: int = 100,
        learning_rate: float = 0.1,
        noise: float = 1.0,
        learn_noise: bool = False,
    ) -> None:
        for name, value, least in (("every", every, 1), ("steps", steps, 1), ("burn_in", burn_in, 0)):
            if value < least or value != int(value):
                raise ValueError(f"{name}={value!r}: allowed is a whole number of at least {least}")
        if not learning_rate > 0:
            raise ValueError(f"learning_rate={learning_rate!r}: allowed is a number > 0")
        if by not in LEARNED_BY:
            raise ValueError(f"by={by!r}: allowed is one of {LEARNED_BY}")
        if by == "layer" and isinstance(prior_precision, Mapping):
            raise ValueError("by='layer' begins with one number: give a mapping without it")
        check_precisions(prior_precision)
        self.prior_precision: Precision = prior_precision
        self.noise = noise
        self._by, self._every, self._burn_in, self._num_steps = by, every, burn_in, steps
        self._learning_rate, self._learn_noise = learning_rate, learn_noise
        self._moments: dict[str, _Moments] = {}
        self._count = 0
        # Of the latest update: names of parameters by pattern, the loss, and the number of examples.
        self._sets: dict[str, tuple[str, ...]] = {}
        self._loss_type, self._num_examples = LossType.SOFTMAX_CROSS_ENTROPY, 0.0

    def is_due(self, epoch: int) -> bool:
        """Whether an update is due after this epoch, counted from 0."""
        return epoch >= self._burn_in and (epoch + 1 - self._burn_in) % self._every == 0

    def update(self, fitted: Fitted) -> Evidence:
        """Raise the evidence by K steps of Adam.

        Args:
            fitted: from `fit_factors` or `factors_of`, of the model as it is.

        Returns:
            The evidence at the new precisions.

        Raises:
            ValueError: see `evidence.evidence`; and to learn the noise of a likelihood without.
        """
        if self._learn_noise and not Likelihood(fitted.loss_type).has_noise:
            raise ValueError(f"learn_noise: {fitted.loss_type.name.lower()} has none")
        if self._by == "layer" and not isinstance(self.prior_precision, Mapping):
            self.prior_precision = per_layer(fitted, self.prior_precision)
        self._note(fitted)
        found = evidence(fitted, self.prior_precision, noise=self.noise)
        for _ in range(self._num_steps):
            self._step(found)
            found = evidence(fitted, self.prior_precision, noise=self.noise)
        return found

    def _note(self, fitted: Fitted) -> None:
        keys = assign(fitted.blocks, self.prior_precision).keys
        names: dict[str, dict[str, None]] = {}
        for block in fitted.blocks:
            names.setdefault(keys[block.name], {}).update(dict.fromkeys(block.parameters))
        self._sets = {key: tuple(own) for key, own in names.items()}
        self._loss_type, self._num_examples = fitted.loss_type, fitted.num_examples

    def _step(self, found: Evidence) -> None:
        self._count += 1

        def moved(name: str, value: float, gradient: float) -> float:
            moments = self._moments.setdefault(name, _Moments())
            # Per example, so that eps means the same for all sizes of data.
            direction = moments.step(gradient / found.num_examples, self._count)
            return value * math.exp(self._learning_rate * direction)

        if isinstance(self.prior_precision, Mapping):
            self.prior_precision = {
                key: moved(f"delta {key}", delta, found.gradient[key])
                for key, delta in self.prior_precision.items()
            }
        else:
            self.prior_precision = moved(f"delta {ALL}", self.prior_precision, found.gradient[ALL])
        if self._learn_noise and found.gradient_log_noise is not None:
            self.noise = moved(NOISE, self.noise, found.gradient_log_noise)

    def weight_decays(self, loss_normalizer: float | None = None) -> dict[tuple[str, ...], float]:
        """The weight decay of each set of parameters, w at the head of this file.

        Args:
            loss_normalizer: what the summed loss over all data is divided by in the loss that is trained on; the
                number of examples by default, right for a mean over them. For a mean over tokens the number of
                tokens, for torch's mse_loss that of all outputs.

        Returns:
            By names of the parameters that share one; those that the evidence takes as fixed are in none.

        Raises:
            RuntimeError: before the first update.
            TypeError, ValueError: for a `loss_normalizer` that is no number above 0.
        """
        if loss_normalizer is not None:
            check_loss_normalizer(loss_normalizer)
        if not self._sets:
            raise RuntimeError("no update yet: call update(fit_factors(...)) first")
        divided = self._num_examples if loss_normalizer is None else loss_normalizer
        scale = 1 / (Likelihood(self._loss_type, self.noise).per_loss * divided)
        deltas = self.prior_precision if isinstance(self.prior_precision, Mapping) else {ALL: self.prior_precision}
        return {names: deltas[key] * scale for key, names in self._sets.items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on; numbers and strings alone."""
        moments = {name: (own.first, own.second) for name, own in self._moments.items()}
        delta = self.prior_precision
        return {
            "prior_precision": dict(delta) if isinstance(delta, Mapping) else delta,
            "noise": self.noise,
            "moments": moments,
            "count": self._count,
            "sets": dict(self._sets),
            "loss_type": self._loss_type.name,
            "num_examples": self._num_examples,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.prior_precision, self.noise = state["prior_precision"], state["noise"]
        self._moments = {name: _Moments(*own) for name, own in state["moments"].items()}
        self._count = state["count"]
        self._sets = {key: tuple(names) for key, names in state["sets"].items()}
        self._loss_type, self._num_examples = LossType[state["loss_type"]], state["num_examples"]


def by_parameter(decays: Mapping[tuple[str, ...], float]) -> dict[str, float]:
    """`OnlineEvidence.weight_decays` by single parameters."""
    return {name: decay for names, decay in decays.items() for name in names}
