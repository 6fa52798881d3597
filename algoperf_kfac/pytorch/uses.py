"""What becomes of parameters in operations without a rule: which of their uses the statistics of a layer miss.

A function of parameters and constants alone is followed (a view, a scaled, normalised or cast weight). Where one
meets data, the parameter has a use that no rule records. Scalars of parameters that are added to the loss
(penalties) are no such use: they leave the captured inputs and output gradients complete.
"""

from __future__ import annotations

import math
from collections import Counter

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from algoperf_kfac.pytorch.operations import Called
from algoperf_kfac.pytorch.views import Views, tensors

# Element by element: with a constant of its own size a weight stays a weight (masks, noise, scales).
ELEMENTWISE = frozenset(
    """
    mul div true_divide add sub rsub where masked_fill lerp addcmul addcdiv maximum minimum clamp fmod pow
    __mul__ __rmul__ __truediv__ __rtruediv__ __add__ __radd__ __sub__ __rsub__ __pow__ mul_ div_ add_ sub_
    masked_fill_ dropout fake_quantize_per_tensor_affine fake_quantize_per_channel_affine copy_
    """.split()  # noqa: SIM905
)
# Of a weight and a constant of its own size, summed: penalties in one operation.
DISTANCES = frozenset("mse_loss l1_loss smooth_l1_loss huber_loss kl_div dist dot cosine_similarity".split())  # noqa: SIM905
# What adds a penalty to a loss.
SUMS = frozenset("add sub rsub add_ sub_ __add__ __radd__ __sub__ __rsub__ __iadd__ __isub__ stack cat".split())  # noqa: SIM905

# Of a function of parameters and a constant, where no matrix comes of it (bilinear forms).
PRODUCTS = frozenset("matmul __matmul__ __rmatmul__ mm mv inner vdot".split())  # noqa: SIM905

WITHOUT_BIAS = "a call without its bias"

Sources = frozenset[int]  # identities of parameters
NOTHING: Sources = frozenset()


class Uses:
    """Follows parameters through one capture.

    Attributes:
        missed: by identity of a parameter: the first operation without a rule in which it met data.
        penalised: identities of parameters that a penalty reads, whose gradient is then more than the layer's own
            by what nobody sees.
        views: parameters as they are seen through views and copies.
        readers: by identity of a parameter, what operations that do not apply its layer made of it or of its views,
            in number of results.
    """

    def __init__(self) -> None:
        self.readers: Counter[int] = Counter()
        self.views = Views()
        self.missed: dict[int, str] = {}
        self.penalised: set[int] = set()
        self._derived: WeakIdKeyDictionary = WeakIdKeyDictionary()  # of tensors that are functions of parameters
        self._without_bias: set[int] = set()  # identities of weights that were multiplied by a constant

    def sources(self, value: object) -> Sources:
        """The parameters of which a value is a function, of them alone; empty for anything else."""
        if type(value) is Tensor and not self._derived.data:
            return NOTHING  # most of what a model computes, and by far the quickest to tell
        if isinstance(value, torch.nn.Parameter):
            return frozenset((id(value),)) if value.requires_grad else NOTHING
        return self._derived.get(value, NOTHING) if isinstance(value, Tensor) else NOTHING

    def read(self, called: Called, output: object) -> None:
        """Count what an operation made of parameters, where it does not apply their layer."""
        views = [view for leaf in called.leaves() if (view := self.views.of(leaf)) is not None]
        if views and torch.is_grad_enabled():
            results = sum(result.requires_grad for result in tensors(output))
            for view in views:
                self.readers[id(view.param)] += results

    def miss(self, value: object, what: str) -> None:
        """Remember a use of the parameters in a value that no rule records."""
        for source in self.sources(value):
            self.missed.setdefault(source, WITHOUT_BIAS if source in self._without_bias else what)

    def multiply(self, output: Tensor, weight: Tensor) -> None:
        """Remember that a tensor is a weight times a constant, as a call without the bias would be."""
        self.derive(output, weight)
        self._without_bias.add(id(weight))

    def derive(self, output: Tensor, *values: object) -> None:
        """Remember that a tensor is a function of the parameters in these values, and of constants."""
        self._derived[output] = NOTHING.union(*map(self.sources, values))

    def write(self, called: Called) -> None:
        """Take note of a function that returns nothing, as it writes to its first argument."""
        writes = called.name == "__setitem__" or (called.name.startswith("_foreach_") and called.name.endswith("_"))
        if not writes or not torch.is_grad_enabled():
            return
        first = called.args[0]
        written = list(first) if isinstance(first, list | tuple) else [first]
        others = [leaf for leaf in called.leaves() if isinstance(leaf, Tensor)][len(written) :]
        for tensor in written:
            view = self.views.of(tensor)
            if view is not None:
                self.views.forget(view.param)
            if any(leaf.requires_grad and not self.sources(leaf) for leaf in others):
                self.miss(tensor, called.name)
        if all(map(self.sources, written)):
            return  # of parameters and constants, as before
        for leaf in others:
            if leaf.numel() == 1:
                self.penalised |= self.sources(leaf)
            else:
                self.miss(leaf, called.name)

    def follow(self, called: Called, output: object) -> None:
        """Take note of an operation without a rule."""
        first = called.args[0] if called.args else None
        if self.views.move(called, output):
            for result in tensors(output):
                view = self.views.of(result)
                if view is not None and result.requires_grad:
                    self._derived[result] = frozenset((id(view.param),))
            return
        if not torch.is_grad_enabled():
            return
        leaves = [leaf for leaf in called.leaves() if isinstance(leaf, Tensor)]
        read = [leaf for leaf in leaves if self.sources(leaf)]
        if not read:
            return
        results = [t for t in tensors(output) if t.requires_grad]
        if not results:
            return  # nothing that a gradient could go through
        view = self.views.of(first)
        if view is not None and output is first:
            self.views.forget(view.param)
        others = [leaf for leaf in leaves if not self.sources(leaf)]
        everything = NOTHING.union(*(self.sources(leaf) for leaf in read))
        if not others or self._is_constant(called, read, others, results):
            for result in results:
                self._derived[result] = everything
        elif called.name not in SUMS or any(leaf.numel() > 1 for leaf in read):
            for leaf in read:
                self.miss(leaf, called.name)

    @staticmethod
    def _is_constant(called: Called, read: list[Tensor], others: list[Tensor], results: list[Tensor]) -> bool:
        """Whether what meets the parameters is a constant of the weight's own size."""
        size = max(math.prod(leaf.shape) for leaf in read)
        if any(leaf.requires_grad for leaf in others):
            return False
        if called.name in DISTANCES:
            return all(leaf.numel() == size for leaf in others)
        if called.name in PRODUCTS:
            return all(result.dim() < 2 for result in results)
        return called.name in ELEMENTWISE and all(result.numel() == size for result in results)
