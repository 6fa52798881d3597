"""What the evidence is made of in PyTorch: the curvature of a model over a data set, or of an optimizer's averages.

A pass over a loader takes the statistics that `KFAC` takes on a step, with the exact or sampled Fisher, and adds
their sums up, so that batches weigh as much as they have examples. Parameters without factors get the diagonal of
the same Fisher from the same forward pass, out of gradients of whole batches: with labels drawn from the model, or
with columns of the Fisher's root under a random sign for each example, gradients of different examples are
uncorrelated and have mean zero, so that the square of their sum has the sum of their squares as its mean. One
example per batch makes it exact (with the exact Fisher); otherwise it is noisy, and without bias.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algoperf_kfac.config import TABLE, KFACConfig
from algoperf_kfac.errors import missing_statistics
from algoperf_kfac.evidence import DIAGONAL, KRONECKER, Block, Fitted, no_factors
from algoperf_kfac.fitting import (
    IN_PARTS,
    NO_DIAGONAL,
    UNCALLED,
    Example,
    Split,
    batches_of,
    check_examples,
    check_scale,
    check_targets,
    described,
    fitting_config,
    of_averages,
    split_batch,
)
from algoperf_kfac.layers import INPUTS, LayerSpec
from algoperf_kfac.losses import LossType
from algoperf_kfac.positions import BY_GRADIENT, PositionsLike, as_candidates
from algoperf_kfac.pytorch import fisher
from algoperf_kfac.pytorch.capture import Capture
from algoperf_kfac.pytorch.curvature import REMEDY
from algoperf_kfac.pytorch.discovery import check_model, check_parameter, unwrap
from algoperf_kfac.pytorch.factors import to_matrix
from algoperf_kfac.pytorch.gathering import Gathered
from algoperf_kfac.pytorch.layer_book import Layers
from algoperf_kfac.pytorch.optimizer import KFAC
from algoperf_kfac.pytorch.options import Options
from algoperf_kfac.pytorch.scalings import scaling_of
from algoperf_kfac.pytorch.statistics import Statistics

Positioned = PositionsLike | Mapping[str, PositionsLike]


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """Eigenvalues a_i b_j of a block.

    Attributes:
        a: (groups, P_in), float64.
        b: (groups, P_out), float64.
    """

    a: Tensor
    b: Tensor

    def log_det(self, scale: float, delta: float) -> tuple[float, float]:
        """See `algoperf_kfac.evidence.Spectrum`."""
        h = scale * self.b[:, :, None] * self.a[:, None, :]
        shifted = h + delta
        return float(shifted.log().sum()), float((h / shifted).sum())


def fit_factors(
    model: nn.Module,
    loader: Iterable[Any],
    loss_type: enum.Enum | str,
    *,
    config: KFACConfig | None = None,
    split: Split | None = None,
    positions: Positioned | Callable[[Any], Positioned] | None = None,
    class_dim: int = -1,
    num_examples: float | None = None,
    exclude: Iterable[str] = (),
    output_splits: Mapping[str, int] | None = None,
    seed: int = 0,
    **hyperparameters: object,
) -> Fitted:
    """The curvature of a model over a data set, for `evidence`.

    The model runs in evaluation mode, as it is after training; gradients and its mode are left as they were. Of
    several processes each fits what its own loader has. With the exact Fisher a batch takes a backward pass per
    output of an example, with fisher="mc" `fisher_samples` of them; twice as many where there are parameters
    without factors.

    Args:
        model: the model.
        loader: batches of tensors, on the model's device.
        loss_type: see `algoperf_kfac.evidence.Likelihood`.
        config: a configuration, of which approximation, fisher, fisher_samples, max_factor_dim and large_factor
            count; keyword arguments override its fields. Without either, the exact Fisher.
        split: from a batch to (args, targets) or (args, targets, mask), args a tuple; default: `split_batch`.
        positions: as `KFAC.capture` takes them, or a function of the batch. Where there is a mask of labels, the
            default is "gradient": what no label that counts depends on does not count.
        class_dim: dimension of the outputs over classes; 1 for (N, C, H, W).
        num_examples: of the whole data set, where the loader has a part of it: everything is scaled up.
        exclude, output_splits: as for `KFAC`; what is excluded gets the diagonal.
        seed: of label draws and signs.
        **hyperparameters: fields of `KFACConfig`.

    Raises:
        ValueError: for an empty loader, batches of different form, a loss without likelihood, the empirical Fisher,
            a model without a layer with factors, or naming a layer whose factors are not finite.
        MissingStatisticsError: naming layers that are called and whose gradient does not come back.
    """
    kind, config = fitting_config(loss_type, config, hyperparameters)
    bare = unwrap(model)
    check_model(bare)
    params = {name: p for name, p in bare.named_parameters() if p.requires_grad}
    for name, p in params.items():
        check_parameter(p, name)
    fit = _Fit(
        Layers(bare, config, scaling_of(config), params, exclude, output_splits or {}),
        config,
        kind,
        class_dim,
        torch.Generator(next(iter(params.values())).device if params else "cpu").manual_seed(seed),
    )
    with _evaluating(bare), torch.enable_grad():
        for batch in batches_of(loader):
            given = positions(batch) if callable(positions) else positions
            fit.add(model, Example(*split(batch)) if split else split_batch(batch), given)
    return fit.fitted(num_examples)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, each module as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Fit:
    """Sums over the batches of a pass.

    Args:
        layers: the book of layers.
        config: says whose Fisher.
        loss_type: of the loss.
        class_dim: dimension of the outputs over classes.
        generator: of label draws and signs.
    """

    def __init__(
        self, layers: Layers, config: KFACConfig, loss_type: LossType, class_dim: int, generator: torch.Generator
    ) -> None:
        self._layers, self._config, self._kind, self._class_dim = layers, config, loss_type, class_dim
        self._generator = generator
        self._statistics: dict[str, Statistics] = {}
        self._diagonals: dict[str, Tensor] = {}
        self._batches_with: dict[str, int] = {}  # a diagonal
        self._batches = 0
        self._loss = self._labels = self._examples = 0.0

    def add(self, model: nn.Module, example: Example, positions: Positioned | None) -> None:
        """Take in a batch."""
        if positions is None and example.mask is not None:
            positions = BY_GRADIENT
        options = Options(self._config, True, as_candidates(positions), lambda: self._generator)
        with Capture(self._layers, self._finish, options) as capture:
            outputs = model(*example.args)
            rows = fisher.classes_last(outputs, self._kind, self._class_dim)
            assert isinstance(rows, Tensor)
            check_targets(self._kind, rows.shape, example.targets.shape)
            capture.backward_fisher(outputs, self._kind, example.mask, class_dim=self._class_dim)
        if not self._statistics:
            raise no_factors()
        self._add_diagonals(rows, example.mask)
        loss, labels, examples = summed_loss(rows.detach(), self._kind, example)
        self._loss += loss
        self._labels += labels
        self._examples += examples
        self._batches += 1

    def _finish(self, gathered: Gathered) -> None:
        self._layers.give_up(gathered.wrong)
        lost = {name: what for name, what in gathered.missing.items() if what != INPUTS}
        if lost:
            raise missing_statistics(lost, len(self._layers.covered), gathered.hint or REMEDY)
        self._layers.note_readers(gathered.readers)
        for name, new in gathered.statistics.items():
            if name in self._statistics:
                self._statistics[name].add(new)
            else:
                self._statistics[name] = new

    def _add_diagonals(self, outputs: Tensor, mask: Tensor | None) -> None:
        params = {
            f.name: self._layers.params[f.name]
            for f in self._layers.fallbacks
            if f.shape == tuple(self._layers.params[f.name].shape)
        }
        if not params:
            return
        for gradients in self._gradients(outputs, mask, list(params.values())):
            for (name, p), gradient in zip(params.items(), gradients, strict=True):
                total = self._diagonals.setdefault(name, torch.zeros_like(p, dtype=_wide(p)))
                if gradient is not None:
                    total += gradient.to(total).square()
        for name in params:
            self._batches_with[name] = self._batches_with.get(name, 0) + 1

    def _gradients(
        self, outputs: Tensor, mask: Tensor | None, params: list[Tensor]
    ) -> Iterator[tuple[Tensor | None, ...]]:
        """Gradients whose squares add up to the diagonal in the mean; see the head of this file."""
        if self._config.fisher == "mc":
            count = self._config.fisher_samples
            for _ in range(count):
                loss = fisher.sampled_loss(outputs, self._kind, mask, self._generator)
                yield torch.autograd.grad(loss / count**0.5, params, retain_graph=True, allow_unused=True)
            return
        leaf = outputs.detach().requires_grad_()
        for loss in fisher.exact_losses(leaf, self._kind, mask):
            column = torch.autograd.grad(loss, leaf)[0]
            draws = torch.rand(len(column), generator=self._generator, device=column.device)
            signs = torch.where(draws < 0.5, -1.0, 1.0).to(column.dtype)
            signed = column * signs.reshape(-1, *[1] * (column.dim() - 1))
            yield torch.autograd.grad(outputs, params, signed, retain_graph=True, allow_unused=True)

    def fitted(self, num_examples: float | None) -> Fitted:
        """What the pass came to.

        Args:
            num_examples: of the whole data set; None for those of the pass.
        """
        layers = self._layers
        check_examples(self._examples)
        share = 1.0 if num_examples is None else num_examples / self._examples
        blocks, left_out = [], {}
        for name, layer in layers.covered.items():
            if name not in self._statistics:
                left_out[layer.spec.load_name] = UNCALLED
                continue
            statistics = self._statistics[name]
            a, b = statistics.averages()
            blocks.append(_layer_block(layer.spec, layers.params, a, b, float(statistics.examples) * share))
        for f in layers.fallbacks:
            param, diagonal = layers.params[f.name].detach(), self._diagonals.get(f.name)
            if f.shape != tuple(param.shape):
                left_out[f.name] = IN_PARTS
            elif diagonal is not None and self._batches_with[f.name] == self._batches:
                h = diagonal.reshape(1, -1).double() * share
                _check_finite(f.name, [h])
                norm = float(param.double().square().sum())
                spectrum = Spectrum(h, h.new_ones(1, 1))
                blocks.append(Block(f.name, DIAGONAL, (f.name,), param.numel(), norm, spectrum))
            else:
                left_out[f.name] = f.reason
        return Fitted(
            loss_type=self._kind,
            blocks=tuple(blocks),
            summed_loss=self._loss * share,
            num_examples=self._examples * share,
            num_labels=self._labels * share,
            left_out=left_out,
            source=described(self._config, self._batches),
        )


def factors_of(
    optimizer: KFAC,
    model: nn.Module,
    loss_type: enum.Enum | str,
    *,
    summed_loss: float,
    num_examples: float,
    num_labels: float | None = None,
) -> Fitted:
    """The curvature that an optimizer's moving averages show, for `evidence`; no pass over the data.

    Its Fisher is the optimizer's, the empirical one by default, as `source` says. A layer counts as seeing each
    example once (not so experts, and windows that cut examples up). Parameters without factors are left out.

    Args:
        optimizer: after its first statistics step.
        model: its model.
        loss_type: see `algoperf_kfac.evidence.Likelihood`.
        summed_loss: over the data, as an epoch's running sum has it; see `Likelihood.log_likelihood`.
        num_examples: of the data.
        num_labels: that count in the loss; one for each example by default.

    Raises:
        RuntimeError: before the first statistics step.
        ValueError: see `fit_factors`.
    """
    kind = fitting_config(loss_type, None, {})[0]
    coverage, found = optimizer.coverage(), optimizer.factors(reduction="mean")
    params = dict(unwrap(model).named_parameters())
    blocks = [
        _layer_block(spec, params, _blocks(found[spec.name].A), _blocks(found[spec.name].B), num_examples)
        for spec in coverage.layers
    ]
    return Fitted(
        loss_type=kind,
        blocks=tuple(blocks),
        summed_loss=summed_loss,
        num_examples=num_examples,
        num_labels=num_examples if num_labels is None else num_labels,
        left_out={f.name: NO_DIAGONAL for f in coverage.fallbacks},
        source=of_averages(optimizer.config),
    )


def summed_loss(outputs: Tensor, loss_type: LossType, example: Example) -> tuple[float, float, float]:
    """The loss over the labels that count, how many they are, and how many examples have any.

    Args:
        outputs: classes last.
        loss_type: of the loss.
        example: the batch.
    """
    f = outputs.to(_wide(outputs))
    targets = torch.as_tensor(example.targets, device=f.device)
    if loss_type is LossType.SOFTMAX_CROSS_ENTROPY:
        log_probabilities = f.log_softmax(-1)
        if targets.dim() == f.dim():
            losses = -(targets * log_probabilities).sum(-1)
        else:
            losses = -log_probabilities.gather(-1, targets.long().unsqueeze(-1)).squeeze(-1)
    elif loss_type is LossType.SIGMOID_CROSS_ENTROPY:
        losses = F.binary_cross_entropy_with_logits(f, targets.to(f), reduction="none")
    else:
        losses = (f - targets).abs() if loss_type is LossType.MEAN_ABSOLUTE_ERROR else (f - targets).square()
    if example.mask is None:
        return float(losses.sum()), float(losses.numel()), float(len(losses))
    mask = torch.as_tensor(example.mask, device=f.device)
    mask = mask.reshape(*mask.shape, *[1] * (losses.dim() - mask.dim())).expand_as(losses).to(losses)
    examples = (mask.reshape(len(mask), -1) > 0).any(1).sum()
    return float((losses * mask).sum()), float(mask.sum()), float(examples)


def _layer_block(
    spec: LayerSpec, params: Mapping[str, Tensor], a: list[Tensor], b: list[Tensor], examples: float
) -> Block:
    """A layer's block of the curvature.

    Args:
        spec: the layer.
        params: parameters by name.
        a, b: blocks of A and of B per example, (groups, size, size).
        examples: N.
    """
    check_scale(spec, whole_in_a=spec.kind == TABLE)
    _check_finite(spec.name, [*a, *b])
    in_values = examples * _eigenvalues(a)
    out_values = _eigenvalues(b) if b else in_values.new_ones(spec.groups, spec.out_dim)
    bias = None if spec.bias is None else params[spec.bias].detach()
    matrix = to_matrix(params[spec.weight].detach(), bias, spec)
    names = (spec.weight,) if spec.bias is None else (spec.weight, spec.bias)
    norm = float(matrix.double().square().sum())
    return Block(spec.name, KRONECKER, names, spec.num_parameters, norm, Spectrum(in_values, out_values))


def _eigenvalues(blocks: list[Tensor]) -> Tensor:
    """(groups, P): of all diagonal blocks of a factor; what rounding made negative is zero."""
    return torch.cat([torch.linalg.eigvalsh(m.double()) for m in blocks], -1).clamp(min=0)


def _blocks(factor: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    """A factor of `KFAC.factors` as blocks (groups, size, size)."""
    blocks = factor if isinstance(factor, tuple) else (factor,)
    return [m if m.dim() == 3 else m.unsqueeze(0) for m in blocks]


def _check_finite(name: str, tensors: Iterable[Tensor]) -> None:
    if not all(bool(t.isfinite().all()) for t in tensors):
        raise ValueError(f"the curvature of {name} is not finite: look for the batch or step that is not finite")


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)
