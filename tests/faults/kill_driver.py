"""Kills trainers at random instants and starts the same command again, until the run is through.

The instants are drawn from a seed: a step, what the run is doing then (starting, training, writing a checkpoint, exporting), a
delay from there on, and which of the processes is hit. They follow the run's own progress, so that a faster machine is hit too.
"""

import contextlib
import random
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import checkpoint_tensors, metrics
from trainer_processes import Trainer

from drift_accel.foundation.run_folder import RunFolder
from drift_accel.foundation.storage import verify_folder

EXPORT_EVERY = 6  # steps, in the runs that are killed
# Seconds within which the blow falls, counted from where the phase is seen.
PHASES = {"start": 0.6, "training": 0.1, "writing": 0.1, "export": 0.1}
TIMING = ("steps_per_second", "samples_per_second", "data_wait_share", "vae_share", "memory_gb")
GRACE = 20.0  # seconds after which a launcher ends the processes that were spared
SLOW_FLUSH = 0.006  # seconds: as on a busy disk, so that blows fall between the files of a checkpoint


@dataclass(frozen=True)
class Instant:
    """One blow: the first moment of a phase from `step` on, how long after it, on which processes (one of several, or all)."""

    phase: str
    step: int
    delay: float
    ranks: tuple[int, ...]


def draw_instants(seed: int, count: int, num_processes: int, steps: int) -> list[Instant]:
    """`count` instants in rising order over a run of `steps`, the same ones for the same seed.

    Phases come up in turn. The last steps are spared, so that every blow finds a living run.
    """
    stream = random.Random(f"{seed}/{num_processes}")
    names = list(PHASES)
    stream.shuffle(names)
    everyone = tuple(range(num_processes))
    choices = [everyone, *((rank,) for rank in everyone)] if num_processes > 1 else [everyone]
    width = (steps - EXPORT_EVERY) / count
    instants = []
    for turn in range(count):
        name = names[turn % len(names)]
        step = 1 + int(width * (turn + stream.random()))
        instants.append(Instant(name, step, stream.uniform(0, PHASES[name]), stream.choice(choices)))
    return instants


def slow_disk(rank: int) -> None:
    """Tamper with a trainer: every flush of a file takes a while."""
    from drift_accel.foundation import storage

    flush = storage._flush_to_disk

    def slowly(path):
        time.sleep(SLOW_FLUSH)
        flush(path)

    storage._flush_to_disk = slowly


def killed(module: str, arguments: list[str], run: Path, logs: Path, instant: Instant, num_processes: int) -> bool:
    """Start the command and kill it at the instant; False where the run was over before that."""
    started = time.time()
    trainer = Trainer(module, arguments, logs, num_processes=num_processes, tamper=slow_disk)
    if trainer.wait_for(lambda: has_come(instant, run, trainer.processes[0].pid, started)):
        time.sleep(instant.delay)
        trainer.send(signal.SIGKILL, *instant.ranks)
        with contextlib.suppress(TimeoutError):  # one that waits for the others to come up hears of nothing
            trainer.wait_for(lambda: not trainer.is_alive, GRACE)
    return any(code != 0 for code in trainer.wait())


def has_come(instant: Instant, run: Path, pid: int, started: float) -> bool:
    """Whether the run whose main process is `pid` is in the phase of the instant; what was there when it started says nothing."""
    if instant.phase == "start":
        return True
    if instant.phase == "training":
        records = run / "metrics.jsonl"
        if not records.exists() or records.stat().st_mtime < started:
            return False
        steps = re.findall(rb'^{"step": (\d+),', records.read_bytes(), re.M)
        return bool(steps) and int(steps[-1]) >= instant.step
    folder = run / ("checkpoints" if instant.phase == "writing" else "exports")
    writing = [re.search(r"step_(\d+)", path.name) for path in folder.glob(f".*.partial-{pid}-*")]
    return any(match and int(match[1]) >= instant.step for match in writing)


def require_whole_checkpoints(run: Path, whole: Path) -> None:
    """Everything that looks complete in a killed run is complete and equals what an uninterrupted run had at that step."""
    folder = RunFolder(run)
    found = folder.latest_complete_checkpoint(lambda message: None)
    steps = folder.checkpoint_steps()
    assert found is None or found[0] == steps[-1], f"a checkpoint has its name but is damaged: {steps}"
    for step in steps:
        assert verify_folder(folder.checkpoint_dir(step)) == []
        require_equal(checkpoint_tensors(run, step), checkpoint_tensors(whole, step), f"checkpoint {step}")
    for export in sorted((run / "exports").glob("[!.]*")):
        assert verify_folder(export) == [], export
        name = "diffusion_pytorch_model.safetensors"
        require_equal(load_file(export / name), load_file(whole / "exports" / export.name / name), export.name)


def require_same_end(run: Path, whole: Path, steps: int) -> None:
    """The run ended as the uninterrupted one did: weights to the bit, every step once in its records, the same numbers."""
    require_whole_checkpoints(run, whole)
    assert RunFolder(run).checkpoint_steps()[-1] == steps
    assert sorted(path.name for path in (run / "exports").iterdir()) == sorted(p.name for p in (whole / "exports").iterdir())
    ours, theirs = metrics(run), metrics(whole)  # a step that appears twice is an error there
    assert list(ours) == list(theirs) == list(range(1, steps + 1))
    for step, record in ours.items():
        different = [tag for tag, value in record.items() if tag not in TIMING and theirs[step][tag] != value]
        assert not different, f"step {step}: {different}"
    scalars = EventAccumulator(str(run / "tensorboard")).Reload().Scalars("loss")
    assert [event.step for event in scalars] == list(range(1, steps + 1))
    hidden = [path for path in run.rglob(".*") if path.name != ".lock"]
    assert not hidden, f"left behind: {hidden}"


def require_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], what: str) -> None:
    """Bitwise equality of two sets of tensors."""
    assert ours.keys() == theirs.keys(), what
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different, f"{what}: {len(different)} of {len(ours)} tensors differ, first {different[:3]}"
