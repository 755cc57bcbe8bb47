"""Names for the parts of a step: labels in a profiler's trace, and seconds or operations where somebody measures."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.profiler import record_function

PARTS = ("data", "transfer", "generator", "encoder", "drift", "backward", "optimiser", "ema")


class PartMeter:
    """How much a counter that only rises (a clock, a count of operations) rose within each part; parts do not overlap."""

    def __init__(self, counter: Callable[[], float]):
        self.counter = counter
        self._amounts: dict[str, float] = defaultdict(float)

    def add(self, name: str, amount: float) -> None:
        """Count for a part."""
        self._amounts[name] += amount

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
    meter = _meter
    with record_function(name):
        if meter is None:
            yield
            return
        before = meter.counter()
        yield
        meter.add(name, meter.counter() - before)
