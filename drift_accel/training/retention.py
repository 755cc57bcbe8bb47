"""Which checkpoints outlive the newest ones: multiples of a number of steps, and the best by a metric."""

import json
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from drift_accel.foundation.storage import atomic_write_json
from drift_accel.training.checkpoint import CheckpointConfig


def checkpoint_bytes(parameters: int, num_averages: int) -> int:
    """What one checkpoint takes: weights, two moments and the averages of `parameters` numbers, 4 bytes each."""
    return 4 * parameters * (3 + num_averages)


def run_bytes(config: CheckpointConfig, parameters: int, num_averages: int, steps: int, *, there: int = 0) -> tuple[int, int]:
    """(checkpoints that a run of `steps` will still write and keep at once, bytes of these and of the exports).

    `there` are checkpoints that exist already, which take no more space.
    """
    kept = 0 if config.keep_every is None else steps // config.keep_every
    kept += steps // config.every if config.keep_last is None else config.keep_last
    missing = max(1, kept + 1 - there)  # one more: the old ones go when the new one is complete
    return missing, missing * checkpoint_bytes(parameters, num_averages) + 4 * parameters * num_averages


class Retention:
    """Knows the value of `keep_best` that belongs to each checkpoint, and keeps the values at `path` (None: nowhere).

    Values there of later steps than `newest`, the checkpoint that the run goes on from, and of another metric are forgotten.
    """

    def __init__(self, config: CheckpointConfig, path: Path | None = None, newest: int = -1, log: Callable[[str], None] = print):
        self._config, self._path, self._newest, self._log = config, path, newest, log
        self._latest: tuple[int, float] | None = None
        self._told = False
        self._values = self._read()  # by the step of a checkpoint

    def report(self, step: int, values: Mapping[str, Any]) -> None:
        """Take note of a record of metrics, or of an evaluation of the checkpoint of `step`; NaN counts as no value."""
        value = values.get(self._config.keep_best) if self._config.keep_best is not None else None
        if not isinstance(value, int | float) or not math.isfinite(value):
            return
        self._latest = (step, float(value))
        if step in self._values or step == self._newest:
            self._set(step, float(value))

    def add_checkpoint(self, step: int) -> None:
        """A checkpoint of `step` is about to be written: its value is the newest one since the checkpoint before."""
        if self._config.keep_best is None:
            return
        if self._latest is not None and self._latest[0] > self._newest:
            self._set(step, self._latest[1])
        elif self._latest is None and not self._values and not self._told:
            self._told = True
            self._log(f"checkpoint.keep_best: no record has had {self._config.keep_best!r} so far; metrics.jsonl shows the names")
        self._newest = step

    def kept(self, steps: Collection[int]) -> set[int]:
        """Those of the existing `steps` that must stay."""
        every = self._config.keep_every
        kept = {step for step in steps if every is not None and step % every == 0 and step > 0}
        values = {step: value for step, value in dict(self._values).items() if step in steps}
        if values:
            sign = 1 if self._config.best_is == "min" else -1
            kept.add(min(values, key=lambda step: (sign * values[step], -step)))  # of equal ones the newer
        return kept

    def _set(self, step: int, value: float) -> None:
        self._values = {**self._values, step: value}
        if self._path is not None:
            saved = {str(step): value for step, value in self._values.items()}
            try:
                atomic_write_json(self._path, {"metric": self._config.keep_best, "values": saved})
            except OSError as error:
                self._log(f"warning: {self._path} could not be written: {error}")

    def _read(self) -> dict[int, float]:
        if self._path is None or self._config.keep_best is None or not self._path.exists():
            return {}
        try:
            saved = json.loads(self._path.read_text(encoding="utf-8"))
            values = {int(step): float(value) for step, value in saved["values"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._log(f"warning: {self._path} cannot be read ({error!r}): earlier values of checkpoint.keep_best are forgotten")
            return {}
        known = saved["metric"] == self._config.keep_best
        return {step: value for step, value in values.items() if known and step <= self._newest}
