"""What a run reports: one record a log step in metrics.jsonl and TensorBoard."""

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from drift_accel.foundation.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """When a run reports. Raises ValueError for intervals below 1."""

    every: int = 50
    """Steps between records of metrics; a record costs one read from the device."""
    sample_every: int = 1000
    """Steps between sample grids; the last step always has one."""

    def __post_init__(self):
        for name in ("every", "sample_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"log.{name} is {getattr(self, name)}: give a number of steps of at least 1")


class Telemetry:
    """Writes the records of one run; on other processes than the main one it writes nothing.

    Records after `start_step`, which a killed run wrote and this one will write again, are dropped first.
    """

    def __init__(self, run: RunFolder, start_step: int, *, enabled: bool):
        self._run = run
        self._writer = None
        self._last_time, self._last_step = time.perf_counter(), start_step
        if enabled:
            run.truncate_metrics(start_step)
            self._writer = SummaryWriter(str(run.tensorboard_dir), purge_step=start_step + 1)

    def record(self, step: int, values: Mapping[str, float], num_samples: int, waited: float) -> dict[str, float]:
        """Write the metrics of `step` (optimiser steps done) with rates since the last record; returns the whole record.

        `num_samples` is the number of samples that one step trains on, over all processes; `waited` the seconds since the
        last record that this process waited for data.
        """
        now = time.perf_counter()
        elapsed = max(now - self._last_time, 1e-9)
        steps_per_second = (step - self._last_step) / elapsed
        self._last_time, self._last_step = now, step
        record = {
            **values,
            **summarise(values),
            "steps_per_second": steps_per_second,
            "samples_per_second": steps_per_second * num_samples,
            "data_wait_share": waited / elapsed,
        }
        if self._writer is not None:
            self._run.append_metrics({"step": step, **record})
            for tag, value in record.items():
                self._writer.add_scalar(tag, value, step)
            self._writer.flush()
        return record

    def add_image(self, tag: str, image: np.ndarray, step: int) -> None:
        """Show a uint8 picture [H,W,3] in TensorBoard."""
        if self._writer is not None:
            self._writer.add_image(tag, image, step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close the event file."""
        if self._writer is not None:
            self._writer.close()


def summarise(values: Mapping[str, float]) -> dict[str, float]:
    """The mean over feature keys of every tag NAME/KEY, as NAME."""
    groups = defaultdict(list)
    for tag, value in values.items():
        name, separator, _ = tag.partition("/")
        if separator:
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
