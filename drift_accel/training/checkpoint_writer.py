"""Writing checkpoints on a thread of the main process, while training goes on."""

import errno
import threading
from collections.abc import Callable
from pathlib import Path

from torch import nn

from drift_accel.foundation.run_folder import RunFolder
from drift_accel.training.averages import WeightAverages
from drift_accel.training.checkpoint import CheckpointConfig, write_snapshot
from drift_accel.training.retention import Retention
from drift_accel.training.snapshot import HostBuffers, Snapshot


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the earlier ones are whole."""


class CheckpointWriter:
    """Writes one snapshot at a time, exports it where an export is due, and drops old checkpoints once the new one is complete.

    What goes wrong is kept in `failure` for the training loop, which decides; the thread itself never ends the run.
    """

    def __init__(
        self,
        run: RunFolder,
        config: CheckpointConfig,
        retention: Retention,
        export: Callable[[Snapshot], None],
        log: Callable[[str], None] = print,
    ):
        self._run, self._config, self._retention, self._export, self._log = run, config, retention, export, log
        self._thread: threading.Thread | None = None
        self._finished: list[tuple[int, Path]] = []
        self.buffers = HostBuffers()
        self.failure: CheckpointError | None = None

    def reserve(self, model: nn.Module, averages: WeightAverages) -> None:
        """Start taking the buffers' memory, so that the first snapshot need not wait for it."""
        self._start(self._reserve, model, averages)

    def submit(self, snapshot: Snapshot) -> None:
        """Start writing; the snapshot before must be done (`wait`), because it shares the buffers."""
        self._start(self._write, snapshot)

    @property
    def is_busy(self) -> bool:
        """Whether a snapshot is being written."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Wait until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def take_finished(self) -> list[tuple[int, Path]]:
        """(step, folder) of the checkpoints completed since the last call."""
        finished, self._finished = self._finished, []
        return finished

    def _start(self, work: Callable[..., None], *arguments) -> None:
        self.wait()
        self._thread = threading.Thread(target=work, args=arguments, name="checkpoint writer")
        self._thread.start()

    def _reserve(self, model: nn.Module, averages: WeightAverages) -> None:
        try:
            self.buffers.reserve(model, averages)
        except RuntimeError as error:  # too little memory for all: the snapshot itself may still find it, or say so
            self._log(f"the memory for checkpoints could not be taken ahead: {error}")

    def _write(self, snapshot: Snapshot) -> None:
        step = snapshot.step
        every = self._config.export_every
        failed_export = None
        try:
            # The export first: where a checkpoint is complete, what was due before it is there too.
            if every is not None and step > 0 and step % every == 0:
                self._export(snapshot)
        except Exception as error:
            failed_export = error  # the checkpoint matters more, and may still fit
        try:
            folder = write_snapshot(self._run, snapshot)
            self._finished = [*self._finished, (step, folder)]
        except Exception as error:
            self.failure = self._explained(step, error)
            self.failure.__cause__ = error
            return
        self._prune()
        if failed_export is not None:
            self.failure = CheckpointError(
                f"the export of step {step} could not be written ({type(failed_export).__name__}: {failed_export}); its "
                f"checkpoint is complete. Make room in {self._run.path}, or set checkpoint.export_every to null"
            )
            self.failure.__cause__ = failed_export

    def _prune(self) -> None:
        """Old checkpoints that cannot be removed cost space, not the run."""
        try:
            kept = self._retention.kept(self._run.checkpoint_steps())
            self._run.prune_checkpoints(self._config.keep_last, kept)
        except OSError as error:
            self._log(f"an old checkpoint could not be removed: {error}")

    def _explained(self, step: int, error: Exception) -> CheckpointError:
        whole = [found for found in self._run.checkpoint_steps() if found != step]
        earlier = f"The checkpoint of step {whole[-1]} is whole" if whole else "There is no earlier checkpoint"
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        remedy = "Free some space" if full else f"Make sure that {self._run.checkpoints_dir} can be written"
        return CheckpointError(
            f"the checkpoint of step {step} could not be written ({type(error).__name__}: {error}). {earlier}. "
            f"{remedy} and run the same command again; checkpoint.on_error continue trains on and tries again"
        )
