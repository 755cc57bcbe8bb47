"""kill -9 at random instants of an extraction: the same command goes on, and the set equals the uninterrupted one."""

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import pytest
from extraction_worker import progress, slow_work
from small_activation_sets import files_of
from tiny_models import write_encoder
from trainer_processes import Trainer, run_trainer

SEED = int(os.environ.get("FAULT_SEED", "0"))
PER_FILE = 20


def arguments(encoder: Path, folder: Path, storage: str, samples: int) -> list[str]:
    layers = "conv1,layer2_blk1,encoder.stages.1.blocks.0.norm1"
    counts = ["--num_samples", samples, "--file_samples", PER_FILE, "--model_batch", 8]
    where = ["--storage", storage, "--output_dir", folder, "--name", "real", "--cpu"]
    return list(map(str, ["digits", "--model", encoder, "--layers", layers, *counts, *where]))


def killed(
    command: list[str], folder: Path, logs: Path, stream: random.Random, phase: str, num_processes: int, samples: int
) -> bool:
    """Start the command and kill one process or all of them at an instant of `phase`; False where it was done before."""
    trainer = Trainer("extraction_worker", command, logs, num_processes=num_processes, tamper=slow_work)
    there, wanted = progress(folder, "real")[0], stream.randint(1, 3)
    ranks = stream.choice([tuple(range(num_processes)), *((rank,) for rank in range(num_processes))])

    def has_come() -> bool:
        chunks, at = progress(folder, "real")
        if phase == "chunks":  # near the end few are left to wait for
            return at == "moving" or (at == "chunks" and chunks >= min(there + wanted, samples // PER_FILE - 1))
        return phase == "start" or at in (phase, "done")

    if trainer.wait_for(has_come):
        time.sleep(stream.uniform(0, 0.4 if phase == "start" else 0.05))
        trainer.send(signal.SIGKILL, *ranks)
        time.sleep(stream.uniform(0, 0.1))
        trainer.send(signal.SIGKILL)  # as a launcher does when one of its processes is gone
    with contextlib.suppress(TimeoutError):
        return any(code != 0 for code in trainer.wait())
    return True


def kill_and_finish(encoder: Path, folder: Path, storage: str, num_processes: int, kills: int, samples: int) -> int:
    """Kill the same command `kills` times, then let it finish; the set must be the whole one. Returns how many blows hit."""
    whole = folder / "whole"
    run_trainer("extraction_worker", arguments(encoder, whole, storage, samples), folder / "logs/whole")
    stream = random.Random(f"{SEED}/{storage}/{num_processes}")
    # Most blows fall while files are written, several while they move to their names.
    phases = ["start"] * (kills // 5) + ["chunks"] * (kills - kills // 5 - kills // 3) + ["moving"] * (kills // 3)
    command, hits = arguments(encoder, folder / "run", storage, samples), 0
    for turn, phase in enumerate(phases):
        hits += killed(command, folder / "run", folder / f"logs/{turn}", stream, phase, num_processes, samples)
    run_trainer("extraction_worker", command, folder / "logs/last", num_processes=num_processes, tamper=slow_work)
    ours, theirs = files_of(folder / "run"), files_of(whole)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert not list((folder / "run").rglob(".*"))
    return hits


@pytest.fixture(scope="module")
def small_encoder(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("encoder") / "mae")


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("storage", ["arrow", "npz"])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_ten_kills(num_processes, storage, small_encoder, tmp_path):
    hits = kill_and_finish(small_encoder, tmp_path, storage, num_processes, 10, 240)
    print(f"seed {SEED}, {num_processes} process(es), {storage}: {hits} of 10 blows hit a living extraction")
    assert hits >= 9


@pytest.mark.multiprocess
def test_a_kill(small_encoder, tmp_path):
    assert kill_and_finish(small_encoder, tmp_path, "arrow", 1, 1, 60) == 1
