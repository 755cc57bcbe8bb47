"""The extraction as a process that a test can kill at any instant: slowed down where instants are short."""

import os
import sys
import time
from pathlib import Path

SLOW_FLUSH, SLOW_BLOCK, SLOW_MOVE = 0.002, 0.02, 0.002  # seconds, so that blows fall everywhere


def main(arguments: list[str]) -> None:
    """tools/extract_activations.py with `arguments`; called by a forked process of `trainer_processes`."""
    from tiny_runs import load_tool

    sys.argv = ["extract_activations.py", *arguments]
    load_tool("extract_activations").main()


def slow_work(rank: int) -> None:
    """Tamper with a process: flushes, blocks of the model and the moves at the end take a while."""
    from drift_accel.analysis.activations import staging
    from drift_accel.analysis.activations.models import ActivationModel
    from drift_accel.foundation import storage

    def slowed(function, seconds: float):
        def slowly(*arguments, **options):
            time.sleep(seconds)
            return function(*arguments, **options)

        return slowly

    storage._flush_to_disk = slowed(storage._flush_to_disk, SLOW_FLUSH)
    staging._move = slowed(staging._move, SLOW_MOVE)
    ActivationModel.compute = slowed(ActivationModel.compute, SLOW_BLOCK)


def progress(folder: Path, name: str) -> tuple[int, str]:
    """(chunks that are there or being written, what the work is at): "start", "chunks", "moving" or "done"."""
    work = folder / "activations" / f"{name}.in_progress"
    if not work.is_dir():
        return 0, "done" if (folder / "metadata" / name / "dataset_info.json").is_file() else "start"
    if (work / "finished.json").is_file():
        return 0, "moving"
    try:
        return len(os.listdir(work / "chunks")), "chunks"
    except FileNotFoundError:
        return 0, "chunks"
