"""What a run reports: one record a log step in metrics.jsonl and TensorBoard."""

import importlib.util
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from drift_accel.foundation.run_folder import RunFolder
from drift_accel.training.alarms import ALARMS, AlarmWatch
from drift_accel.training.metric_tags import KINDS, dashboard

TRACKERS = ("wandb",)


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """When a run reports. Raises ValueError for intervals below 1."""

    every: int = 50
    """Steps between records of metrics; a record costs one read from the device."""
    sample_every: int = 1000
    """Steps between sample grids; the last step always has one."""
    trackers: tuple[str, ...] = ()
    """Where records go beside metrics.jsonl and TensorBoard, through accelerate: "wandb", which must be installed."""
    peak_tflops: float | None = None
    """What a process's device reaches at best, in TFLOP/s of the run's precision, for model_flop_utilisation. null: known for
    common GPUs; on processors and other devices there is no such number then."""

    def __post_init__(self):
        for name in ("every", "sample_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"log.{name} is {getattr(self, name)}: give a number of steps of at least 1")
        if self.peak_tflops is not None and not 0 < self.peak_tflops < float("inf"):
            raise ValueError(f"log.peak_tflops is {self.peak_tflops}: give a positive number of TFLOP/s, or null")
        unknown = [name for name in self.trackers if name not in TRACKERS]
        if unknown:
            raise ValueError(f"log.trackers holds {unknown}: choose of {', '.join(TRACKERS)}; TensorBoard is always written")
        missing = [name for name in self.trackers if importlib.util.find_spec(name) is None]
        if missing:
            raise ValueError(f"log.trackers holds {missing}, which is not installed: pip install {' '.join(missing)}")


class Telemetry:
    """Writes the records of one run; on other processes than the main one it writes nothing.

    Records after `start_step`, which a killed run wrote and this one will write again, are dropped first. With `lenient` a record
    that cannot be written (a full disk) is kept and tried again with the next one, instead of ending the run. `watch` looks for
    alarms among the records, which `log` gets as lines; `forward` gets every record too (W&B), as (values, step).
    `seconds_at_peak`: what a step would take on devices at their best, for their utilisation (None: unknown).
    """

    def __init__(
        self,
        run: RunFolder,
        start_step: int,
        *,
        enabled: bool,
        lenient: bool = False,
        watch: AlarmWatch | None = None,
        log: Callable[[str], None] = print,
        forward: Callable[[dict[str, float], int], None] | None = None,
        seconds_at_peak: float | None = None,
    ):
        self._run, self._lenient = run, lenient
        self._seconds_at_peak, self._beside = seconds_at_peak, 0.0
        self._watch, self._log, self._forward = watch, log, forward
        self._unwritten: list[dict[str, float]] = []
        self._writer = None
        self._last_time, self._last_step = time.perf_counter(), start_step
        if enabled:
            run.truncate_metrics(start_step)
            self._writer = SummaryWriter(str(run.tensorboard_dir), purge_step=start_step + 1)
            if watch is not None:
                self._writer.add_custom_scalars(dashboard("generator" if watch.is_generator else "encoder"))
                watched = "\n".join(f"- {name}: {meaning}" for name, (meaning, _) in ALARMS.items())
                self._writer.add_text("alarms", f"This run watches for:\n{watched}", start_step)

    def record(self, step: int, values: Mapping[str, float], num_samples: int, waited: float) -> dict[str, float]:
        """Write the metrics of `step` (optimiser steps done) with rates since the last record; returns the whole record.

        `num_samples` is the number of samples that one step trains on, over all processes; `waited` the seconds since the
        last record that this process waited for data.
        """
        now = time.perf_counter()
        elapsed = max(now - self._last_time, 1e-9)
        num_steps = step - self._last_step
        steps_per_second = num_steps / elapsed
        if self._seconds_at_peak is not None:
            utilisation = num_steps * self._seconds_at_peak / max(elapsed - self._beside, 1e-9)
            values = {**values, "model_flop_utilisation": utilisation}
        self._last_time, self._last_step, self._beside = now, step, 0.0
        record = {
            **values,
            **summarise(values),
            "steps_per_second": steps_per_second,
            "samples_per_second": steps_per_second * num_samples,
            "data_wait_share": waited / elapsed,
        }
        if self._writer is not None:
            self._unwritten.append({"step": step, **record})
            self._say_alarms({"step": step, **record})
            if self._forward is not None:
                self._forward(record, step)
            try:
                self._write()
            except OSError as error:
                if not self._lenient:
                    raise
                print(f"warning: the record of step {step} waits for the next one: {error}", file=sys.stderr)
        return record

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What happens in the block is no training: pictures, evaluation. Its time does not lower the devices' utilisation."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._beside += time.perf_counter() - started

    def _write(self) -> None:
        while self._unwritten:
            record = self._unwritten[0]
            self._run.append_metrics(record)
            self._unwritten.pop(0)
            with self._shown(record["step"]) as writer:
                for tag, value in record.items():
                    if tag != "step":
                        writer.add_scalar(tag, value, record["step"])
                writer.flush()

    @contextmanager
    def _shown(self, step: int) -> Iterator[SummaryWriter]:
        """The event writer; where it fails on a lenient run, a fresh one for the next time: a failed one stays failed."""
        try:
            yield self._writer
        except OSError as error:
            if not self._lenient:
                raise
            print(f"warning: TensorBoard misses something of step {step}: {error}", file=sys.stderr)
            with suppress(OSError):
                self._writer = SummaryWriter(str(self._run.tensorboard_dir))

    def _say_alarms(self, record: dict[str, float]) -> None:
        for alarm in self._watch.check(record) if self._watch is not None else ():
            self._log(str(alarm))
            with self._shown(alarm.step) as writer:
                writer.add_text("alarms", str(alarm), alarm.step)

    def add_histograms(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Show how host tensors {tag: values} are distributed."""
        for tag, numbers in values.items() if self._writer is not None else ():
            with self._shown(step) as writer:
                writer.add_histogram(tag, numbers, step)

    def add_image(self, tag: str, image: np.ndarray, step: int) -> None:
        """Show a uint8 picture [H,W,3] in TensorBoard."""
        if self._writer is not None:
            with self._shown(step) as writer:
                writer.add_image(tag, image, step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close the event file."""
        if self._writer is not None:
            with self._shown(self._last_step) as writer:
                writer.close()


def summarise(values: Mapping[str, float]) -> dict[str, float]:
    """The mean over feature keys of every tag NAME/KEY, as NAME; numbers of different kinds have no mean (KINDS/NUMBER)."""
    groups = defaultdict(list)
    for tag, value in values.items():
        name, separator, _ = tag.partition("/")
        if separator and name not in KINDS:
            groups[name].append(value)
    return {name: float(np.mean(group)) for name, group in groups.items()}


def read_metrics(metrics: Mapping[str, Tensor], num_processes: int, group=None) -> dict[str, float]:
    """Bring metrics {tag: ()} to the host in one read, averaged over the processes of `group`."""
    stacked = torch.stack(
        [value.detach().double() if value.device.type == "cpu" else value.float() for value in metrics.values()]
    )
    if group is not None:
        torch.distributed.all_reduce(stacked, group=group)
        stacked = stacked / num_processes
    return dict(zip(metrics, stacked.tolist(), strict=True))
