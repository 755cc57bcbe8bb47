"""Checkpoints: everything that a run needs to go on as if it had never stopped.

A checkpoint of step n is the state after n optimiser steps. Tensors lie in safetensors, the rest in JSON; nothing is
unpickled. Draws are stateless, so there is no random state to keep.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from drift_accel.foundation.run_folder import RunFolder
from drift_accel.foundation.storage import atomic_write_json, require_free_space
from drift_accel.training.averages import WeightAverages, average_name

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
DATA_FILE = "data.safetensors"
STATE_FILE = "state.json"


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and how many are kept. Raises ValueError for counts below 1."""

    every: int = 1000
    """Steps between checkpoints; the last step always has one."""
    keep_last: int | None = 2
    """Number of newest checkpoints to keep; null keeps all."""

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"checkpoint.every is {self.every}: give a number of steps of at least 1")
        if self.keep_last is not None and self.keep_last < 1:
            raise ValueError(f"checkpoint.keep_last is {self.keep_last}: keep at least 1, or null for all")


def save_checkpoint(
    run: RunFolder,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    averages: WeightAverages,
    *,
    data_state: Mapping[str, Tensor],
    record: Mapping,
) -> Path:
    """Write the checkpoint of `step` complete or not at all; `record` is stored beside it. For the main process alone.

    `data_state` is what the samplers need to go on, empty where their draws are functions of the step.

    Raises OSError naming the space that is wanted where the disk is full; earlier checkpoints stay as they are.
    """
    tensors = {MODEL_FILE: model.state_dict(), OPTIMIZER_FILE: optimizer_tensors(model, optimizer)}
    tensors.update({f"{average_name(decay)}.safetensors": average for decay, average in averages.averages.items()})
    if data_state:
        tensors[DATA_FILE] = data_state
    wanted = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values())
    require_free_space(run.checkpoints_dir, wanted, f"the checkpoint of step {step}")
    with run.new_checkpoint(step) as folder:
        for name, group in tensors.items():
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in group.items()}, folder / name)
        atomic_write_json(folder / STATE_FILE, {**record, "step": step, "decays": list(averages.averages)})
    return run.checkpoint_dir(step)


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, averages: WeightAverages
) -> dict[str, Tensor]:
    """Restore model, optimiser and averages from a complete checkpoint; return the samplers' state in it.

    Raises ValueError where it belongs to another model or other averages.
    """
    record = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    missing = [decay for decay in averages.averages if decay not in record["decays"]]
    if missing:
        raise ValueError(f"checkpoint {folder} has averages {record['decays']}: none of decay {missing}; restore ema.decays")
    try:
        model.load_state_dict(load_file(folder / MODEL_FILE), strict=True)
    except RuntimeError as error:
        raise ValueError(f"checkpoint {folder} does not fit the configured model: {error}") from error
    load_optimizer_tensors(model, optimizer, load_file(folder / OPTIMIZER_FILE))
    for decay in averages.averages:
        averages.load(decay, load_file(folder / f"{average_name(decay)}.safetensors"))
    return load_file(folder / DATA_FILE) if (folder / DATA_FILE).exists() else {}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by parameter name: {"exp_avg::blocks.0.weight": tensor, ...}."""
    return {
        f"{kind}::{name}": tensor
        for name, parameter in model.named_parameters()
        for kind, tensor in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put state saved by `optimizer_tensors` back. Raises ValueError for a state of a parameter that does not exist."""
    parameters = dict(model.named_parameters())
    for key, tensor in tensors.items():
        kind, name = key.split("::", 1)
        if name not in parameters:
            raise ValueError(f"the saved optimiser knows a parameter {name!r} that the configured model does not have")
        parameter = parameters[name]
        optimizer.state[parameter][kind] = tensor.to(parameter.device)
