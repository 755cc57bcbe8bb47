"""Checkpoints: everything that a run needs to go on as if it had never stopped.

A checkpoint of step n is the state after n optimiser steps. Tensors lie in safetensors, whole whatever number of processes wrote
them, the rest in JSON; nothing is unpickled. Draws are stateless, so there is no random state to keep.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from drift_accel.foundation.run_folder import RunFolder
from drift_accel.foundation.storage import atomic_write_json, require_free_space
from drift_accel.training.averages import WeightAverages
from drift_accel.training.sharding import fill, placed_like, require_same_shapes
from drift_accel.training.snapshot import DATA_FILE, MODEL_FILE, OPTIMIZER_FILE, Snapshot, average_file

STATE_FILE = "state.json"
ON_ERROR = ("stop", "continue")
BEST = ("min", "max")
SPARE_BYTES = 2**20  # room for the small files of a checkpoint


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept. Raises ValueError for values that cannot work."""

    every: int = 1000
    """Steps between checkpoints; the last step always has one."""
    keep_last: int | None = 2
    """Number of newest checkpoints to keep; null keeps all."""
    keep_every: int | None = None
    """Checkpoints of multiples of this number of steps are kept for good; a multiple of `every`, null: none."""
    keep_best: str | None = None
    """Name of a metric of the records (drift_sqnorm_0.2) or of an evaluation: the checkpoint with its best value is kept too."""
    best_is: str = "min"
    """Whether "min" or "max" is the best value of keep_best."""
    export_every: int | None = None
    """Steps between exports of the averages, exports/ema_DECAY_step_N; a multiple of `every`, null: only the final ones."""
    on_error: str = "stop"
    """What follows where a checkpoint cannot be written (a full disk): "stop", or "continue" and try again at the next one."""

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"checkpoint.every is {self.every}: give a number of steps of at least 1")
        if self.keep_last is not None and self.keep_last < 1:
            raise ValueError(f"checkpoint.keep_last is {self.keep_last}: keep at least 1, or null for all")
        for name in ("keep_every", "export_every"):
            steps = getattr(self, name)
            if steps is not None and (steps < 1 or steps % self.every):
                raise ValueError(f"checkpoint.{name} is {steps}: give a multiple of checkpoint.every ({self.every}), or null")
        if self.keep_best is not None and not self.keep_best:
            raise ValueError("checkpoint.keep_best is empty: give the name of a metric, or null")
        if self.best_is not in BEST:
            raise ValueError(f"checkpoint.best_is is {self.best_is!r}: choose one of {', '.join(BEST)}")
        if self.on_error not in ON_ERROR:
            raise ValueError(f"checkpoint.on_error is {self.on_error!r}: choose one of {', '.join(ON_ERROR)}")


def write_snapshot(run: RunFolder, snapshot: Snapshot) -> Path:
    """Write a snapshot as the checkpoint of its step, complete or not at all. For the main process alone.

    Raises OSError, where the disk is full naming the space that is wanted; earlier checkpoints stay as they are.
    """
    wanted = snapshot.num_bytes + SPARE_BYTES
    require_free_space(run.checkpoints_dir, wanted, f"the checkpoint of step {snapshot.step}")
    try:
        with run.new_checkpoint(snapshot.step) as folder:
            for name, group in snapshot.tensors.items():
                save_file({key: tensor.contiguous() for key, tensor in group.items()}, folder / name)
            atomic_write_json(folder / STATE_FILE, snapshot.record)
    except SafetensorError as error:  # how that library tells of a disk that filled up meanwhile
        raise OSError(f"the checkpoint of step {snapshot.step} could not be written to {run.checkpoints_dir}: {error}") from error
    return run.checkpoint_dir(snapshot.step)


def read_record(folder: Path) -> dict[str, Any]:
    """What a checkpoint says about itself: step, decays, model, configuration, versions. Raises OSError, ValueError."""
    return json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, averages: WeightAverages
) -> dict[str, Tensor]:
    """Restore model, optimiser and averages, split or not, from a complete checkpoint; return the samplers' state in it.

    Raises ValueError where it belongs to another model or other averages.
    """
    record = read_record(folder)
    missing = [decay for decay in averages.averages if decay not in record["decays"]]
    if missing:
        raise ValueError(f"checkpoint {folder} has averages {record['decays']}: none of decay {missing}; restore ema.decays")
    load_weights(model, load_file(folder / MODEL_FILE), f"checkpoint {folder} does not fit the configured model")
    load_optimizer_tensors(model, optimizer, load_file(folder / OPTIMIZER_FILE))
    for decay in averages.averages:
        averages.load(decay, load_file(folder / average_file(decay)))
    return load_file(folder / DATA_FILE) if (folder / DATA_FILE).exists() else {}


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], what: str) -> None:
    """Put whole weights into a model, split or not. Raises ValueError beginning with `what` where they do not fit."""
    own = model.state_dict()
    require_same_shapes(own, weights, what)
    for name, tensor in own.items():
        fill(tensor, weights[name])


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put state saved by `optimizer_tensors` back. Raises ValueError for a state of a parameter that does not exist."""
    parameters = dict(model.named_parameters())
    for key, tensor in tensors.items():
        kind, name = key.split("::", 1)
        if name not in parameters:
            raise ValueError(f"the saved optimiser knows a parameter {name!r} that the configured model does not have")
        parameter = parameters[name]
        # The moments lie as their parameter does; the count of steps is a single number.
        like = parameter if tensor.shape == parameter.shape else None
        optimizer.state[parameter][kind] = placed_like(tensor, like) if like is not None else tensor.to(parameter.device)
