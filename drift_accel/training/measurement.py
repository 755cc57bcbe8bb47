"""What a step costs: operations by part, memory at its peak, and what a device could do."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from drift_accel.training.step_parts import PartMeter, metered_parts, step_part

# Dense matrix products in TFLOP/s as the makers state them, without sparsity: (bfloat16, TF32, float32). By part of the device's
# name; the first that fits counts. Without a TF32 unit float32's number stands for it.
PEAK_TFLOPS = {
    "H200 NVL": (835.5, 417.5, 60.0), "H200": (989.0, 494.5, 67.0), "H100 PCIe": (756.0, 378.0, 51.0),
    "H100 NVL": (835.0, 417.5, 60.0), "H100": (989.0, 494.5, 67.0), "H800": (989.0, 494.5, 67.0),
    "GB200": (2500.0, 1250.0, 80.0), "B200": (2250.0, 1125.0, 75.0), "A100": (312.0, 156.0, 19.5), "A800": (312.0, 156.0, 19.5),
    "L40S": (362.0, 183.0, 91.6), "RTX 4090": (165.2, 82.6, 82.6), "A10G": (70.0, 35.0, 31.2), "V100": (125.0, 15.7, 15.7),
}  # fmt: skip


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Operations a second that `device` reaches at best in a run's precision; None where that is not known.

    In float32 convolutions use TF32 unless torch was told otherwise, and then so does the peak: no share is above 1.
    """
    if device.type != "cuda" or precision == "float64":
        return None
    name = torch.cuda.get_device_name(device)
    switches = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    rounds = any(switch.fp32_precision == "tf32" for switch in switches)
    for part, (half, rounded, single) in PEAK_TFLOPS.items():
        if part in name:
            return 1e12 * (half if precision == "bfloat16" else rounded if rounds else single)
    return None


def count_operations(task, batch) -> dict[str, float]:
    """Floating-point operations by part that a step of `batch` (on the device) needs at least, forward and backward.

    A multiply-add counts 2. Counted on one label and multiplied, without passes for statistics and without recomputation, so
    that utilisation compares methods by the same work. Networks must not be compiled, and the drift's fused op is not counted.
    The weights' gradients are cleared. For a `loop.TrainingTask`.
    """
    num_labels = batch.labels.shape[0]
    one = batch.labels_from(0, 1)
    recomputes = getattr(task.model, "is_gradient_checkpointing", False)
    if recomputes:
        task.model.disable_gradient_checkpointing()

    def forward_and_backward() -> None:
        loss, _ = task.compute(task.model, one, 0, diagnostics=False)
        with step_part("backward"):
            loss.backward()

    with decoders_keep_activations(getattr(task, "specs", ())):
        _, amounts = operations_of(forward_and_backward)
    if recomputes:
        task.model.enable_gradient_checkpointing()
    task.model.zero_grad(set_to_none=True)
    return {name: amount * num_labels for name, amount in amounts.items()}


@contextmanager
def decoders_keep_activations(specs) -> Iterator[None]:
    """Inside the block decoders before encoders decode nothing twice, so that the least work is counted."""
    decoders = [spec.decoder for spec in specs if getattr(spec.decoder, "checkpointing", False)]
    for decoder in decoders:
        decoder.checkpointing = False
    try:
        yield
    finally:
        for decoder in decoders:
            decoder.checkpointing = True


def operations_of(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What `work` returns, and the floating-point operations of its parts; those outside of any part are not counted."""
    counter = FlopCounterMode(display=False)
    with counter, metered_parts(PartMeter(counter.get_total_flops)) as meter:
        result = work()
    return result, {name: float(amount) for name, amount in meter.read().items()}


def peak_allocation(work: Callable[[], object], device: torch.device) -> int:
    """Bytes that `work` has allocated on the device at the same time, at most, above what there was before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with LiveTensors() as live:
        work()
    return live.peak


class LiveTensors(TorchDispatchMode):
    """Bytes of the storages that operations made and that still live. Processors keep no such count themselves."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = 0, 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        before = {id(t.untyped_storage()) for t in arguments if isinstance(t, Tensor)}
        result = function(*arguments, **(options or {}))
        tree_map_only(Tensor, lambda tensor: self._see(tensor, before), result)
        return result

    def _see(self, tensor: Tensor, before: set[int]) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known or key in before:
            return
        self._known[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._known.pop(key, 0)
