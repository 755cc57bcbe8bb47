"""Stopping a run on request, on all of its processes at the same step, with a checkpoint.

SIGTERM, SIGUSR1 and the time limit only leave a wish behind. After each step the processes exchange their wishes in one tiny
message, and read it one step later, when it has long arrived: neither the host nor the device waits for it.
"""

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

import torch
from torch import distributed

from drift_accel.training.finite_gate import HostCopy

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, run the same command again
REASONS = {0: "", 1: "SIGTERM", 2: "SIGUSR1", 3: "max_hours"}
_SIGNALS = {signal.SIGTERM: 1, signal.SIGUSR1: 2} if hasattr(signal, "SIGUSR1") else {signal.SIGTERM: 1}


class StopRequested(Exception):
    """The run was asked to stop and has done so; its checkpoint is complete."""


class StopWishes:
    """What this process was asked for. As a context it catches the signals, and gives them back at its end.

    `max_hours` are counted from the start of the object. Signals can be caught on the main thread alone; elsewhere only the time
    limit works.
    """

    def __init__(self, max_hours: float | None = None, clock: Callable[[], float] = time.monotonic):
        self._clock, self._code = clock, 0
        self._deadline = None if max_hours is None else clock() + 3600 * max_hours
        self._former: dict[int, object] = {}

    def __enter__(self) -> "StopWishes":
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}

    @property
    def code(self) -> int:
        """The number of the reason in REASONS, 0 where nothing was asked for. A long hook may look here to end early."""
        if not self._code and self._deadline is not None and self._clock() >= self._deadline:
            self._code = 3
        return self._code

    def _note(self, number: int, frame: FrameType | None) -> None:
        # A launcher may forward a signal that its whole group got already, so a second one must not do more than the first.
        self._code = self._code or _SIGNALS[number]


class Exchange:
    """The largest of small whole numbers over the processes of `group`, read one exchange later."""

    def __init__(self, device: torch.device, group=None):
        self._device, self._group = device, group
        self._pending: HostCopy | None = None

    def swap(self, *values: int) -> tuple[int, ...]:
        """Send this process's numbers, and return the largest of those sent the time before; zeros the first time.

        Every process must call this at the same point with as many numbers.
        """
        before, self._pending = self._pending, self._send(values)
        return _numbers(before) if before is not None else (0,) * len(values)

    def agree(self, *values: int) -> tuple[int, ...]:
        """The largest of these numbers now, waiting for the other processes."""
        return _numbers(self._send(values))

    def _send(self, values: tuple[int, ...]) -> HostCopy:
        numbers = torch.tensor(values, dtype=torch.float32)
        if self._group is None:
            return HostCopy(numbers)
        if self._device.type == "cuda":
            numbers = numbers.pin_memory().to(self._device, non_blocking=True)
        distributed.all_reduce(numbers, op=distributed.ReduceOp.MAX, group=self._group)
        return HostCopy(numbers)


def _numbers(sent: HostCopy) -> tuple[int, ...]:
    return tuple(int(value) for value in sent.read().tolist())
