"""What functions of parameters alone, added to the loss, add to the gradients of weights.

A weight's gradient is then more than that of its layer, by what goes through the operations that read it for the
penalty. These are found in autograd's graph, where their results hang together with nothing but parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

Node = Any  # torch.autograd.graph.Node, whose stubs lack what is used here


class Penalties:
    """Sums what penalties add to weights, over one capture.

    Args:
        counts: whether the backward pass at hand is one whose gradients count.

    Attributes:
        gradients: by identity of a weight.
        handles: of the hooks.
    """

    def __init__(self, counts: Callable[[], bool]) -> None:
        self.gradients: dict[int, Tensor] = {}
        self.handles: list[RemovableHandle] = []
        self._counts = counts
        self._nodes: set[Node] = set()  # kept, as their identities would be given to others

    def watch(
        self, results: Iterable[Tensor], read: Iterable[tuple[Tensor, Tensor]], derived: Iterable[Tensor]
    ) -> bool:
        """See what comes to weights through an operation that reads nothing but parameters and constants.

        Args:
            results: of the operation.
            read: weights, or views of such, each with its parameter.
            derived: what else it reads that is a function of parameters.

        Returns:
            Whether all of it will be seen.
        """
        ways: dict[Node, tuple[Tensor, list[Node]]] = {}
        for tensor, param in read:
            way = _way(tensor, param)
            if way is None:
                return False
            ways[way[0]] = (param, way[:-1])
        ends = {tensor.grad_fn for tensor in derived}
        waiting = [result.grad_fn for result in results]
        while waiting:
            node = waiting.pop()
            if node is None or node in self._nodes or node in ways or node in ends:
                continue
            self._nodes.add(node)
            found = {}
            for number, (following, _) in enumerate(node.next_functions):
                if following in ways:
                    found[number] = ways[following]
                else:
                    waiting.append(following)
            if found:
                self.handles.append(node.register_hook(self._hook(found)))
        return True

    def _hook(self, found: dict[int, tuple[Tensor, list[Node]]]) -> Callable[[Any, Any], None]:
        def hook(inputs: tuple[Tensor | None, ...], _: object) -> None:
            if not self._counts():
                return
            with torch._C.DisableTorchFunction(), torch.no_grad():
                for number, (param, way) in found.items():
                    gradient = inputs[number]
                    if gradient is None:
                        continue
                    for node in way:
                        gradient = node(gradient)
                    before = self.gradients.get(id(param))
                    assert isinstance(gradient, Tensor)
                    self.gradients[id(param)] = gradient.clone() if before is None else before + gradient

        return hook

    def release(self) -> None:
        """Let go of what hangs on the graph."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self._nodes.clear()
        self.gradients.clear()


def _way(tensor: Tensor, param: Tensor) -> list[Node] | None:
    """The nodes that a gradient of a view goes through to its parameter, that of the parameter last; None where
    there is more to it."""
    if tensor is param:
        return [torch.autograd.graph.get_gradient_edge(param).node]
    if tensor._backward_hooks:  # may change what comes to the view
        return None
    way: list[Node] = []
    node: Node = tensor.grad_fn
    while node is not None:
        way.append(node)
        if getattr(node, "variable", None) is param:
            return way
        # Rows and chunks are outputs of one node, which wants the gradients of all.
        if len(node.next_functions) != 1 or len(node._input_metadata) != 1:
            return None
        node = node.next_functions[0][0]
    return None
