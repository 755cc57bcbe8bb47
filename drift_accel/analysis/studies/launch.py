"""One training of a study in processes of its own: started by `accelerate launch`, stopped with its study."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from drift_accel.analysis.studies.runs import StudyRun, TrainingFailedError
from drift_accel.training.stops import EXIT_STOPPED

MODULE = "drift_accel.train"
STOP_SECONDS = 120.0  # for a checkpoint of the largest models
TAIL_LINES = 3
_PACKAGE_PARENT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """Trains runs one at a time; what they print goes to files in `logs`."""

    logs: Path
    num_processes: int = 1
    launch: Sequence[str] | None = None
    """The command in front of `-m drift_accel.train`; None: `accelerate launch` with `num_processes` on this machine."""

    def command(self, item: StudyRun) -> list[str]:
        """The command of a run, which also resumes it."""
        launch = self.launch or accelerate_command(self.num_processes)
        return [*launch, "-m", MODULE, *item.arguments, "--output_dir", str(item.run.path)]

    def __call__(self, item: StudyRun) -> None:
        """Train to the end. Raises TrainingFailedError with the last words of a training that ended otherwise.

        Whatever else is raised here (a signal that the study turned into an exception) stops the training first: it is asked to,
        writes its checkpoint and ends; the study ends with it.
        """
        self.logs.mkdir(parents=True, exist_ok=True)
        path = self.logs / f"{item.name}.txt"
        path_list = os.pathsep.join(filter(None, (str(_PACKAGE_PARENT), os.environ.get("PYTHONPATH"))))
        with open(path, "ab") as output:
            start = output.tell()
            process = subprocess.Popen(
                self.command(item),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a group of its own, so that all of it can be stopped, after its checkpoint
                env={**os.environ, "PYTHONPATH": path_list},
            )
            try:
                code = process.wait()
            except BaseException:
                stop_group(process)
                raise
        if code:
            raise TrainingFailedError(f"the training ended with code {code}: {_last_words(path, start)} (all of it in {path})")
        if not item.is_trained():
            raise TrainingFailedError(f"the training ended without a whole export in {item.run.exports_dir}; see {path}")


@contextlib.contextmanager
def stopping_with_sigterm() -> Iterator[None]:
    """SIGTERM ends the process with EXIT_STOPPED through an exception, which reaches the training first."""

    def stop(*_) -> None:
        raise SystemExit(EXIT_STOPPED)

    former = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def accelerate_command(num_processes: int) -> list[str]:
    """`accelerate launch` of this interpreter's environment on this machine."""
    several = ["--multi_gpu", "--main_process_port", "0"] if num_processes > 1 else []
    counts = ["--num_processes", str(num_processes), "--num_machines", "1"]
    plain = ["--mixed_precision", "no", "--dynamo_backend", "no"]  # the recipe's own precision and compile decide
    return [sys.executable, "-m", "accelerate.commands.launch", *several, *counts, *plain]


def stop_group(process: subprocess.Popen, seconds: float = STOP_SECONDS) -> None:
    """Ask a process and all that it started to stop, wait until they are gone, and kill what is left after `seconds`."""
    deadline = time.monotonic() + seconds
    _signal_group(process.pid, signal.SIGTERM)
    while time.monotonic() < deadline:
        process.poll()  # else it stays in the group as a zombie
        if not _signal_group(process.pid, 0):
            return
        time.sleep(0.1)
    _signal_group(process.pid, signal.SIGKILL)
    process.wait()


def _signal_group(group: int, number: int) -> bool:
    """Whether there is still somebody to hear it."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def _last_words(path: Path, start: int) -> str:
    """The last error in a log from byte `start` on, or its last lines."""
    text = path.read_bytes()[start:].decode("utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "rror: " in line and "CalledProcessError" not in line and "ChildFailedError" not in line]
    return errors[-1] if errors else " / ".join(lines[-TAIL_LINES:]) or "it printed nothing"
