"""Samples of an EDM or DMD2 UNet in one step: sample i depends on (seed, i) and its label alone."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from drift_accel.foundation.random_streams import normal_draws
from drift_accel.sampling.pictures import PictureBatch
from drift_accel.sampling.quantization import count_non_finite, to_uint8

NOISE_STREAM = "edm/noise"  # part of the meaning of a seed: renaming it changes every sample


class EdmPictures:
    """Samples 0..N-1 of `unet.generate`, labels [N]: a set of `Pictures`.

    batch: samples made at once, padded to this number; part of the last bits of a sample. Raises ValueError for labels out of
    range and a batch below 1.
    """

    def __init__(
        self,
        unet: nn.Module,
        labels: Sequence[int],
        *,
        seed: int,
        weights_sha256: str,
        batch: int = 64,
        device: torch.device | str = "cpu",
    ):
        self.labels, classes = np.asarray(labels, dtype=np.int64), unet.config.num_classes
        if self.labels.ndim != 1 or not len(self.labels):
            raise ValueError("give at least one label, one a sample")
        if self.labels.min() < 0 or self.labels.max() >= classes:
            raise ValueError(f"labels reach from {self.labels.min()} to {self.labels.max()}: the UNet has 0 to {classes - 1}")
        if batch < 1:
            raise ValueError(f"the batch is {batch}: give at least 1")
        self.seed, self.size = seed, batch
        self._weights_sha256, self._unet, self._device = weights_sha256, unet.to(device), torch.device(device)

    def __len__(self) -> int:
        return len(self.labels)

    def noise(self, items: Sequence[int]) -> np.ndarray:
        """The standard normal noise of the samples `items`, float32 [n, C, H, W]."""
        config = self._unet.config
        return normal_draws(self.seed, NOISE_STREAM, 0, list(map(int, items)), (config.in_channels, *2 * (config.input_size,)))

    def batch(self, items: range) -> PictureBatch:
        """The samples `items`, each at row i % batch of a padded batch."""
        parts: list[Tensor] = []
        with torch.inference_mode():
            for start in range(items.start - items.start % self.size, items.stop, self.size):
                asked = range(max(start, items.start), min(start + self.size, items.stop))
                rows = slice(asked.start - start, asked.stop - start)
                noise = torch.from_numpy(self.noise(asked))
                batch = noise.new_zeros((self.size, *noise.shape[1:]))
                labels = torch.zeros(self.size, dtype=torch.int64)
                batch[rows], labels[rows] = noise, torch.from_numpy(self.labels[asked.start : asked.stop])
                images = self._unet.generate(batch.to(self._device), labels.to(self._device))
                parts.append(images[rows].float().cpu())
        images = torch.cat(parts)
        return PictureBatch(to_uint8(images), images.numpy(), count_non_finite(images))

    def identity(self) -> dict[str, Any]:
        """Weights, labels, seed, batch."""
        return {
            "source": "edm",
            "weights_sha256": self._weights_sha256,
            "num_pictures": len(self),
            "labels_sha256": hashlib.sha256(self.labels.tobytes()).hexdigest(),
            "seed": self.seed,
            "batch": self.size,
            "device": self._device.type,
        }
