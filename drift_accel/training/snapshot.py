"""A run's state at one step, copied to the host so that training can go on while it is written."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from drift_accel.training.averages import WeightAverages, average_name
from drift_accel.training.sharding import whole_tensors

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
DATA_FILE = "data.safetensors"


def average_file(decay: float) -> str:
    """The file of one average in a checkpoint."""
    return f"{average_name(decay)}.safetensors"


@dataclass(frozen=True)
class Snapshot:
    """The state after `step` optimiser steps: {file name: {tensor name: whole tensor on the host}}, and what JSON holds of it."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    record: dict[str, Any]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for group in self.tensors.values() for tensor in group.values())


class HostBuffers:
    """Host memory for snapshots, taken once and filled again: page-locked where the state lies on a GPU.

    One snapshot at a time may use it: the one before must have been written.
    """

    def __init__(self):
        self._buffers: dict[tuple[str, str], Tensor] = {}

    def copy(self, file: str, name: str, tensor: Tensor) -> Tensor:
        """The tensor's values in this buffer's memory; on a GPU the copy is only enqueued."""
        buffer = self._buffers.get((file, name))
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = self._buffers[file, name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return buffer.copy_(tensor, non_blocking=True)

    def reserve(self, model: nn.Module, averages: WeightAverages) -> None:
        """Take the memory for snapshots of these ahead, and of AdamW's moments: it can last longer than all later copies."""
        for name, parameter in model.named_parameters():
            wanted = [(MODEL_FILE, name), *((OPTIMIZER_FILE, f"{kind}::{name}") for kind in ("exp_avg", "exp_avg_sq"))]
            wanted += [(average_file(decay), name) for decay in averages.averages]
            for key in wanted:
                buffer = torch.empty(parameter.shape, dtype=parameter.dtype, pin_memory=parameter.is_cuda)
                self._buffers[key] = buffer.zero_()  # the system gives memory when it is written to


def take_snapshot(
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    averages: WeightAverages,
    *,
    data_state: Mapping[str, Tensor],
    record: Mapping[str, Any],
    buffers: HostBuffers | None,
) -> Snapshot | None:
    """Copy the state into `buffers`. None takes part in gathering a state that is split over processes, and copies nothing.

    `data_state` is what the samplers need to go on, empty where their draws are functions of the step. Every process of a run
    whose state is split must call this. Returns when the copy is done: the state may change again.
    """
    groups = {MODEL_FILE: model.state_dict(), OPTIMIZER_FILE: optimizer_tensors(model, optimizer)}
    groups.update({average_file(decay): average for decay, average in averages.averages.items()})
    if data_state:
        groups[DATA_FILE] = data_state
    copies: dict[str, dict[str, Tensor]] = {}
    on_gpu = False
    for file, group in groups.items():
        copies[file] = {}
        for name, tensor in whole_tensors(group):
            on_gpu |= tensor.is_cuda
            if buffers is not None:
                copies[file][name] = buffers.copy(file, name, tensor)
    if on_gpu:
        torch.cuda.current_stream().synchronize()
    if buffers is None:
        return None
    return Snapshot(step, copies, {**record, "step": step, "decays": list(averages.averages)})


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by parameter name: {"exp_avg::blocks.0.weight": tensor, ...}."""
    return {
        f"{kind}::{name}": tensor
        for name, parameter in model.named_parameters()
        for kind, tensor in optimizer.state.get(parameter, {}).items()
    }
