"""Measure what a checkpoint costs a run: python tools/benchmark_checkpoint.py FOLDER [--preset L/2] [--averages 2]

Writes checkpoints of a generator with its optimiser state and averages into FOLDER, on the disk to be measured, while a loop of
small steps goes on, and prints how long the loop stood still (the copy to host memory), how much slower its steps were during the
writing, and how long it was until the checkpoint was complete: written, flushed and hashed. Nothing is trained; the folder is
removed at the end.
"""

import argparse
import shutil
import statistics
import time
from pathlib import Path

import torch

from drift_accel.foundation.run_folder import RunFolder
from drift_accel.foundation.storage import require_free_space
from drift_accel.training.averages import WeightAverages
from drift_accel.training.checkpoint import CheckpointConfig
from drift_accel.training.checkpoint_writer import CheckpointWriter
from drift_accel.training.optimizer import OptimizerConfig, make_optimizer
from drift_accel.training.retention import Retention
from drift_accel.training.snapshot import take_snapshot

DECAYS = (0.999, 0.9995, 0.9998, 0.9999)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="new folder on the disk to be measured")
    parser.add_argument("--preset", default="L/2", help="generator preset")
    parser.add_argument("--averages", type=int, default=2, choices=range(1, 5), help="how many moving averages")
    parser.add_argument("--repeats", type=int, default=2, help="checkpoints to write")
    options = parser.parse_args()
    if options.folder.exists():
        parser.error(f"{options.folder} exists: give a new folder")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, optimizer, averages = make_state(options.preset, DECAYS[: options.averages], device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    num_bytes = 4 * parameters * (3 + options.averages)
    check_memory(num_bytes)
    require_free_space(options.folder, 2 * num_bytes, "two checkpoints")
    print(f"{parameters / 1e6:.0f} M parameters, {options.averages} averages: {num_bytes / 1e9:.2f} GB a checkpoint, {device}")
    run = RunFolder(options.folder)
    run.create()
    try:
        measure(run, model, optimizer, averages, options.repeats, device)
    finally:
        shutil.rmtree(options.folder)


def make_state(preset: str, decays: tuple[float, ...], device: torch.device):
    """Model, optimiser with moments, averages. All share the weights' memory: what is measured is their copies."""
    from drift_accel.models import Generator
    from drift_accel.models.generator import GENERATOR_PRESETS

    with device:
        model = Generator(**GENERATOR_PRESETS[preset]).to(device)
    optimizer = make_optimizer(model, OptimizerConfig())
    for parameter in model.parameters():
        moments = {"exp_avg": parameter.detach(), "exp_avg_sq": parameter.detach()}
        optimizer.state[parameter] = {"step": torch.zeros((), device=device), **moments}
    averages = WeightAverages(model, ())
    averages.averages = {decay: {name: value.detach() for name, value in model.named_parameters()} for decay in decays}
    return model, optimizer, averages


def check_memory(wanted: int) -> None:
    """End with a message where the host has not `wanted` bytes free."""
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    available = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
    if available is not None and available < wanted:
        raise SystemExit(
            f"the copy needs {wanted / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are free: take fewer --averages"
        )


def measure(run: RunFolder, model, optimizer, averages: WeightAverages, repeats: int, device: torch.device) -> None:
    """Write checkpoints beside a loop of steps and print the times."""
    config = CheckpointConfig(keep_last=1)
    writer = CheckpointWriter(run, config, Retention(config), lambda snapshot: None)
    matrix = torch.randn(256, 256, device=device)
    started = time.perf_counter()
    writer.reserve(model, averages)
    writer.wait()
    print(f"memory for the copy taken in {time.perf_counter() - started:.1f} s (a run does that beside its first steps)")
    before = [one_step(matrix) for _ in range(50)]
    print(f"steps without a checkpoint: median {1e3 * statistics.median(before):.1f} ms, slowest {1e3 * max(before):.1f} ms")
    for step in range(1, repeats + 1):
        started = time.perf_counter()
        snapshot = take_snapshot(
            step, model, optimizer, averages, data_state={}, record={"purpose": "benchmark"}, buffers=writer.buffers
        )
        writer.submit(snapshot)
        stalled = time.perf_counter() - started
        during = []
        while writer.is_busy:
            during.append(one_step(matrix))
        writer.wait()
        total = time.perf_counter() - started
        if writer.failure is not None:
            raise writer.failure
        print(
            f"checkpoint {step}: the loop stood still {stalled:.2f} s, complete after {total:.1f} s "
            f"({snapshot.num_bytes / total / 1e6:.0f} MB/s); steps meanwhile: median {1e3 * statistics.median(during):.1f} ms, "
            f"slowest {1e3 * max(during):.1f} ms"
        )


def one_step(matrix: torch.Tensor) -> float:
    """Seconds of a small piece of work with some Python in it."""
    started = time.perf_counter()
    total = 0.0
    for _ in range(20):
        total += (matrix @ matrix).sum().item()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
