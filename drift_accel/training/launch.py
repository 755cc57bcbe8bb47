"""From a configuration to the processes, types and folder that a run needs; shared by both trainers."""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import GradientAccumulationPlugin
from torch import nn

from drift_accel.foundation.collectives import require_agreement, run_on_main, world_group
from drift_accel.foundation.command_line import configuration_dict
from drift_accel.foundation.provenance import collect_provenance, hash_configuration
from drift_accel.foundation.random_streams import random_stream
from drift_accel.foundation.run_folder import RunFolder
from drift_accel.foundation.storage import atomic_write_json, committed_folder, sha256_file, verify_folder
from drift_accel.training.averages import WeightAverages, average_name
from drift_accel.training.configuration import TrainingConfig
from drift_accel.training.loop import TrainingState

DATA_DESCRIPTION = "data.json"
SUPPORTED_DISTRIBUTION = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
TORCH_TYPES = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}


def start_accelerator(config: TrainingConfig) -> Accelerator:
    """Join the launched processes on the configured device; weights stay in full precision, bfloat16 is autocast.

    Raises ValueError for a number of processes that was not asked for, a kind of distribution that is not supported, and
    float64 on a device that is no CPU.
    """
    accelerator = Accelerator(
        cpu=config.device == "cpu",
        mixed_precision="bf16" if config.precision == "bfloat16" else "no",
        # Said here because accelerate would else take it from the environment and divide the loss.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )
    if accelerator.distributed_type not in SUPPORTED_DISTRIBUTION:
        raise ValueError(
            f"accelerate was set to {accelerator.distributed_type.value}: this version trains with one process or with data "
            "parallelism (MULTI_GPU); choose it in the accelerate configuration or with --multi_gpu"
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


def open_run(
    output_dir: Path, config: TrainingConfig, accelerator: Accelerator, identity: Mapping[str, str] | None = None
) -> RunFolder:
    """Create or reopen the run's folder on the main process; all processes must have the same configuration.

    `identity` are hashes of what the mathematics depends on beside the configuration (the encoder's weights).
    Raises ValueError where the folder belongs to a run with another configuration or identity, showing the difference, or has
    more steps than are asked for; nothing is changed then.
    """
    run = RunFolder(output_dir)
    configuration, identity = configuration_dict(config), dict(identity or {})
    digest = hash_configuration(configuration)
    require_agreement(f"{digest} {sorted(identity.items())}", "configuration and inputs", world_group())

    def open_folder() -> None:
        provenance = _read_provenance(run, identity)
        done = max(run.checkpoint_steps(), default=0)
        if done > config.steps:
            raise ValueError(
                f"{output_dir} has {done} steps already but steps is {config.steps}: raise it, or use another folder"
            )
        run.create()
        run.open_configuration(configuration, may_change=config.may_change)
        session = collect_provenance(command=sys.argv, configuration_hash=digest)
        provenance["sessions"].append({**session, "num_processes": accelerator.num_processes})
        atomic_write_json(run.provenance_path, provenance)
        run.start_notes(f"{' '.join(sys.argv)} on {accelerator.num_processes} process(es), {accelerator.device}")

    run_on_main(open_folder, world_group())
    return run


def _read_provenance(run: RunFolder, identity: dict[str, str]) -> dict[str, Any]:
    """What the run recorded before, {"identity", "sessions"}; ValueError where its inputs were others."""
    if not run.provenance_path.exists() or not run.config_path.exists():
        return {"identity": identity, "sessions": []}
    provenance = json.loads(run.provenance_path.read_text(encoding="utf-8"))
    changed = [name for name, value in identity.items() if provenance["identity"].get(name) != value]
    if changed:
        lines = "\n".join(f"  {name}: {provenance['identity'].get(name)} -> {identity[name]}" for name in changed)
        raise ValueError(
            f"the run in {run.path} was started with other inputs (saved -> now):\n{lines}\n"
            "Restore them, or give another --output_dir"
        )
    return provenance


def hash_weights(folder: str | Path) -> str:
    """One SHA-256 over the weight files of a model folder, safetensors or the release's msgpack, by name."""
    files = sorted(path for pattern in ("*.safetensors", "**/*.msgpack") for path in Path(folder).glob(pattern))
    return hashlib.sha256("".join(f"{path.name}:{sha256_file(path)}" for path in files).encode()).hexdigest()


def finish_run(run: RunFolder, state: TrainingState, first_step: int, data: Mapping[str, Any]) -> None:
    """Export the averages where something was trained or an export is missing or cut."""
    names = [average_name(decay) for decay in state.averages.averages]
    whole = all(not verify_folder(run.export_dir(name), full=False) for name in names)
    if state.step == first_step and whole:
        return
    for folder in export_averages(run, state.task.model, state.averages, data):
        print(f"exported {folder}")


def export_averages(run: RunFolder, model: nn.Module, averages: WeightAverages, data: Mapping[str, Any]) -> list[Path]:
    """Write each average as a folder that `from_pretrained` reads: exports/ema_DECAY. For the main process alone.

    `data` describes what the model was trained on (`describe_source`); it lies beside the weights as data.json.
    """
    folders = []
    provenance = run.provenance_path.read_bytes()
    for decay in averages.averages:
        target = run.export_dir(average_name(decay))
        with averages.applied_to(model, decay), committed_folder(target, replace=True) as folder:
            model.save_pretrained(folder)
            (folder / "provenance.json").write_bytes(provenance)
            atomic_write_json(folder / DATA_DESCRIPTION, data)
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
