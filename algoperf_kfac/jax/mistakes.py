"""What is no error and yet hardly meant: said once per optimizer, while a step is traced, at the caller's line."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from algoperf_kfac import judging
from algoperf_kfac.errors import MissingStatisticsError, listed, missing_statistics, warn
from algoperf_kfac.layers import NEVER_SEEN, not_its_gradient
from algoperf_kfac.positions import in_parts, more_rows, other_rows


class Mistakes:
    """Remembers what was said, and whether statistics were ever computed.

    Attributes:
        checked: whether G^T A was ever compared with the gradient.
        errors: by layer, how far it was from it, relative to it.
    """

    def __init__(self) -> None:
        self._named: set[str] = set()
        self._called: set[str] = set()
        self._traces = 0
        self.checked = False
        self.errors: dict[str, float] = {}
        self._statistics = False

    def rows(self, rows: Mapping[str, int], *, scaled: bool) -> None:
        """Layers whose number of examples is not that of the batch.

        Args:
            rows: how many examples each layer sees, the first one first.
            scaled: whether the caller said what the loss was divided by.
        """
        message = other_rows(rows, "{}", scaled=scaled)
        if message is not None:
            self._say("rows", message)

    def batch_second(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        """Layers whose second dimension seems to run over examples.

        Args:
            sizes: by layer, those of its first two dimensions.
        """
        if sizes:
            name, (first, second) = next(iter(sizes.items()))
            self._say(
                "batch second",
                f"layer {name} has inputs ({first}, {second}, features), and was taken for {first} examples, but "
                f"the model's outputs have {second} rows (so in {len(sizes)} layers). Where the sequence comes "
                "first, say positions=Positions(batch_dim=1), for all layers or by layer name",
            )

    def more_rows(self, found: tuple[str, int, int] | None, *, scaled: bool) -> None:
        """All layers see more rows than the model returns.

        Args:
            found: a layer, its rows and those returned.
            scaled: whether the caller said what the loss was divided by.
        """
        if found is not None and not scaled:
            name, rows, returned = found
            self._say("more rows", more_rows(name, rows, "the model's outputs have", returned, "{}"))

    def in_parts(self, found: Mapping[str, tuple[int, int]], *, scaled: bool) -> None:
        """Layers that see the batch in parts, one call after the other, it seems.

        Args:
            found: by layer, how many calls, and rows in all of them.
            scaled: whether the caller said what the loss was divided by.
        """
        if found and not scaled:
            remedy = (
                "call the model on the whole batch or under jax.vmap, or compute the statistics of each part with "
                "loss_normalizer={}, and add() them"
            )
            self._say("parts", in_parts(found, "the model's outputs have", remedy, "loss_normalizer={}"))

    def layers(self, layers: Collection[str], idle: Collection[str]) -> None:
        """Some layers are not called by what is traced.

        Args:
            layers: all of them.
            idle: those that are not called.

        Raises:
            MissingStatisticsError: naming layers that no trace out of many has called.
        """
        self._traces += 1
        self._called |= set(layers) - set(idle)
        unseen = [name for name in idle if name not in self._called]
        if unseen and self._traces >= NEVER_SEEN:
            raise never_seen(unseen, len(layers))
        if unseen:
            self._say(
                "idle",
                f"{listed(sorted(unseen))}: not called with these arguments. A layer that a step does not call "
                "keeps its factors and gets no update on statistics steps; on the others say so: update(..., "
                "idle=optimizer.idle(params, ...)). If no step calls it, leave it out with exclude=[...]",
            )

    def gradients(self, errors: Mapping[str, float], wrong: Iterable[str]) -> None:
        """G^T A was compared with the gradient; layers that fall short of it are named.

        Args:
            errors: by layer, how far it is from it, relative to it.
            wrong: the layers where that is more than rounding.
        """
        self.checked = True
        self.errors |= errors
        for name in wrong:
            warn(
                f"layer {name}: {not_its_gradient(errors[name])}. Leave it out with exclude=[{name!r}]; "
                "optimizer.check(params, ...) compares again"
            )

    def directions(self, steps: float, ratios: Mapping[str, float]) -> None:
        """Directions that are noise in most layers.

        Args:
            steps: updates made.
            ratios: by layer, the length of its first-order step over that of its K-FAC direction.
        """
        message = judging.noise(ratios) if steps >= judging.WHEN_JUDGED[0] else None
        if message is not None:
            self._say("directions", message)

    def statistics(self) -> None:
        """Statistics are computed, or come with an update."""
        self._statistics = True

    def without_statistics(self) -> None:
        """An update is traced without statistics."""
        if not self._statistics:
            self._say(
                "statistics",
                "an update without statistics, and none were computed so far: until the first ones come, every "
                "parameter takes the NadamW update. On the steps of is_statistics_step pass them on: "
                "update(gradient, state, params, statistics=statistics); TrainState.apply_gradients does not. "
                "After resuming in the middle of an interval this is as it should be",
            )

    def _say(self, what: str, text: str) -> None:
        if what not in self._named:
            self._named.add(what)
            warn(text)


def never_seen(names: Iterable[str], total: int) -> MissingStatisticsError:
    """The error for layers that are never called.

    Args:
        names: of the layers.
        total: number of covered layers.
    """
    remedy = "No step so far has called them: leave them out with exclude=[...]"
    return missing_statistics(dict.fromkeys(sorted(names), "inputs"), total, remedy)
