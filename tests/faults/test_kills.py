"""kill -9 at random instants: the same command goes on, and the run ends as if nothing had happened."""

import os
from pathlib import Path

import pytest
from kill_driver import EXPORT_EVERY, draw_instants, killed, require_same_end, require_whole_checkpoints, slow_disk
from small_caches import write_digit_pictures
from tiny_runs import TINY_MAE, generator_arguments
from trainer_processes import run_trainer

SEED = int(os.environ.get("FAULT_SEED", "0"))
STEPS = 24
QUEUE = ("--data.queue.per_class", "16", "--data.queue.unconditional", "40", "--data.queue.push", "8")
SHORT = 12
SETTINGS = (
    *("--checkpoint.every", "3", "--checkpoint.keep_every", "6", "--checkpoint.export_every", str(EXPORT_EVERY)),
    *("--ema.decays", "[0.9,0.99]", "--log.sample_every", "12"),
)


@pytest.fixture(scope="module")
def whole_run(encoder, tmp_path_factory):
    """Runs that nobody interrupts, one for each number of processes and way of sampling; all their checkpoints are kept."""
    runs = {}

    def get(steps: int, num_processes: int, more: tuple[str, ...]) -> Path:
        key = steps, num_processes, more
        if key not in runs:
            folder = tmp_path_factory.mktemp("whole")
            arguments = [*SETTINGS, *more, "--steps", str(steps), "--checkpoint.keep_last", "null"]
            arguments = generator_arguments(encoder, folder / "run", *arguments)
            run_trainer("drift_accel.train", arguments, folder / "logs", num_processes=num_processes)
            runs[key] = folder / "run"
        return runs[key]

    return get


def kill_and_finish(arguments, instants, run, whole, logs, *, num_processes=1, module="drift_accel.train", steps=STEPS) -> int:
    """Start the same command once an instant, kill it there, then let it finish. Returns how many blows hit a living run."""
    hits = 0
    for turn, instant in enumerate(instants):
        hits += killed(module, arguments, run, logs / str(turn), instant, num_processes)
        if run.is_dir():
            require_whole_checkpoints(run, whole)
    run_trainer(module, arguments, logs / "last", num_processes=num_processes, tamper=slow_disk)
    require_same_end(run, whole, steps)
    return hits


@pytest.mark.multiprocess
@pytest.mark.parametrize(("num_processes", "more", "kills"), [(1, QUEUE, 2), (2, (), 1)], ids=["one with queue", "two"])
def test_three_kills(num_processes, more, kills, encoder, whole_run, tmp_path):
    whole, run = whole_run(SHORT, num_processes, more), tmp_path / "run"
    instants = draw_instants(SEED, kills, num_processes, SHORT)
    arguments = generator_arguments(encoder, run, *SETTINGS, *more, "--steps", str(SHORT))
    options = {"num_processes": num_processes, "steps": SHORT}
    assert kill_and_finish(arguments, instants, run, whole, tmp_path / "logs", **options) == kills


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("chain", range(2))
@pytest.mark.parametrize(
    ("num_processes", "more", "kills"),
    [(1, (), 4), (1, QUEUE, 4), (2, (), 4), (2, QUEUE, 3)],
    ids=["one", "one with queue", "two", "two with queue"],
)
def test_thirty_kills(num_processes, more, kills, chain, encoder, whole_run, tmp_path, record_property):
    whole, run = whole_run(STEPS, num_processes, more), tmp_path / "run"
    instants = draw_instants(1000 * (SEED + 1) + 10 * chain + len(more), kills, num_processes, STEPS)
    arguments = generator_arguments(encoder, run, *SETTINGS, *more, "--steps", str(STEPS))
    hits = kill_and_finish(arguments, instants, run, whole, tmp_path / "logs", num_processes=num_processes)
    print(f"seed {SEED}, chain {chain}, {num_processes} process(es), queue {bool(more)}: {hits} of {kills} blows hit, {instants}")
    record_property("hits", hits)
    assert hits == kills


def digits_rows(folder: Path) -> tuple[str, ...]:
    """The rows that the encoder is trained and validated on: the digits."""
    return ("--validation.every", "6", "--validation.max_rows", "20")


def encoded_rows(folder: Path) -> tuple[str, ...]:
    """The same: pictures that the bundled VAE encodes while the run goes on."""
    pictures = str(write_digit_pictures(folder / "pictures", 20))
    shape = ("--mae.in_channels", "4", "--mae.input_size", "16", "--data.images.image_size", "64", "--batch_size", "4")
    online = ("--data.source", "images", "--data.path", pictures, "--data.images.vae", "digits", "--data.images.vae_batch", "4")
    return (*online, *shape, "--validation.every", "6", "--validation.path", pictures)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("rows", [digits_rows, encoded_rows])
def test_kills_of_the_encoders_trainer(rows, tmp_path):
    settings = ("--steps", str(STEPS), "--checkpoint.every", "3", "--checkpoint.export_every", "6", "--classifier.steps", "8")
    command = [*TINY_MAE, *settings, *rows(tmp_path), "--output_dir"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    keep_all = ["--checkpoint.keep_last", "null"]
    run_trainer("drift_accel.train_mae", [*command, str(whole), *keep_all], tmp_path / "whole_logs")
    instants = draw_instants(SEED, 3, 1, STEPS)
    hits = kill_and_finish([*command, str(run)], instants, run, whole, tmp_path / "logs", module="drift_accel.train_mae")
    assert hits == 3
