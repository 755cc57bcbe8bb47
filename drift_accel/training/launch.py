"""From a configuration to the processes, types and folder that a run needs; shared by both trainers."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from drift_accel.foundation.collectives import require_agreement, world_group
from drift_accel.foundation.command_line import configuration_dict
from drift_accel.foundation.provenance import collect_provenance, hash_configuration
from drift_accel.foundation.random_streams import random_stream
from drift_accel.foundation.run_folder import RunFolder
from drift_accel.foundation.storage import atomic_write_json, committed_folder
from drift_accel.training.averages import WeightAverages
from drift_accel.training.configuration import TrainingConfig

TORCH_TYPES = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}


def start_accelerator(config: TrainingConfig) -> Accelerator:
    """Join the launched processes on the configured device; weights stay in full precision, bfloat16 is autocast.

    Raises ValueError for a number of processes that was not asked for, and for float64 on a device that is no CPU.
    """
    accelerator = Accelerator(
        cpu=config.device == "cpu",
        mixed_precision="bf16" if config.precision == "bfloat16" else "no",
        step_scheduler_with_optimizer=False,
    )
    config.check_launch(accelerator.num_processes)
    if config.precision == "float64" and accelerator.device.type != "cpu":
        raise ValueError(f"precision is 'float64' on {accelerator.device}: it is for proofs on the CPU; add --device cpu")
    return accelerator


def place(model: nn.Module, config: TrainingConfig, device: torch.device) -> nn.Module:
    """The model on the run's device in the type of its weights."""
    model = model.to(device)
    return model.double() if TORCH_TYPES[config.precision] == torch.float64 else model


def seeded_generator(seed: int, stream: str) -> torch.Generator:
    """A torch generator for initial weights, keyed like every other draw of the run."""
    return torch.Generator(device="cpu").manual_seed(int(random_stream(seed, stream, 0).integers(2**63)))


def open_run(output_dir: Path, config: TrainingConfig, accelerator: Accelerator) -> RunFolder:
    """Create or reopen the run's folder on the main process; all processes must have the same configuration.

    Raises ValueError where the folder belongs to a run with another configuration, showing the difference.
    """
    run = RunFolder(output_dir)
    configuration = configuration_dict(config)
    digest = hash_configuration(configuration)
    require_agreement(digest, "the configuration", world_group())
    if accelerator.is_main_process:
        run.create()
        run.open_configuration(configuration, may_change=config.may_change)
        provenance = collect_provenance(command=sys.argv, configuration_hash=digest)
        atomic_write_json(run.provenance_path, {**provenance, "num_processes": accelerator.num_processes})
        run.start_notes(f"{' '.join(sys.argv)} on {accelerator.num_processes} process(es), {accelerator.device}")
    accelerator.wait_for_everyone()
    return run


def export_averages(run: RunFolder, model: nn.Module, averages: WeightAverages) -> list[Path]:
    """Write each average as a folder that `from_pretrained` reads: exports/ema_DECAY. For the main process alone."""
    folders = []
    provenance = run.provenance_path.read_bytes()
    for decay in averages.averages:
        target = run.export_dir(f"ema_{decay:.12g}")
        with averages.applied_to(model, decay), committed_folder(target, replace=True) as folder:
            model.save_pretrained(folder)
            (folder / "provenance.json").write_bytes(provenance)
        folders.append(target)
    return folders


def closing_notes(run: RunFolder, accelerator: Accelerator, work: Callable[[], None]) -> None:
    """Run `work` and write into RUN.md how it ended, also when it failed."""
    try:
        work()
    except BaseException as error:
        if accelerator.is_main_process:
            run.finish_notes(f"stopped by {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        raise
    if accelerator.is_main_process:
        run.finish_notes("finished")
