"""The endless queue of batches a submission draws from. Batch i is a function of i, so a run can resume exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from submissions.common.api import Batch


class BatchQueue(Iterator[Batch]):
    """Yields `batch_at(0)`, `batch_at(1)`, ...; `position` is the index of the next one and may be set."""

    def __init__(self, batch_at: Callable[[int], Batch]) -> None:
        self._batch_at = batch_at
        self.position = 0

    def __next__(self) -> Batch:
        batch = self._batch_at(self.position)
        self.position += 1
        return batch
