"""Which layers of a JAX model K-FAC covers, and why it does not cover the other parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import jax.numpy as jnp

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.errors import check_patterns, listed, warn
from algoperf_kfac.jax.derived import ELEMENTWISE, SELECTIONS
from algoperf_kfac.jax.growth import grown_dims
from algoperf_kfac.jax.interpreter import Key
from algoperf_kfac.jax.kinds import KINDS, kind_for
from algoperf_kfac.jax.layer_book import CoveredLayer, Layers, check_dtypes, check_real, paths
from algoperf_kfac.jax.operations import Call
from algoperf_kfac.jax.promotion import with_promotion
from algoperf_kfac.jax.sources import Source
from algoperf_kfac.jax.tracing import Survey, TracedModel, named_leaves, trace
from algoperf_kfac.jax.trained import dtype_of
from algoperf_kfac.jax.types import ApplyFn, Sizes, Tree
from algoperf_kfac.layers import (
    EMBEDDING,
    EXCLUDED,
    PARTIAL_BIAS,
    SHARED_BIAS,
    STOPPED,
    UNREAD,
    FallbackSpec,
    also_read_by,
    computed_before,
    make_spec,
    matches,
    no_rule,
    too_large,
)

EMPTY = "empty"


@with_promotion
def discover(
    apply_fn: ApplyFn,
    params: Tree,
    *args: Tree,
    config: KFACConfig,
    exclude: str | Iterable[str] = (),
    has_aux: bool = False,
) -> Layers:
    """Trace the model; nothing is computed, and arguments may be `jax.ShapeDtypeStruct`s.

    Where rows may begin with something else than examples it is traced once more, see `growth`.

    Args:
        apply_fn: function of (params, *args).
        params: parameter tree.
        args: example arguments, of the shapes of a training step.
        config: decides the approximation and the block sizes.
        exclude: patterns (fnmatch) of layer or parameter names to leave to the fallback, or one.
        has_aux: whether `apply_fn` returns (outputs, aux); what aux holds of parameters is no use of them.

    Raises:
        TypeError: if `apply_fn` is a module.
        ValueError: for parameters of mixed precision, no parameters, a pattern that matches nothing, or an
            approximation for a kind of layer that there is none of.

    Warns:
        UserWarning: naming weights that linear operations or convolutions read, and that are left to the fallback
            all the same (something else reads them, too, or they are read in several ways); where no layer is
            covered; and layers of a model with data that read none.
    """
    config.check_kinds(name for kind in KINDS for name in kind.names)
    leaves = named_leaves(params)
    if not leaves:
        raise ValueError("params holds no parameter")
    patterns = [exclude] if isinstance(exclude, str) else list(exclude)
    check_dtypes(leaves)
    check_real({name: leaf for name, leaf in leaves.items() if not matches(paths(name), patterns)})
    model = trace(apply_fn, params, args, has_aux=has_aux, binds=True)
    notes = model.survey()
    shapes = {name: (tuple(leaf.shape), dtype_of(leaf)) for name, leaf in leaves.items()}
    known = {path for name in shapes for path in paths(name)}
    unmatched = [pattern for pattern in patterns if not matches(known, [pattern])]
    check_patterns("exclude", patterns, unmatched, "layer or parameter")
    grown = grown_dims(model, notes, apply_fn, params, args)
    layers = _Discovery(notes, shapes, config, patterns, grown).layers()
    _tell(layers, model, notes, config)
    return layers


def _tell(layers: Layers, model: TracedModel, notes: Survey, config: KFACConfig) -> None:
    """Says what of a model is hardly left out, or covered, on purpose.

    Args:
        layers: what is covered.
        model: the traced model.
        notes: what reads its parameters.
        config: the configuration.
    """
    meant = {EXCLUDED, EMPTY, EMBEDDING, STOPPED, too_large(config)}
    read = notes.calls.keys() | notes.products
    weights = [f for f in layers.fallbacks if f.name in read and f.reason not in meant and len(f.shape) > 1]
    if weights:
        lost = listed(f"{f.name} ({f.reason})" for f in weights)
        warn(f"left to NadamW: {lost}. If it is meant so, say it: exclude=[...]")
    elif not layers.covered and (left := [f for f in layers.fallbacks if f.reason not in meant]):
        lost = listed(f"{f.name} ({f.reason})" for f in left)
        warn(f"no layer is covered, every parameter takes the NadamW update: {lost}")
    fixed = [name for name, layer in layers.covered.items() if notes.reads_nothing_new(layer.spec.weight)]
    if fixed and model.has_data:  # else it closes over its batch
        warn(
            f"{listed(fixed)}: nothing but constants is multiplied by the weight, so that its factors are of these "
            "and not of a batch. If the product is a weight in its turn, leave it out with exclude=[...]; a number "
            "that changes from step to step is data if it comes as an array"
        )


class _Discovery:
    """Decides weight by weight, in the order of the first calls.

    Args:
        notes: what reads the parameters.
        shapes: shape and dtype of every parameter.
        config: decides the approximation and the block sizes.
        exclude: patterns of layer or parameter names.
        grown: operation -> the leading dimension over examples, where it is known.
    """

    def __init__(
        self,
        notes: Survey,
        shapes: dict[str, tuple[Sizes, jnp.dtype]],
        config: KFACConfig,
        exclude: list[str],
        grown: Mapping[Key, int],
    ) -> None:
        self._notes = notes
        self._shapes = shapes
        self._config = config
        self._exclude = exclude
        self._grown = grown
        self._biases = _biases(notes)

    def layers(self) -> Layers:
        covered: dict[str, CoveredLayer] = {}
        reasons: dict[str, str] = {}
        taken: set[str] = set()
        for weight, calls in self._notes.calls.items():
            reason = self._obstacle(weight, calls)
            layer = None if reason else self._cover(weight, calls, covered)
            if layer is None:
                reasons[weight] = reason or too_large(self._config)
                if weight in self._biases and reasons[weight] != EXCLUDED:
                    reasons[self._biases[weight].name] = reasons[weight]  # one layer, one reason
            else:
                covered[layer.spec.name] = layer
                taken |= {layer.spec.weight, layer.spec.bias or layer.spec.weight}
        fallbacks = [
            FallbackSpec(name, shape, self._reason(name, reasons.get(name, "")))
            for name, (shape, _) in self._shapes.items()
            if name not in taken
        ]
        return Layers(covered, tuple(fallbacks), self._shapes)

    def _excluded(self, name: str) -> bool:
        return matches(paths(name), self._exclude)

    def _obstacle(self, weight: str, calls: dict[Key, Call]) -> str:
        """Why the weight of these calls is not covered; empty if nothing stands against it."""
        first, shape = next(iter(calls.values())), self._shapes[weight][0]
        if self._excluded(weight):
            return EXCLUDED
        if weight in self._notes.other_uses:
            return also_read_by(next(iter(self._notes.other_uses[weight])))
        if any(call.view != first.view or call.kind != first.kind for call in calls.values()):
            return "read in different layouts by its calls"
        if not all(shape):
            return EMPTY
        return kind_for(self._notes.uses(weight)).misfit(first.view, shape)

    def _cover(self, weight: str, calls: dict[Key, Call], covered: dict[str, CoveredLayer]) -> CoveredLayer | None:
        """The layer of a weight; None if neither of its factors is of a size to be kept."""
        (shape, dtype), first = self._shapes[weight], next(iter(calls.values()))
        view = first.view
        uses = self._notes.uses(weight)
        kind = kind_for(uses)
        bias = self._biases.get(weight) if kind.has_bias else None
        if bias is not None and self._excluded(bias.name):
            bias = None
        name = self._name_of(weight)
        spec = make_spec(
            name=weight if name in covered else name,
            kind=kind.name_of(uses),
            weight=weight,
            bias=None if bias is None else bias.name,
            weight_shape=shape,
            groups=view.groups,
            in_dim=view.in_dim,
            out_dim=view.out_dim,
            config=self._config,
            kernel=1 if first.conv is None else math.prod(first.conv.kernel),
        )
        if not spec.has_factors:
            return None
        return CoveredLayer(
            spec=spec,
            view=view,
            bias=bias,
            slices=kind.slices(view),
            calls=tuple(call.leading for call in calls.values()),
            examples=tuple(
                (len(use.rows.leading), self._grown.get(key, 0)) for key, use in kind.counted(uses).items()
            ),
            dtype=jnp.promote_types(dtype, jnp.float32),
            rounding=self._notes.rounding.get(weight, 0.0),
            conditional=self._notes.is_conditional(weight),
        )

    def _name_of(self, weight: str) -> str:
        """The name of a weight's layer: its module's where it is the only matrix read of that module, else its own.

        In which order they are read says nothing: it may change from one function of the parameters to the next.
        """
        module, own = weight.rpartition("/")[0], _is_matrix(self._shapes[weight][0])
        others = (n for n in self._notes.calls if n != weight and n.rpartition("/")[0] == module)
        alone = not any(_is_matrix(self._shapes[name][0]) or not own for name in others)
        return module if module and alone else weight

    def _reason(self, name: str, of_layer: str) -> str:
        """Why a parameter is not covered.

        Args:
            name: the parameter.
            of_layer: why its layer is not; empty where there is none.
        """
        notes, (shape, dtype) = self._notes, self._shapes[name]
        if self._excluded(name):
            return EXCLUDED
        if of_layer:
            return of_layer
        if not jnp.issubdtype(dtype, jnp.floating):
            return f"not differentiable ({dtype.name})"
        uses = notes.other_uses.get(name, {})
        # Of more dimensions it is a stack of weights, of which one is taken.
        selected = name in notes.lookups or (uses and len(shape) == 2 and uses.keys() <= SELECTIONS)
        if selected and name not in notes.products:
            return EMBEDDING
        if owners := self._added_to(name):
            return also_read_by(next(iter(uses))) if uses else SHARED_BIAS if len(owners) > 1 else PARTIAL_BIAS
        for operation, computed in uses.items():
            if computed:
                return computed_before(operation)
        if len(shape) <= 1 and uses and uses.keys() <= ELEMENTWISE:
            return "scale or bias outside a layer with a rule (normalisation, query scaling)"
        if uses:
            return no_rule(next(iter(uses)))
        return STOPPED if name in notes.stopped else UNREAD

    def _added_to(self, name: str) -> set[str]:
        """The weights to whose outputs a parameter is added as a bias would be."""
        keys = {key for key, sources in self._notes.added.items() if any(source.name == name for source in sources)}
        return {weight for weight, calls in self._notes.calls.items() if not keys.isdisjoint(calls)}


def _is_matrix(shape: Sizes) -> bool:
    """Whether a parameter is no vector; as in PyTorch."""
    return sum(size > 1 for size in shape) > 1


def _biases(notes: Survey) -> dict[str, Source]:
    """Weight -> its bias, where every call adds the same one and nothing else reads it, or the output before."""
    biases = notes.biases
    owners: dict[str, set[str]] = {}
    of_weight: dict[str, set[Source | None]] = {}
    for weight, calls in notes.calls.items():
        for key in calls:
            source = biases.get(key)
            of_weight.setdefault(weight, set()).add(source)
            if source is not None:
                owners.setdefault(source.name, set()).add(weight)
    return {
        weight: bias
        for weight, stored in of_weight.items()
        if len(stored) == 1 and (bias := next(iter(stored))) is not None
        if len(owners[bias.name]) == 1 and bias.name not in notes.other_uses and bias.name not in notes.calls
    }
