"""A process that dies or does not answer ends the others with a line that says what to do; what was saved stays whole."""

import signal
import time

import pytest
from tiny_runs import generator_arguments
from trainer_processes import Trainer

from drift_accel.foundation.run_folder import RunFolder

SETTINGS = ("--steps", "2000", "--checkpoint.every", "2")


def has_checkpoint(run) -> bool:
    return bool(RunFolder(run).checkpoint_steps())


def fall_asleep(rank: int) -> None:
    """Tamper: process 1 stops answering at the fifth step."""
    from drift_accel.training import loop

    train_step = loop.train_step

    def sleeping_step(state, *rest, **options):
        if rank == 1 and state.step == 4:
            time.sleep(1000)
        return train_step(state, *rest, **options)

    loop.train_step = sleeping_step


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_killed_process_ends_the_other_with_a_clear_line(encoder, tmp_path):
    run = tmp_path / "run"
    trainer = Trainer("drift_accel.train", generator_arguments(encoder, run, *SETTINGS), tmp_path / "logs", num_processes=2)
    assert trainer.wait_for(lambda: has_checkpoint(run))
    trainer.send(signal.SIGKILL, 1)
    assert trainer.wait(60) == [1, -signal.SIGKILL]
    assert "LostProcessError: another process of the run was lost" in trainer.text(0)
    found = RunFolder(run).latest_complete_checkpoint()
    assert f"goes on from the checkpoint of step {found[0]}" in trainer.text(0)
    assert "stopped by LostProcessError" in (run / "RUN.md").read_text()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_process_that_hangs_is_given_up_after_the_time_limit(encoder, tmp_path):
    run = tmp_path / "run"
    arguments = generator_arguments(encoder, run, *SETTINGS, "--collective_timeout_minutes", "0.1")
    trainer = Trainer("drift_accel.train", arguments, tmp_path / "logs", num_processes=2, tamper=fall_asleep)
    assert trainer.wait_for(lambda: not trainer.processes[0].is_alive())
    trainer.send(signal.SIGKILL, 1)
    assert trainer.wait() == [1, -signal.SIGKILL]
    assert "did not answer within collective_timeout_minutes" in trainer.text(0)
    assert RunFolder(run).latest_complete_checkpoint() is not None
