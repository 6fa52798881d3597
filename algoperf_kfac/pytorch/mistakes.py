"""Mistakes that would not show in the loss: each is named once, with the way out."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from algoperf_kfac import judging
from algoperf_kfac.config import KFACConfig
from algoperf_kfac.errors import listed, warn
from algoperf_kfac.layers import (
    EMBEDDING,
    EXCLUDED,
    NORMALISATION,
    WITHOUT_ELEMENTS,
    FallbackSpec,
    inputs_of_gone,
    too_large,
)
from algoperf_kfac.positions import in_parts, more_rows, other_rows

TIMES_ASKED = 3
# How far from any multiple of itself a gradient may be at the step, relative to its length: clipping and a scaler's
# factor are multiples, rounded once more. And how many numbers tell.
MULTIPLE = 0.01
ENOUGH = 64
# From here on a power of two that a loss is multiplied by is taken for that of a GradScaler, which begins at 2^16.
SCALED = 1024.0


class Mistakes:
    """Watches the captures of one optimizer.

    Args:
        model: the bare model.
        params: the parameters the optimizer trains, by name.
    """

    # On the class: states that were pickled before have none.
    _own_gradient: tuple[Tensor, Tensor] | None = None  # a weight, and what was its gradient
    _gradients_compared = 0
    _loss_asked = False

    def __init__(self, model: nn.Module, params: Mapping[str, Tensor]) -> None:
        self._model = model
        self._gradients_asked = 0
        self._loss_asked = False
        self._named: set[str] = set()
        self._left_out: dict[str, Tensor] = {}
        self._thawed: set[str] = set()  # those named so far
        self.take(params)
        self._frozen = {name for name, p in self._left_out.items() if not p.requires_grad}

    def take(self, params: Mapping[str, Tensor]) -> None:
        """These are the parameters the optimizer trains from now on."""
        # Strong references, so that identities stay theirs.
        self._trained = dict(params)
        self._left_out = {name: p for name, p in self._model.named_parameters() if name not in params}

    def gradients_before(self, weights: Iterable[Tensor]) -> None:
        """Gradients are there that no capture has seen: B would belong to a part of them."""
        grads = [p.grad for p in weights if p.grad is not None]
        if not grads or self._gradients_asked >= TIMES_ASKED:
            return
        self._gradients_asked += 1  # asking waits for the device
        if any(bool(grad.any()) for grad in grads):
            self._gradients_asked = TIMES_ASKED
            warn(
                "there are gradients already that no capture() saw: statistics will be those of a part of the "
                "step's batch. With gradient accumulation put each micro-batch into a capture of its own, and give "
                "the number of examples of the whole step: capture(loss_normalizer=N)"
            )

    def loss_scaled(
        self, mean: Tensor | None, total: Tensor | None, inner_sizes: Collection[int], *, scaled: bool
    ) -> None:
        """A loss that is no mean over examples, where nobody said what it was divided by.

        A GradScaler multiplies it, or it is a sum that nothing divides.

        Args:
            mean: what the mean of a loss function got, if that is known.
            total: what the sum of one got, if that is known and none was a mean.
            inner_sizes: what a mean over all elements may be multiplied by to be one over examples.
            scaled: whether the caller said what the loss was divided by.
        """
        gradient = total if mean is None else mean
        if gradient is None or gradient.is_meta or scaled or self._loss_asked:
            return
        self._loss_asked = True  # asking waits for the device
        factor = abs(float(gradient))
        if SCALED <= factor < math.inf and math.frexp(factor)[0] == 0.5 and factor not in inner_sizes:
            warn(
                f"the loss was multiplied by {factor:.0f} before backward(), and B is that of the loss times as "
                "much. With a GradScaler say so: capture(loss_normalizer=len(x) / scaler.get_scale())"
            )
        elif mean is None and factor == 1:
            warn(
                "the loss is a sum over examples that nothing was divided by before backward(), and B is scaled as "
                "that of a mean: say capture(loss_normalizer=1)"
            )

    def gradient_after(self, weights: Iterable[Tensor]) -> None:
        """Remember what backward passes of this process made of one of the gradients."""
        if "processes" in self._named or self._gradients_compared >= TIMES_ASKED:
            return
        there = [(w, w.grad) for w in weights if w.grad is not None]
        there = [(w, grad) for w, grad in there if not (grad.is_sparse or grad.is_meta)]
        if there:
            weight, grad = min(there, key=lambda pair: (pair[1].numel() < ENOUGH, abs(pair[1].numel() - ENOUGH)))
            self._own_gradient = weight, grad.detach().clone()

    def forget_gradient(self) -> None:
        """It may be cleared before the next capture, or others may be added that none sees."""
        self._own_gradient = None

    def gradient_at_step(self, strangers: int) -> None:
        """See whether the gradient is a multiple of what it was: the average over processes is none.

        It takes no message to other processes, which may be doing something else.

        Args:
            strangers: how many processes there are that share nothing with this one.
        """
        if self._own_gradient is None:
            return
        (weight, before), self._own_gradient = self._own_gradient, None
        if not strangers or weight.grad is None or weight.grad.shape != before.shape:
            return
        self._gradients_compared += 1  # comparing waits for the device
        before, now = before.flatten().float(), weight.grad.detach().flatten().float().to(before.device)
        rest = now - before * (before @ now / (before @ before))
        if bool(rest.norm() > MULTIPLE * now.norm()):  # not where either is not finite
            self._named.add("processes")
            name = next((name for name, p in self._trained.items() if p is weight), "a weight")
            warn(
                f"the gradient of {name} changed between backward() and step(), by more than a factor, in one of "
                f"{strangers + 1} processes that share no statistics. If it is averaged over processes here, their "
                "models drift apart: say KFAC(model, process_group=torch.distributed.group.WORLD). Models trained "
                "side by side need nothing"
            )

    def uncovered(self, fallbacks: Sequence[FallbackSpec], config: KFACConfig, *, captured: bool) -> None:
        """No layer is covered after a statistics step, though the model has matrices that nobody left out.

        Args:
            fallbacks: the parameters.
            config: the configuration.
            captured: whether the step had a capture.
        """
        meant = {EXCLUDED, EMBEDDING, WITHOUT_ELEMENTS, too_large(config)}
        others = [f for f in fallbacks if f.reason not in meant and not f.reason.startswith(NORMALISATION)]
        matrices = [f for f in others if sum(size > 1 for size in f.shape) > 1]
        if not matrices or "uncovered" in self._named:
            return
        self._named.add("uncovered")
        left = listed(f"{f.name} ({f.reason})" for f in matrices)
        inside = "" if captured else ". Run the forward and the backward pass inside capture() on every step"
        warn(f"no layer is covered, every parameter takes the NadamW update: {left}{inside}")

    def rows(self, rows: Mapping[str, int], calls: int, *, scaled: bool) -> None:
        """Layers whose number of examples is not that of the batch.

        Args:
            rows: how many examples each layer sees, the first one first.
            calls: how often the first one was called on them.
            scaled: whether the caller said what the loss was divided by.
        """
        message = other_rows(rows, "capture({})", scaled=scaled, calls=calls)
        if message is not None and "rows" not in self._named:
            self._named.add("rows")
            warn(message)

    def batch_second(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        """Layers whose second dimension seems to run over examples.

        Args:
            sizes: by layer, those of its first two dimensions.
        """
        if not sizes or "batch second" in self._named:
            return
        self._named.add("batch second")
        name, (first, second) = next(iter(sizes.items()))
        warn(
            f"layer {name} has inputs ({first}, {second}, features), and was taken to see {first} examples, but "
            f"the loss function has {second} rows (so in {len(sizes)} layers). Where the sequence comes first, "
            "say capture(positions=Positions(batch_dim=1)), for all layers or by layer name"
        )

    def more_rows(self, found: tuple[str, int, int] | None, *, scaled: bool) -> None:
        """All layers see more rows than the loss function has.

        Args:
            found: a layer, its rows and those of the loss function.
            scaled: whether the caller said what the loss was divided by.
        """
        if found is None or scaled or "more rows" in self._named:
            return
        self._named.add("more rows")
        name, rows, number = found
        warn(more_rows(name, rows, "the loss function has", number, "capture({})"))

    def in_parts(self, found: Mapping[str, tuple[int, int]], *, scaled: bool) -> None:
        """Layers that see the batch in parts, one call after the other, it seems.

        Args:
            found: by layer, how many calls, and rows in all of them.
            scaled: whether the caller said what the loss was divided by.
        """
        if not found or scaled or "parts" in self._named:
            return
        self._named.add("parts")
        remedy = "call the model on the whole batch, or give each part a capture(loss_normalizer={}) of its own"
        warn(in_parts(found, "the loss function has", remedy, "capture(loss_normalizer={})"))

    def directions(self, ratios: Mapping[str, Tensor]) -> None:
        """Directions that are noise in most layers.

        Args:
            ratios: by layer, the length of its first-order step over that of its K-FAC direction.
        """
        if not ratios or "directions" in self._named:
            return
        values = torch.stack([ratio.float().cpu() for ratio in ratios.values()]).tolist()
        message = judging.noise(dict(zip(ratios, values, strict=True)))
        if message is not None:
            self._named.add("directions")
            warn(message)

    def gone(self, weights: Mapping[str, str]) -> dict[str, str]:
        """Layers whose weight the model no longer has: what they missed, by name.

        Args:
            weights: by name of a layer that was not called, that of its weight.
        """
        there = {id(p) for p in self._model.parameters()} if weights else set()
        return {
            name: inputs_of_gone(weight)
            for name, weight in weights.items()
            if id(self._trained[weight]) not in there
        }

    def strangers(self, params: Sequence[Tensor]) -> None:
        """Parameters of the model that take part, and that the optimizer does not train.

        Args:
            params: those that layers were called with. All others, of whatever module (normalisation, embeddings),
                show by their gradients.

        Raises:
            ValueError: if they joined the model after the optimizer was made.
        """
        called, trained = {id(p) for p in params}, {id(p) for p in self._trained.values()}
        now = {
            id(p): name
            for name, p in self._model.named_parameters()
            if id(p) not in trained and (id(p) in called or (p.requires_grad and p.grad is not None))
        }
        if not now:
            return
        known = {id(p) for p in self._left_out.values()}
        joined = [name for key, name in now.items() if key not in known]
        if joined:
            raise ValueError(
                f"parameter {listed(joined)} of the model is not the optimizer's: it was replaced or added after "
                "the optimizer was made (a new head, to_empty(), another dtype). Make the optimizer afterwards, or "
                "give it new parameters by add_param_group({'params': [...]})"
            )
        thawed = [name for name in now.values() if name in self._frozen and name not in self._thawed]
        if thawed:
            self._thawed |= set(thawed)
            warn(
                f"{listed(thawed)} had no gradient when the optimizer was made, and will not be trained: give it "
                "to the optimizer by add_param_group({'params': [...]})"
            )
