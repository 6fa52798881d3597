"""What is no error and yet hardly meant: said once per optimizer, while a step is traced, at the caller's line."""

from __future__ import annotations

from collections.abc import Mapping

from algoperf_kfac.errors import warn
from algoperf_kfac.positions import other_rows


class Mistakes:
    """Remembers what was said, and whether statistics were ever computed."""

    def __init__(self) -> None:
        self._named: set[str] = set()
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
