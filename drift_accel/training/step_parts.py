"""Names for the parts of a step: labels in a profiler's trace, and seconds or operations where somebody measures."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch.profiler import record_function

PARTS = ("data", "transfer", "vae", "generator", "encoder", "drift", "backward", "optimiser", "ema")


class PartMeter:
    """How much a counter that only rises (a clock, a count of operations) rose within each part.

    A part inside another counts for itself alone, so that the amounts add up to the whole.
    """

    def __init__(self, counter: Callable[[], float]):
        self.counter = counter
        self._amounts: dict[str, float] = defaultdict(float)
        self._inside = 0.0  # what the parts inside the current one took

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what happens inside the block for the part `name`."""
        outer, self._inside, before = self._inside, 0.0, self.counter()
        yield
        amount = self.counter() - before
        self._amounts[name] += amount - self._inside
        self._inside = outer + amount

    def read(self) -> dict[str, float]:
        """Amounts by part since the last call."""
        amounts, self._amounts = dict(self._amounts), defaultdict(float)
        return amounts


def device_clock(device: torch.device) -> Callable[[], float]:
    """Seconds at which the device has done all that it was given; reading it waits for a GPU."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


_meter: PartMeter | None = None


@contextmanager
def metered_parts(meter: PartMeter) -> Iterator[PartMeter]:
    """Let every `step_part` inside the block report to `meter`. One at a time in a process."""
    global _meter
    before, _meter = _meter, meter
    try:
        yield meter
    finally:
        _meter = before


@contextmanager
def step_part(name: str) -> Iterator[None]:
    """Mark what runs inside the block as the part `name` of a step."""
    with record_function(name), nullcontext() if _meter is None else _meter.part(name):
        yield
