"""foundation.locks: one holder at a time, and a lock that ends with its process."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from drift_accel.foundation.locks import exclusive_lock


def hold(path: Path, started, finish) -> None:
    with exclusive_lock(path, "the work"):
        started.set()
        finish.wait(30)


def test_a_lock_is_for_one_process_and_ends_with_it(tmp_path):
    context = multiprocessing.get_context("fork")
    started, finish = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(tmp_path / "lock", started, finish))
    holder.start()
    assert started.wait(30)
    with pytest.raises(ValueError, match="the work is already running"), exclusive_lock(tmp_path / "lock", "the work"):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with exclusive_lock(tmp_path / "lock", "the work"):
        pass
