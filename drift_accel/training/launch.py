"""From a configuration to the processes, types and folder that a run needs; shared by both trainers."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs
from torch import distributed, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from drift_accel.foundation.collectives import require_agreement, run_on_main, world_group
from drift_accel.foundation.command_line import configuration_dict, default_values
from drift_accel.foundation.devices import pin_launched_device
from drift_accel.foundation.provenance import collect_provenance, hash_configuration
from drift_accel.foundation.random_streams import random_stream
from drift_accel.foundation.run_folder import RunFolder
from drift_accel.foundation.storage import atomic_write_json
from drift_accel.training.configuration import TrainingConfig
from drift_accel.training.run_summary import run_summary
from drift_accel.training.stops import EXIT_STOPPED, StopRequested, StopWishes

SUPPORTED_DISTRIBUTION = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.FSDP)
TORCH_TYPES = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}


def start_accelerator(config: TrainingConfig) -> Accelerator:
    """Join the launched processes on the configured device; weights stay in full precision, bfloat16 is autocast.

    Raises ValueError for a GPU that is not there, a number of processes that was not asked for, a kind of distribution that is
    not supported, and float64 on a device that is no CPU.
    """
    pin_launched_device(config.device)
    accelerator = Accelerator(
        cpu=config.device == "cpu",
        mixed_precision="bf16" if config.precision == "bfloat16" else "no",
        # Said here because accelerate would else take it from the environment and divide the loss.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        fsdp_plugin=_fsdp_plugin(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=config.collective_timeout_minutes))],
    )
    kind = accelerator.distributed_type
    if kind not in SUPPORTED_DISTRIBUTION:
        raise ValueError(
            f"accelerate was set to {kind.value}: this trains with one process, with data parallelism (--multi_gpu) or with "
            "FSDP2 (--use_fsdp --fsdp_version 2); choose one of them in the accelerate configuration or on its command line"
        )
    if _fsdp_is_asked_for() and kind != DistributedType.FSDP:
        raise ValueError(
            f"FSDP was asked for, but accelerate started {kind.value}: it needs a GPU a process. Leave --use_fsdp out; data "
            "parallelism trains the same, with a whole copy of weights and optimiser on each process"
        )
    config.check_launch(accelerator.num_processes)
    if config.precision == "float64" and accelerator.device.type != "cpu":
        raise ValueError(f"precision is 'float64' on {accelerator.device}: it is for proofs on the CPU; add --device cpu")
    return accelerator


def _fsdp_is_asked_for() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def _fsdp_plugin() -> FullyShardedDataParallelPlugin | None:
    """FSDP2 with the arithmetic of data parallelism: weights are split by block, gathered and used in full precision.

    bfloat16 is autocast's, as everywhere; fully_shard's own casts would reach what must stay in float32. Raises ValueError for
    what is not supported.
    """
    if not _fsdp_is_asked_for():
        return None
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ValueError(f"FSDP version {version} was asked for: give accelerate --fsdp_version 2")
    if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        raise ValueError(
            "FSDP_OFFLOAD_PARAMS is true: weights on the processor are not supported; leave --fsdp_offload_params out"
        )
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",  # by the model's _no_split_modules
        cpu_ram_efficient_loading=False,
        activation_checkpointing=False,  # gradient_checkpointing is the trainer's own
        mixed_precision_policy=MixedPrecisionPolicy(),
    )


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
    group = world_group()
    configuration, identity = configuration_dict(config), dict(identity or {})
    digest = hash_configuration(configuration)
    require_agreement(f"{digest} {sorted(identity.items())}", "configuration and inputs", group)

    def open_folder() -> None:
        run.lock()
        provenance = _read_provenance(run, identity)
        done = max(run.checkpoint_steps(), default=0)
        if done > config.steps:
            raise ValueError(
                f"{output_dir} has {done} steps already but steps is {config.steps}: raise it, or use another folder"
            )
        run.create()
        run.open_configuration(configuration, config.may_change, default_values(type(config)))
        session = collect_provenance(command=sys.argv, configuration_hash=digest)
        provenance["sessions"].append({**session, "num_processes": accelerator.num_processes})
        atomic_write_json(run.provenance_path, provenance)
        text = f"{' '.join(sys.argv)} on {accelerator.num_processes} process(es), {accelerator.device}"
        run.start_notes(text, run_summary(configuration, session, identity))

    try:
        run_on_main(open_folder, group)
    except BaseException:
        run.unlock()
        raise
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


def closing_notes(
    run: RunFolder, accelerator: Accelerator, work: Callable[[StopWishes], None], *, max_hours: float | None = None
) -> None:
    """Run `work` and write into RUN.md how it ended, also when it failed; then the folder is free for another start.

    SIGTERM and SIGUSR1 become wishes that `work` is given. Ends the process with EXIT_STOPPED where it stopped because of them
    or of `max_hours`. A lost process, or one that does not answer, becomes a LostProcessError.
    """
    outcome, stopped = "finished", False
    with StopWishes(max_hours) as stops:
        try:
            work(stops)
        except StopRequested as stop:
            outcome, stopped = f"stopped on request ({stop}); the same command goes on", True
            accelerator.print(f"{run.path}: {outcome}")
        except BaseException as error:
            shown = lost_process(error, run) or error
            outcome = f"stopped by {type(shown).__name__}: {str(shown).splitlines()[0] if str(shown) else ''}"
            if shown is not error:
                raise shown from error
            raise
        finally:
            if accelerator.is_main_process:
                try:
                    with report_only(OSError, ValueError):  # neither a full disk nor a diary that was closed hides the ending
                        run.finish_notes(f"{outcome}{last_values(run)}")
                finally:
                    run.unlock()
        if stopped:
            accelerator.wait_for_everyone()  # a launcher kills the others once the first process has ended with a code
            accelerator.end_training()
            raise SystemExit(EXIT_STOPPED)


def last_values(run: RunFolder) -> str:
    """The last record in a few words, for the diary; empty where there is none that can be read."""
    try:
        record = run.read_metrics()[-1]
    except (OSError, ValueError, IndexError):
        return ""
    norms = sorted((name for name in record if name.startswith("drift_sqnorm_") and "/" not in name), reverse=True)[:1]
    shown = [f"{name} {record[name]:.4g}" for name in ("loss", *norms, "diversity_ratio") if isinstance(record.get(name), float)]
    return f" (step {record['step']}: {', '.join(shown)})"


class LostProcessError(RuntimeError):
    """Another process of the run is gone or does not answer."""


# What torch and gloo say when a message does not come through.
_LOST = ("gloo", "nccl", "connection closed by peer", "connection reset", "timed out", "broken pipe", "remote process")


def lost_process(error: BaseException, run: RunFolder) -> LostProcessError | None:
    """An error of a message between processes, told in terms of the run; None for any other error."""
    kinds = (distributed.DistBackendError, distributed.DistNetworkError, distributed.DistStoreError)
    text = str(error).lower()
    if not isinstance(error, kinds) and not (type(error) is RuntimeError and any(word in text for word in _LOST)):
        return None
    steps = run.checkpoint_steps()
    goes_on = f"from the checkpoint of step {steps[-1]}" if steps else "from the beginning"
    return LostProcessError(
        "another process of the run was lost, or did not answer within collective_timeout_minutes; its own messages say why. "
        f"The same command goes on {goes_on}. ({str(error).splitlines()[0]})"
    )


@contextmanager
def report_only(*kinds: type[Exception]) -> Iterator[None]:
    """Print errors of these kinds instead of raising them."""
    try:
        yield
    except kinds as error:
        print(f"warning: {error}", file=sys.stderr)
