"""Steps whose loss or gradient is not finite: found without waiting for the device, named, tolerated or the end of the run."""

from collections.abc import Callable

import torch
from torch import Tensor

from drift_accel.foundation.collectives import gather_text

STOP = "stop"
SKIP = "skip:"
NAMES_SHOWN = 8


class NonFiniteError(RuntimeError):
    """A loss or gradient was not finite; the weights are those of before that step."""


def tolerated_steps(policy: str) -> int:
    """How many steps in a row may be not finite: 0 for "stop", N for "skip:N". Raises ValueError for another policy."""
    if policy == STOP:
        return 0
    count = policy.removeprefix(SKIP)
    if not policy.startswith(SKIP) or not (count.isascii() and count.isdecimal()) or int(count) < 1:
        raise ValueError(f"nonfinite is {policy!r}: write stop, or skip:N to tolerate up to N steps in a row, for example skip:3")
    return int(count)


def check_policy(policy: str) -> None:
    """Raise ValueError where `tolerated_steps` would."""
    tolerated_steps(policy)


class FiniteGate:
    """Reads the flag of a step while the next one is already under way, so that the device never waits.

    The update itself is gated on the device (`update_weights`). Where nothing is tolerated the gate stays shut after a step
    that was not finite (`held`): the step that is already under way leaves the weights alone too.
    """

    def __init__(self, policy: str = STOP, group=None, log: Callable[[str], None] = print):
        self._tolerated, self._group, self._log = tolerated_steps(policy), group, log
        self._pending: tuple[int, HostCopy, dict[str, Tensor]] | None = None
        self._in_a_row = 0
        self.skipped = 0  # steps of the whole run that were not finite; checkpoints keep it
        self.held: Tensor | None = None

    def watch(self, step: int, flag: Tensor, metrics: dict[str, Tensor]) -> None:
        """Check the step before this one, and keep this one's flag for later."""
        copy = HostCopy(flag)
        if not self._tolerated:
            self.held = flag
        self.check()
        self._pending = (step, copy, metrics)

    def check(self) -> None:
        """Look at the watched step. Where it was not finite, say what was not, and where; count it, or raise NonFiniteError
        on every process where more steps in a row were than are tolerated."""
        if self._pending is None:
            return
        step, flag, metrics = self._pending
        self._pending = None
        if not flag.read().item():
            self._in_a_row = 0
            return
        self._in_a_row += 1
        self.skipped += 1
        found = f"step {step}: not finite: {self._culprits(metrics)}."
        if self._in_a_row > self._tolerated:
            row = f" That was step {self._in_a_row} in a row; nonfinite tolerates {self._tolerated}." if self._tolerated else ""
            raise NonFiniteError(
                f"{found}{row} The weights are untouched and the last checkpoint is good. "
                "Lower optimizer.lr, or look at the data of that step"
            )
        self._log(f"{found} The step is skipped ({self._in_a_row} in a row, {self._tolerated} are tolerated)")

    def _culprits(self, metrics: dict[str, Tensor]) -> str:
        """The tags STATISTIC/KEY that are not finite, by process. The flag is the same on all, so all of them come here."""
        names = [tag for tag, value in metrics.items() if not torch.isfinite(value)]
        text = ", ".join(names[:NAMES_SHOWN]) + (" ..." if len(names) > NAMES_SHOWN else "")
        by_process = gather_text(text, self._group)
        where = by_process if len(by_process) == 1 else [f"process {i}: {text}" for i, text in enumerate(by_process) if text]
        return "; ".join(text for text in where if text) or "the gradient"


class HostCopy:
    """A tensor on its way to the host: reading it waits for the work that made it and for nothing enqueued later."""

    def __init__(self, value: Tensor):
        self._value, self._copied = value, None
        if value.is_cuda:
            self._value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> Tensor:
        """The value on the host."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._value
