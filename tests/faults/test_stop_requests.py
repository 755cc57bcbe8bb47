"""SIGTERM, SIGUSR1 and the time limit: a checkpoint, the exit code 75, and the same command goes on."""

import os
import signal

import pytest
from kill_driver import require_same_end
from tiny_runs import checkpoint_tensors, generator_arguments, metrics
from trainer_processes import Trainer, run_trainer

from drift_accel import train
from drift_accel.training import loop
from drift_accel.training.stops import EXIT_STOPPED

QUEUE = ("--data.queue.per_class", "16", "--data.queue.unconditional", "40", "--data.queue.push", "8")


def run_until_stopped(arguments) -> None:
    with pytest.raises(SystemExit) as end:
        train.main(arguments)
    assert end.value.code == EXIT_STOPPED == 75


def stop_here(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.multiprocess
def test_sigterm_to_one_of_two_processes_stops_both_and_the_rerun_ends_the_same(encoder, tmp_path):
    settings = ("--steps", "16", "--checkpoint.every", "4", "--checkpoint.keep_last", "null")
    whole, run = tmp_path / "whole", tmp_path / "run"
    run_trainer("drift_accel.train", generator_arguments(encoder, whole, *settings), tmp_path / "a", num_processes=2)
    arguments = generator_arguments(encoder, run, *settings)
    trainer = Trainer("drift_accel.train", arguments, tmp_path / "b", num_processes=2)
    assert trainer.wait_for(lambda: (run / "metrics.jsonl").exists() and b'"step": 5' in (run / "metrics.jsonl").read_bytes())
    trainer.send(signal.SIGTERM, 1)
    assert trainer.wait() == [EXIT_STOPPED, EXIT_STOPPED], trainer.text()
    stopped_at = max(metrics(run))
    assert 5 <= stopped_at < 16
    assert f"stopped on request (SIGTERM, after step {stopped_at} of 16)" in (run / "RUN.md").read_text()
    assert (run / f"checkpoints/step_{stopped_at:08d}/COMPLETE.json").exists()
    assert not list((run / "exports").iterdir())
    run_trainer("drift_accel.train", arguments, tmp_path / "c", num_processes=2)
    (run / f"checkpoints/step_{stopped_at:08d}").rename(tmp_path / "extra")  # the one that the other run has not
    if stopped_at % 4 == 0:
        (tmp_path / "extra").rename(run / f"checkpoints/step_{stopped_at:08d}")
    require_same_end(run, whole, 16)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)], ids=["SIGTERM", "SIGUSR1"]
)
def test_a_signal_during_a_step_and_during_sampling(number, encoder, tmp_path, monkeypatch):
    whole, run = tmp_path / "whole", tmp_path / "run"
    train.main(generator_arguments(encoder, whole, "--steps", "8"))
    arguments = generator_arguments(encoder, run, "--steps", "8", "--log.sample_every", "2")
    train_step, make_hooks = loop.train_step, train.make_hooks

    def step_with_signal(state, *rest, **options):
        if state.step == 0:
            stop_here(number)
        return train_step(state, *rest, **options)

    monkeypatch.setattr(loop, "train_step", step_with_signal)
    run_until_stopped(arguments)
    assert list(metrics(run)) == [1, 2]  # all processes know it one step later
    monkeypatch.setattr(loop, "train_step", train_step)

    def hooks_with_signal(*options):
        hooks = make_hooks(*options)

        def sample(step, state, telemetry):
            stop_here(number)
            hooks.on_sample(step, state, telemetry)

        return loop.Hooks(on_sample=sample)

    monkeypatch.setattr(train, "make_hooks", hooks_with_signal)
    run_until_stopped(arguments)
    assert (run / "samples/step_00000004.png").exists() and max(metrics(run)) == 6  # sent after step 5
    monkeypatch.setattr(train, "make_hooks", make_hooks)
    train.main(arguments)
    ours, theirs = checkpoint_tensors(run, 8), checkpoint_tensors(whole, 8)
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    notes = (run / "RUN.md").read_text()
    assert notes.count(f"stopped on request ({signal.Signals(number).name}") == 2 and "finished" in notes
    assert signal.getsignal(number) == signal.SIG_DFL


def test_a_signal_while_the_queue_fills_leaves_a_checkpoint_of_step_0(encoder, tmp_path, monkeypatch):
    whole, run = tmp_path / "whole", tmp_path / "run"
    train.main(generator_arguments(encoder, whole, "--steps", "3", *QUEUE))
    fill = train.fill

    def fill_with_signal(*options, **more):
        stop_here()
        fill(*options, **more)

    monkeypatch.setattr(train, "fill", fill_with_signal)
    arguments = generator_arguments(encoder, run, "--steps", "3", *QUEUE)
    run_until_stopped(arguments)
    assert checkpoint_tensors(run, 0)["data/pushes"] > 0 and not (run / "metrics.jsonl").exists()
    monkeypatch.setattr(train, "fill", fill)
    train.main(arguments)
    ours, theirs = checkpoint_tensors(run, 3), checkpoint_tensors(whole, 3)
    assert all(ours[name].equal(theirs[name]) for name in theirs)


@pytest.mark.slow
def test_a_signal_while_everything_ends_does_not_hinder_the_end(encoder, tmp_path, monkeypatch):
    finish_run = train.finish_run

    def finish_with_signal(*options):
        stop_here()
        finish_run(*options)

    monkeypatch.setattr(train, "finish_run", finish_with_signal)
    train.main(generator_arguments(encoder, tmp_path / "run", "--steps", "2"))
    assert (tmp_path / "run/exports/ema_0.99/config.json").exists()
    assert "finished" in (tmp_path / "run/RUN.md").read_text()


def test_the_time_limit_stops_with_a_checkpoint_and_counts_anew(encoder, tmp_path):
    run = tmp_path / "run"
    arguments = generator_arguments(encoder, run, "--steps", "3")
    run_until_stopped([*arguments, "--max_hours", "1e-9"])
    assert "stopped on request (max_hours" in (run / "RUN.md").read_text()
    train.main([*arguments, "--max_hours", "1"])
    assert list(metrics(run)) == [1, 2, 3]


@pytest.mark.multiprocess
def test_two_live_runs_cannot_share_a_folder(encoder, tmp_path):
    run = tmp_path / "run"
    arguments = generator_arguments(encoder, run, "--steps", "2000")
    first = Trainer("drift_accel.train", arguments, tmp_path / "first")
    assert first.wait_for((run / "metrics.jsonl").exists)
    before = (run / "RUN.md").read_bytes(), (run / "provenance.json").read_bytes()
    second = Trainer("drift_accel.train", arguments, tmp_path / "second")
    assert second.wait() == [1]
    assert f"a run in {run} is already running" in second.text()
    assert ((run / "RUN.md").read_bytes(), (run / "provenance.json").read_bytes()) == before
    first.send(signal.SIGTERM)
    assert first.wait() == [EXIT_STOPPED]
