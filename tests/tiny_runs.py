"""Runs of the real trainers that are small enough for the suite: the digits recipes with fewer and thinner parts."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
TINY_MAE = [
    *("--config", str(ROOT / "train_configs/mae_digits.yaml"), "--mae.width", "8", "--mae.blocks", "[1,1,1,1]"),
    *("--batch_size", "16", "--steps", "6", "--classifier.steps", "2", "--log.every", "1", "--device", "cpu"),
]
TINY_GENERATOR = [
    *("--config", str(ROOT / "train_configs/digits.yaml"), "--generator.hidden_size", "32", "--generator.depth", "1"),
    *("--generator.num_heads", "2", "--batch.labels", "4", "--batch.generated", "6"),
    *("--batch.positives", "5", "--batch.negatives", "3", "--optimizer.warmup_steps", "2", "--log.every", "1"),
    *("--log.sample_every", "1000", "--sample.columns", "2", "--device", "cpu", "--evaluation.every", "null"),
    # Raw block outputs only: a stage's norm with one channel a group makes means that are constant up to rounding.
    *("--features.maps", '["conv1","layer1_blk1","layer2_blk1"]'),
]


def tiny_encoder(folder: Path) -> Path:
    """Train a tiny masked autoencoder in this process and return its export."""
    from drift_accel.train_mae import main

    main([*TINY_MAE, "--output_dir", str(folder)])
    return folder / "exports/ema_0.99"


def generator_arguments(encoder: Path, run: Path, *more: str) -> list[str]:
    """Arguments of drift_accel.train for a tiny run."""
    return [*TINY_GENERATOR, "--encoder.path", str(encoder), "--output_dir", str(run), *more]


def launch(num_processes: int, module: str, arguments: list[str], *, timeout: float = 300) -> subprocess.CompletedProcess:
    """Run a trainer under `accelerate launch` on the CPU; the output is in the result."""
    return subprocess.run(
        launch_command(num_processes, module, arguments),
        env=launch_environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def launch_command(num_processes: int, module: str, arguments: list[str]) -> list[str]:
    """The command line that starts a module in `num_processes` processes on this machine's CPU."""
    return [*_launcher(num_processes), "-m", module, *arguments]


def _launcher(num_processes: int) -> list[str]:
    several = ["--multi_gpu", "--main_process_port", "0"] if num_processes > 1 else []
    counts = ["--num_processes", str(num_processes), "--num_machines", "1"]
    plain = ["--mixed_precision", "no", "--dynamo_backend", "no"]
    return [sys.executable, "-m", "accelerate.commands.launch", *several, *counts, *plain]


def launch_tool(name: str, *arguments: object, num_processes: int = 2, timeout: float = 300) -> subprocess.CompletedProcess:
    """A command of tools/ in several processes on this machine's CPU, to its end."""
    command = [*_launcher(num_processes), str(ROOT / f"tools/{name}.py"), *map(str, arguments)]
    return subprocess.run(
        command, env=launch_environment(), capture_output=True, text=True, timeout=timeout, check=False
    )  # fmt: skip


def launch_environment() -> dict[str, str]:
    """One thread a process, no GPU: `--multi_gpu` with this variable is how accelerate starts several on a CPU."""
    return {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def load_tool(name: str) -> ModuleType:
    """A command of tools/ as a module, so that its main can be called without another process."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_tool(name: str, *arguments: object) -> int | str:
    """Call a command of tools/ in this process; its exit status, or the message that it ends with."""
    tool = load_tool(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [f"{name}.py", *map(str, arguments)])
        try:
            return tool.main() or 0
        except SystemExit as stop:
            return stop.code or 0


def metrics(run: Path) -> dict[int, dict]:
    """The records of a run by step; a step that appears twice is an error."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    by_step = {record["step"]: record for record in records}
    assert len(by_step) == len(records), f"steps appear twice: {sorted(record['step'] for record in records)}"
    return by_step


def checkpoint_tensors(run: Path, step: int) -> dict[str, Tensor]:
    """Every tensor of a checkpoint: weights, optimiser, averages."""
    tensors = {}
    for path in sorted((run / f"checkpoints/step_{step:08d}").glob("*.safetensors")):
        tensors.update({f"{path.stem}/{name}": tensor for name, tensor in load_file(path).items()})
    assert tensors, f"no checkpoint of step {step} in {run}"
    return tensors
