"""A torch profiler's trace of some steps of a run, for chrome://tracing or https://ui.perfetto.dev."""

import re
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from drift_accel.foundation.run_folder import RunFolder
from drift_accel.foundation.storage import atomic_write_bytes

STEPS_PATTERN = re.compile(r"(\d+)-(\d+)")


def parse_steps(text: str) -> tuple[int, int]:
    """First and last step of "A-B", counted from 1. Raises ValueError for anything else."""
    match = STEPS_PATTERN.fullmatch(text)
    first, last = (int(number) for number in match.groups()) if match else (0, 0)
    if not 1 <= first <= last:
        raise ValueError(f"profile_steps is {text!r}: give the first and the last step, counted from 1, for example 11-13")
    return first, last


class StepProfiler:
    """Records steps `first` to `last` of a run and writes one trace into its folder; without a run it does nothing.

    For the main process alone. The recording begins and ends by waiting for the device; the trace's steps are the run's own, so
    the first ones include compilation and warm-up. Where the last step is never reached nothing is written.
    """

    def __init__(self, run: RunFolder | None = None, steps: tuple[int, int] | None = None):
        self._run, self._steps = run, steps
        self._profile: profile | None = None

    def before(self, done: int) -> None:
        """Start before the first of the steps; `done` counts finished steps."""
        if self._run is None or self._steps is None or done + 1 != self._steps[0]:
            return
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self._profile = profile(activities=activities, record_shapes=True)
        self._profile.start()

    def after(self, done: int) -> Path | None:
        """Stop and write after the last of the steps; the trace's path."""
        if self._profile is None or done != self._steps[1]:
            return None
        self._profile.stop()
        path = self._run.trace_path(*self._steps)
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / path.name
            self._profile.export_chrome_trace(str(trace))
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_bytes(path, trace.read_bytes())
        self._profile = None
        return path
