"""Checkpoints of a run in progress: when the state is copied, who hears of a failure, when the run may end."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from drift_accel.data.sources import describe_source
from drift_accel.foundation.collectives import gather_text
from drift_accel.foundation.command_line import configuration_dict
from drift_accel.foundation.provenance import package_versions
from drift_accel.foundation.run_folder import RunFolder
from drift_accel.training.checkpoint_writer import CheckpointError, CheckpointWriter
from drift_accel.training.configuration import TrainingConfig
from drift_accel.training.exports import export_snapshot
from drift_accel.training.optimizer import inner_optimizer
from drift_accel.training.retention import Retention
from drift_accel.training.snapshot import take_snapshot
from drift_accel.training.state import TrainingState


class Saver:
    """Saves the state at the steps that ask for it; the main process writes on a thread. Every process makes the same calls."""

    def __init__(
        self,
        state: TrainingState,
        config: TrainingConfig,
        run: RunFolder,
        on_checkpoint: Callable[[int, Path], Mapping[str, float] | None],
        log: Callable[[str], None] = print,
    ):
        self._state, self._config, self._on_checkpoint, self._log = state, config, on_checkpoint, log
        self._saved_step = state.step if state.loaded else -1
        path = run.checkpoint_values_path if state.accelerator.is_main_process else None
        self.retention = Retention(config.checkpoint, path, self._saved_step, log)
        self._writer: CheckpointWriter | None = None
        if state.accelerator.is_main_process:
            data = describe_source(state.task.source)
            self._writer = CheckpointWriter(
                run,
                config.checkpoint,
                self.retention,
                lambda snapshot: export_snapshot(run, snapshot, state.averages, data, config.export_names),
                log,
            )
            if state.step < config.steps:
                self._writer.reserve(state.task.model, state.averages)

    def save(self) -> None:
        """Copy the state of the current step, once, and let the main process write it; the checkpoint before must be done."""
        state = self._state
        if state.step == self._saved_step:
            return
        if self._writer is not None:
            self._writer.wait()
            if self._config.checkpoint.on_error == "continue":
                self.failure_code()  # told here, or it would be held against the next one
            self.poll(False)  # what the hook finds out about the checkpoint before decides whether it stays
        self.retention.add_checkpoint(state.step)
        snapshot = take_snapshot(
            state.step,
            state.task.model,
            inner_optimizer(state.optimizer),
            state.averages,
            data_state=state.data_state,
            record=self._record(),
            buffers=None if self._writer is None else self._writer.buffers,
        )
        self._saved_step = state.step
        if self._writer is not None:
            self._writer.submit(snapshot)

    def failure_code(self) -> int:
        """1 where a checkpoint failed and the run must stop for it; where it may go on, the failure is only told."""
        if self._writer is None or self._writer.failure is None:
            return 0
        if self._config.checkpoint.on_error == "continue":
            self._log(f"{self._writer.failure}. checkpoint.on_error is 'continue': the next checkpoint tries again")
            self._writer.failure = None
            return 0
        return 1

    def poll(self, failed: bool | int) -> None:
        """Tell the hook about checkpoints that are complete by now; raise CheckpointError where the processes agreed on one."""
        if failed:
            self._raise_failure()
        if self._writer is not None:
            for step, folder in self._writer.take_finished():
                self.retention.report(step, self._on_checkpoint(step, folder) or {})

    def finish(self) -> None:
        """Wait until the last checkpoint is complete. Raises CheckpointError on every process where it is not."""
        if self._writer is not None:
            self._writer.wait()
        self._raise_failure()
        self.poll(False)

    def close(self) -> None:
        """Let a checkpoint that is being written come to its end, whatever ends the run."""
        if self._writer is not None:
            self._writer.wait()

    def _raise_failure(self) -> None:
        failure = None if self._writer is None else self._writer.failure
        text = gather_text("" if failure is None else str(failure), self._state.group)[0]
        if failure is not None:
            raise failure
        if text:
            raise CheckpointError(f"process 0: {text}")

    def _record(self) -> dict[str, Any]:
        state = self._state
        settings = getattr(state.task.model, "config", {})
        return {
            "model": {"class": type(state.averages.bones).__name__, "config": {k: v for k, v in settings.items() if k[0] != "_"}},
            "configuration": configuration_dict(self._config),
            "num_processes": state.accelerator.num_processes,
            "distribution": state.accelerator.distributed_type.value,
            "versions": {**package_versions(), "torch_build": torch.__version__},
            "skipped_steps": state.gate.skipped,
        }
