"""A disk that fills up or cannot be written: a clear line, earlier checkpoints whole, and the run goes on when there is space."""

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from tiny_runs import checkpoint_tensors, generator_arguments, metrics
from trainer_processes import Trainer, run_trainer

from drift_accel import train
from drift_accel.foundation.run_folder import RunFolder
from drift_accel.training import checkpoint, loop
from drift_accel.training.checkpoint_writer import CheckpointError

SETTINGS = ("--steps", "6", "--checkpoint.every", "2", "--checkpoint.keep_last", "null")


@pytest.fixture(scope="module")
def whole(encoder, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    train.main(generator_arguments(encoder, run, *SETTINGS))
    return run


@pytest.fixture
def small_disk(tmp_path):
    """A folder with 64 MB that can be filled."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting needs root; the other tests let the write fail")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def before_step(monkeypatch, actions: dict) -> None:
    """Call actions[n] before step n, counted from 1."""
    train_step = loop.train_step

    def step(state, *rest, **options):
        actions.get(state.step + 1, lambda: None)()
        return train_step(state, *rest, **options)

    monkeypatch.setattr(loop, "train_step", step)


def fill_up(disk: Path, spare: int) -> None:
    """Leave `spare` bytes free."""
    free = shutil.disk_usage(disk).free
    with open(disk / "filler", "wb") as file:
        file.write(b"\0" * (free - spare))


def require_same(run: Path, whole: Path, step: int) -> None:
    ours, theirs = checkpoint_tensors(run, step), checkpoint_tensors(whole, step)
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_a_full_disk_stops_the_run_and_space_lets_the_same_command_go_on(encoder, whole, small_disk, monkeypatch):
    run = small_disk / "run"
    arguments = generator_arguments(encoder, run, *SETTINGS)
    before_step(monkeypatch, {4: lambda: fill_up(small_disk, 200_000)})
    with pytest.raises(
        CheckpointError, match=r"checkpoint of step 4 could not be written.*needs .* GB.*The checkpoint of step 2 is whole"
    ):
        train.main(arguments)
    assert RunFolder(run).latest_complete_checkpoint()[0] == 2
    assert not list((run / "checkpoints").glob(".*"))
    assert "stopped by CheckpointError: the checkpoint of step 4" in (run / "RUN.md").read_text()
    monkeypatch.undo()
    (small_disk / "filler").unlink()
    train.main(arguments)
    require_same(run, whole, 6)
    assert list(metrics(run)) == list(range(1, 7))


@pytest.mark.slow
def test_on_error_continue_goes_on_when_there_is_space_again(encoder, whole, small_disk, monkeypatch, capfd):
    run = small_disk / "run"
    arguments = generator_arguments(encoder, run, *SETTINGS, "--checkpoint.on_error", "continue")
    before_step(monkeypatch, {4: lambda: fill_up(small_disk, 0), 6: (small_disk / "filler").unlink})
    train.main(arguments)
    assert RunFolder(run).checkpoint_steps() == [2, 6]
    require_same(run, whole, 6)
    assert list(metrics(run)) == list(range(1, 7))  # records that had no room were written later
    told = capfd.readouterr().err
    assert "checkpoint of step 4 could not be written" in told and "the next checkpoint tries again" in told


@pytest.mark.parametrize("on_error", ["stop", pytest.param("continue", marks=pytest.mark.slow)])
def test_a_last_checkpoint_that_fails_is_never_a_finished_run(on_error, encoder, tmp_path, monkeypatch):
    """The write itself fails, as when the disk fills up after the space was counted."""
    save_file, run = checkpoint.save_file, tmp_path / "run"

    def full(tensors, path):
        if "step_00000006" in str(path) and "optimizer" in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    arguments = generator_arguments(encoder, run, *SETTINGS, "--checkpoint.on_error", on_error)
    with pytest.raises(CheckpointError, match="No space left.*The checkpoint of step 4 is whole. Free some space"):
        train.main(arguments)
    assert RunFolder(run).checkpoint_steps()[-1] == 4 and not list((run / "exports").iterdir())
    monkeypatch.undo()
    train.main(arguments)
    assert RunFolder(run).checkpoint_steps()[-1] == 6


def test_a_folder_that_cannot_be_written_is_named(encoder, tmp_path, monkeypatch):
    run = tmp_path / "run"

    def lose_the_folder():
        shutil.rmtree(run / "checkpoints")
        (run / "checkpoints").write_text("not a folder")

    before_step(monkeypatch, {1: lose_the_folder})
    with pytest.raises(CheckpointError, match=f"Make sure that {run}/checkpoints can be written"):
        train.main(generator_arguments(encoder, run, *SETTINGS))


def no_space(rank: int) -> None:
    """Tamper: the disk of the main process has no space from step 4 on."""

    def refuse(path, num_bytes, purpose):
        if "step 2" not in purpose:
            raise OSError(errno.ENOSPC, f"{purpose} found no space")

    if rank == 0:
        checkpoint.require_free_space = refuse


@pytest.mark.slow
@pytest.mark.multiprocess
def test_all_processes_end_with_the_reason_of_the_one_that_writes(encoder, tmp_path):
    arguments = generator_arguments(encoder, tmp_path / "run", *SETTINGS)
    trainer = Trainer("drift_accel.train", arguments, tmp_path / "logs", num_processes=2, tamper=no_space)
    assert trainer.wait() == [1, 1]
    assert "CheckpointError: the checkpoint of step 4 could not be written" in trainer.text(0)
    assert "CheckpointError: process 0: the checkpoint of step 4 could not be written" in trainer.text(1)
    assert RunFolder(tmp_path / "run").checkpoint_steps() == [2]
    run_trainer("drift_accel.train", arguments, tmp_path / "again", num_processes=2)
