"""Drawing the next step's batch while the current step computes, so that the device does not wait for data."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Batch = TypeVar("Batch")


class Prefetch(Generic[Batch]):
    """Calls `draw(step)` for first, first + 1, ... below `end` on one thread, one step ahead of `take`.

    An error in `draw` is raised by the `take` of its step.
    """

    def __init__(self, draw: Callable[[int], Batch], first: int, end: int):
        self._draw, self._end = draw, end
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._step = first
        self._future: Future[Batch] | None = self._submit(first)
        self._waited = 0.0

    def take(self) -> Batch:
        """The next step's batch, waiting for it where it is not ready; the one after it is started."""
        if self._future is None:
            raise RuntimeError(f"no batch after step {self._end - 1} was asked for")
        started = time.perf_counter()
        batch = self._future.result()
        self._waited += time.perf_counter() - started
        self._step += 1
        self._future = self._submit(self._step)
        return batch

    def read_waited(self) -> float:
        """Seconds spent waiting in `take` since the last call of this method."""
        waited, self._waited = self._waited, 0.0
        return waited

    def close(self) -> None:
        """Drop what was drawn ahead and end the thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self, step: int) -> Future | None:
        return self._pool.submit(self._draw, step) if step < self._end else None
