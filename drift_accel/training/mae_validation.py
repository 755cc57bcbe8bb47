"""Masked autoencoders on held-out rows: reconstruction and accuracy at the mask ratio and with nothing hidden.

Every row's masks, and posterior draws where the source has any, are functions of (seed, row); rows pass in fixed chunks that
processes take in turn, and the numbers are means over rows in their order: the same for any number of processes.
Shapes: R rows of a chunk, C channels, h x w sides of the encoder's grid.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from drift_accel.data.sources import Source
from drift_accel.foundation.collectives import packed_all_reduce, process_index, world_size
from drift_accel.foundation.random_streams import random_stream, uniform_draws
from drift_accel.models.masked_autoencoder import MaskedAutoencoder
from drift_accel.training.averages import average_name
from drift_accel.training.sharding import is_sharded, model_of, whole_tensors
from drift_accel.training.state import TrainingState

MEASURES = ("reconstruction", "accuracy", "reconstruction_unmasked", "accuracy_unmasked")


@dataclass(frozen=True, kw_only=True)
class MaeValidationConfig:
    """What a run measures on held-out rows. Raises ValueError for values that cannot work."""

    every: int | None = None
    """Steps between validations, a multiple of log.every; the last step has one too. null: none."""
    split: str = "test"
    """Part of the digits that is held out, where data.source is digits: "test" or "train"."""
    path: str | None = None
    """Folder of the held-out rows, where data.source is not digits: a cache, or pictures for data.source images."""
    max_rows: int | None = 5000
    """Measure so many rows alone, spread over the classes, always the same ones; null: all."""
    batch_size: int = 64
    """Rows that pass through the network at once; part of the last bits of the numbers."""

    def __post_init__(self):
        for name in ("every", "max_rows", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"validation.{name} is {value}: give an integer of at least 1{_OR_NULL.get(name, '')}")
        if self.split not in ("train", "test"):
            raise ValueError(f"validation.split is {self.split!r}: choose test or train")


_OR_NULL = {"every": ", or null for no validation", "max_rows": ", or null for all rows"}


def draw_row_masks(model: MaskedAutoencoder, seed: int, rows: np.ndarray, mask_ratio: float) -> Tensor:
    """The masks [R, 1, h, w] that belong to (seed, row), 1 = hidden; patches are hidden independently."""
    config = model.config
    side = config.input_size // config.input_patch_size // config.mask_patch_size
    uniforms = uniform_draws(seed, "validation/mask", 0, np.asarray(rows).tolist(), (1, side, side))
    return model.expand_mask(torch.from_numpy((uniforms < mask_ratio).astype(np.float32)))


def read_held_out(source: Source, rows: np.ndarray, seed: int) -> Tensor:
    """Images [R, C, H, W] of rows, never mirrored; what is drawn when they are read is a function of (seed, row)."""
    rows = np.asarray(rows)
    if not source.is_sampled_at_read:
        return torch.from_numpy(source.rows(rows))
    return torch.from_numpy(source.rows(rows, None, [random_stream(seed, "validation/posterior", int(row)) for row in rows]))


@torch.no_grad()
def measure_rows(model: MaskedAutoencoder, images: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """MEASURES of each row, float64 [R, 4]; the unmasked error is that of all cells, over their number."""
    hidden = model(images, labels, mask)
    shown = model(images, labels, torch.zeros_like(mask))
    grid = model.encoder_input(images)  # [R, C, h, w]
    error = model.reconstruct(images, torch.zeros_like(mask)).double() - grid.double()
    unmasked = error.square().sum(dim=1).mean(dim=(1, 2))  # [R]
    return torch.stack([value.double() for value in (hidden.reconstruction, hidden.accuracy, unmasked, shown.accuracy)], dim=1)


class MaeValidation:
    """Measures a run's raw weights and averages on held-out rows; every process of the run must call it."""

    def __init__(self, source: Source, *, seed: int, mask_ratio: float, batch_size: int, dtype: torch.dtype = torch.float32):
        self.source, self.seed, self.mask_ratio = source, seed, mask_ratio
        self.batch_size, self.dtype = batch_size, dtype

    def __call__(self, state: TrainingState) -> dict[str, float]:
        """{"val/reconstruction_raw": ..., "val/accuracy_unmasked_ema_0.9995": ...}, means over all rows."""
        values = {}
        for name, model in weights_of(state):
            means = self.measure(model, state.accelerator.device, state.accelerator.autocast, state.group)
            values |= {f"val/{measure}_{name}": mean for measure, mean in zip(MEASURES, means, strict=True)}
        return values

    def measure(self, model: MaskedAutoencoder, device: torch.device, autocast, group=None) -> list[float]:
        """The means of MEASURES over all rows, which the processes of `group` share."""
        num_rows = len(self.source)
        found = torch.zeros(num_rows, len(MEASURES), dtype=torch.float64)
        starts = range(0, num_rows, self.batch_size)
        for start in starts[process_index(group) :: world_size(group)]:
            rows = np.arange(start, min(start + self.batch_size, num_rows))
            images = read_held_out(self.source, rows, self.seed).to(device, self.dtype)
            mask = draw_row_masks(model, self.seed, rows, self.mask_ratio).to(device, self.dtype)
            labels = torch.from_numpy(self.source.labels[rows]).to(device)
            with autocast():
                found[rows] = measure_rows(model, images, labels, mask).cpu()
        if group is not None:  # each row is zero on all processes but one, so the sum is exact
            found = packed_all_reduce([found.to(device)], group)[0].cpu()
        return found.mean(dim=0).tolist()


def weights_of(state: TrainingState) -> Iterator[tuple[str, MaskedAutoencoder]]:
    """("raw", model), then ("ema_DECAY", model) of every average; whole models also where the run's own is split."""
    own = dict(state.task.model.named_parameters())
    if any(is_sharded(parameter) for parameter in own.values()):
        yield "raw", model_of(state.averages.bones, dict(whole_tensors(own)))
    else:
        yield "raw", state.task.model
    for decay in state.averages.averages:
        with state.averages.applied_to(state.task.model, decay) as model:
            yield average_name(decay), model
