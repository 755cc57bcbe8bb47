"""The moving parts of a run: how they start, and how they go on from a checkpoint."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from drift_accel.data.sources import Source
from drift_accel.foundation.collectives import require_agreement, run_on_main, world_group
from drift_accel.foundation.run_folder import RunFolder
from drift_accel.foundation.storage import COMPLETE_NAME, sha256_file
from drift_accel.training.averages import WeightAverages
from drift_accel.training.checkpoint import load_checkpoint, read_record
from drift_accel.training.configuration import TrainingConfig
from drift_accel.training.finite_gate import FiniteGate
from drift_accel.training.optimizer import inner_optimizer, make_optimizer
from drift_accel.training.profiling import StepProfiler
from drift_accel.training.sharding import skeleton
from drift_accel.training.stops import StopWishes


class TrainingTask(Protocol):
    """What is trained and how a step's loss comes about."""

    model: nn.Module
    source: Source  # what the run is trained on
    num_samples: int  # samples a step trains on, over all processes

    def draw(self, step: int):
        """Everything random and real of this process's part of a step, on the host; called for one step after the other."""

    def transfer(self, batch):
        """A drawn batch on the run's device."""

    def data_state(self) -> dict[str, Tensor]:
        """What `draw` needs to go on after the step it drew last; empty where draws are functions of the step alone."""

    def load_data_state(self, state: dict[str, Tensor]) -> None:
        """Go on from a saved `data_state` with what `end_step` added to it."""

    def split(self, batch) -> list:
        """The parts of a batch on the device that pass through the networks one after the other; each has `labels`."""

    def prepare(self, model: nn.Module, parts: Sequence, autocast: Callable) -> None:
        """Passes without gradient over the parts of a step, each in an `autocast()` context of its own."""

    def compute(self, model: nn.Module, batch, step: int, *, diagnostics: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss () and metrics {tag: ()}, means over one part; `model` is the task's own, wrapped for distribution."""

    def end_step(self, non_finite: Tensor) -> dict[str, Tensor]:
        """What the next step needs of this one, for checkpoints; the flag () is 1 where the step has not happened."""


@dataclass
class TrainingState:
    """The moving parts of a run; `step` counts finished optimiser steps."""

    accelerator: Accelerator
    task: TrainingTask
    model: nn.Module  # wrapped for distribution
    optimizer: torch.optim.Optimizer
    averages: WeightAverages
    gate: FiniteGate
    stops: StopWishes
    step: int = 0
    data_state: dict[str, Tensor] = field(default_factory=dict)  # of the last finished step: the next one is drawn already
    loaded: dict[str, Any] = field(default_factory=dict)  # the record of the checkpoint that the run went on from
    profiler: StepProfiler = field(default_factory=StepProfiler)
    seconds_at_peak: float | None = None  # that a step's networks would take on these devices at their best; None: unknown

    @property
    def group(self):
        """Process group of the run, None for a single process."""
        return world_group()


def start_state(
    task: TrainingTask, config: TrainingConfig, accelerator: Accelerator, stops: StopWishes | None = None
) -> TrainingState:
    """Prepare model and optimiser for the launched processes; averages start at the initial weights.

    Under FSDP2 the task's own model is split in place, and the averages as it is.
    """
    bones = skeleton(task.model)
    optimizer = make_optimizer(task.model, config.optimizer)
    model, optimizer = accelerator.prepare(task.model, optimizer)
    return TrainingState(
        accelerator=accelerator,
        task=task,
        model=model,
        optimizer=optimizer,
        averages=WeightAverages(task.model, config.ema.decays, bones),
        gate=FiniteGate(config.nonfinite, world_group(), accelerator.print),
        stops=StopWishes(config.max_hours) if stops is None else stops,
    )


def resume(state: TrainingState, run: RunFolder, log: Callable[[str], None]) -> None:
    """Go to the newest complete checkpoint of the run, if there is one; damaged ones are named and skipped.

    The main process chooses it. Raises ValueError on every process where one of them does not see the same files, or where
    there are checkpoints and all are damaged: a run of weeks must not begin anew without a word.
    """

    def newest() -> tuple[int, Path] | None:
        found = run.latest_complete_checkpoint(on_damaged=log)
        if found is None and run.checkpoint_steps():
            raise ValueError(
                f"all checkpoints in {run.checkpoints_dir} are damaged (named above): restore one, or remove that folder to "
                "start again from the first step"
            )
        return found

    found = run_on_main(newest, state.group)
    if found is None:
        return
    state.step, folder = found
    mark = folder / COMPLETE_NAME
    seen = sha256_file(mark) if mark.exists() else "missing"
    require_agreement(seen, f"checkpoint {folder} (is the folder shared by all machines?)", state.group)
    state.data_state = load_checkpoint(folder, state.task.model, inner_optimizer(state.optimizer), state.averages)
    state.task.load_data_state(state.data_state)
    state.loaded = read_record(folder)
    state.gate.skipped = state.loaded.get("skipped_steps", 0)
    log(f"resuming from {folder} after {state.step} steps")
