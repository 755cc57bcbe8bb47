"""How far the work is: a bar on a terminal, a line a minute in a log file."""

import sys
import time
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm


class Progress:
    """Counts steps from `initial` to `total` and shows them on `stream` (None: standard error).

    On a terminal it is a bar; elsewhere one line each `seconds_between_lines` and one at the end, each with step, rate,
    time left and the latest values. With `enabled` False nothing is shown: of several processes only one enables it.
    Raises ValueError unless 0 <= initial <= total.
    """

    def __init__(
        self,
        total: int,
        initial: int = 0,
        description: str = "",
        enabled: bool = True,
        *,
        stream: TextIO | None = None,
        seconds_between_lines: float = 60.0,
    ):
        if not 0 <= initial <= total:
            raise ValueError(f"progress needs 0 <= initial <= total, got initial {initial} and total {total}")
        self.total, self.step, self.description, self.enabled = total, initial, description, enabled
        self._stream = sys.stderr if stream is None else stream
        self._seconds_between_lines = seconds_between_lines
        self._values: dict[str, Any] = {}
        self._line_step, self._line_time = initial, time.monotonic()
        self._bar = None
        if enabled and self._stream.isatty():
            self._bar = tqdm(total=total, initial=initial, desc=description or None, file=self._stream, dynamic_ncols=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def update(self, num_steps: int = 1, /, **values: Any) -> None:
        """Count `num_steps` more; `values` (numbers or strings already on the host) are shown until they are replaced.

        A tensor is never read here, it would stop the device: give `.item()` at the steps that log.
        """
        self.step += num_steps
        if not self.enabled:
            return
        self._values.update(values)
        if self._bar is not None:
            if values:
                self._bar.set_postfix({name: _shown(value) for name, value in self._values.items()}, refresh=False)
            self._bar.update(num_steps)
        elif time.monotonic() - self._line_time >= self._seconds_between_lines:
            self._print_line()

    def log(self, message: str) -> None:
        """Print a line, above the bar where there is one; nothing where progress is not enabled."""
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.write(message, file=self._stream)
        else:
            print(message, file=self._stream, flush=True)

    def close(self) -> None:
        """End the bar, or print a last line if steps were counted since the one before; a second call is harmless."""
        if self._bar is not None:
            self._bar.close()
            self._bar, self._line_step = None, self.step
        elif self.enabled and self.step > self._line_step:
            self._print_line()

    def _print_line(self) -> None:
        now = time.monotonic()
        rate = (self.step - self._line_step) / max(now - self._line_time, 1e-9)
        self._line_step, self._line_time = self.step, now
        parts = [f"step {self.step}/{self.total}", f"{rate:.3g} steps/s"]
        if self.step < self.total:
            parts.append(f"{_duration((self.total - self.step) / rate) if rate > 0 else 'unknown time'} left")
        parts += [f"{name} {_shown(value)}" for name, value in self._values.items()]
        prefix = f"{self.description}: " if self.description else ""
        print(prefix + ", ".join(parts), file=self._stream, flush=True)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int | str):
        return str(value)
    return f"<{type(value).__name__}>"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}d {hours:02d}:{minutes:02d}:{rest:02d}" if days else f"{hours:02d}:{minutes:02d}:{rest:02d}"
