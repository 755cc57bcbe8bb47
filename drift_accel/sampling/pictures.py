"""Pictures by index: what is saved, measured and compared, wherever it comes from; here those that a generator makes."""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from drift_accel.foundation.provenance import package_versions
from drift_accel.sampling.quantization import count_non_finite, require_quantizer, to_uint8
from drift_accel.sampling.sampler import CHUNK, generate
from drift_accel.sampling.trained import TrainedGenerator
from drift_accel.sampling.vae_choice import LatentDecoder

# Versions that samples depend on to the last bit.
RECORDED_PACKAGES = ("torch", "diffusers", "numpy")


class PictureBatch(NamedTuple):
    """Pictures of consecutive indices."""

    pixels: np.ndarray | None
    """uint8 [n, H, W, 1 or 3]; None where there are only latents and no VAE."""
    model_space: np.ndarray | None
    """float32 [n, C, h, w] as the generator makes and the encoder takes them; None where only pixels are known."""
    non_finite: int
    """How many of them held a NaN or an infinite value before they became pixels."""


class Pictures(Protocol):
    """A set of pictures."""

    labels: np.ndarray | None
    """int64 [len], or None where classes are unknown."""

    def __len__(self) -> int:
        """The number of pictures."""

    def batch(self, items: range) -> PictureBatch:
        """The pictures `items`; picture i is the same to the last bit however the indices are cut into calls."""

    def identity(self) -> dict[str, Any]:
        """What decides the pictures, in plain values: equal identities mean equal pictures."""


class GeneratedPictures:
    """Samples 0..N-1 of a generator: sample i depends on (seed, i), its label and the guidance alone.

    labels [N]; guidance_scale at least 1; `decoder` for latents (None leaves them without pixels); `quantizer` one of
    `QUANTIZERS`. batch_size: samples decoded and quantised at once, which bounds memory and does not change them.
    Raises ValueError for labels or values out of range.
    """

    def __init__(
        self,
        trained: TrainedGenerator,
        labels: Sequence[int],
        *,
        guidance_scale: float,
        seed: int,
        decoder: LatentDecoder | None = None,
        quantizer: str = "round",
        batch_size: int = CHUNK,
        device: torch.device | str = "cpu",
    ):
        require_quantizer(quantizer)
        self.labels = np.asarray(labels, dtype=np.int64)
        classes = trained.generator.config.num_classes
        if self.labels.ndim != 1 or not len(self.labels):
            raise ValueError(f"give at least one label, one a sample; got an array of shape {list(self.labels.shape)}")
        if self.labels.min() < 0 or self.labels.max() >= classes:
            raise ValueError(
                f"labels reach from {self.labels.min()} to {self.labels.max()}: the generator has 0 to {classes - 1}"
            )
        if not 1 <= guidance_scale < float("inf"):
            raise ValueError(f"guidance_scale is {guidance_scale}: guidance starts at 1 (no guidance)")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: give at least 1")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed is {seed}: give an integer from 0 to 2^64 - 1")
        self.trained, self.decoder, self.quantizer = trained, decoder, quantizer
        self.guidance_scale, self.seed, self.batch_size = float(guidance_scale), seed, batch_size
        self._generator = trained.generator.to(device)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, items: range) -> PictureBatch:
        """The samples `items`."""
        pixels, model_space, non_finite = [], [], 0
        for start in range(items.start, items.stop, self.batch_size):
            samples, images = self._compute(range(start, min(start + self.batch_size, items.stop)))
            model_space.append(samples.cpu().numpy())
            non_finite += count_non_finite(samples if images is None else images)
            if images is not None:
                pixels.append(to_uint8(images, self.quantizer))
        return PictureBatch(np.concatenate(pixels) if pixels else None, np.concatenate(model_space), non_finite)

    def images(self, items: range) -> Tensor:
        """The samples `items` before they are quantised, float32 [n, C, H, W] on the CPU; latents where there is no decoder."""
        parts = []
        for start in range(items.start, items.stop, self.batch_size):
            samples, images = self._compute(range(start, min(start + self.batch_size, items.stop)))
            parts.append((samples if images is None else images).cpu())
        return torch.cat(parts)

    def _compute(self, items: range) -> tuple[Tensor, Tensor | None]:
        """The generator's output for `items`, and the images it stands for: None for latents without a decoder."""
        samples = generate(
            self._generator,
            self.labels[items.start : items.stop],
            guidance_scale=self.guidance_scale,
            seed=self.seed,
            first_index=items.start,
        )
        if self.decoder is not None:
            return samples, self.decoder(samples, items.start)
        return samples, None if self.trained.makes_latents else samples

    def identity(self) -> dict[str, Any]:
        """Weights, labels, guidance, seed, VAE, quantiser, versions."""
        return {
            "source": "generated",
            "weights_sha256": self.trained.origin["weights_sha256"],
            "num_pictures": len(self),
            "labels_sha256": hashlib.sha256(self.labels.tobytes()).hexdigest(),
            "guidance_scale": self.guidance_scale,
            "seed": self.seed,
            "vae": None if self.decoder is None else self.decoder.identity(),
            "quantizer": self.quantizer,
            "device": next(self._generator.parameters()).device.type,
            "versions": package_versions(RECORDED_PACKAGES),
        }


def sample_labels(chosen: Sequence[int], num_samples: int) -> np.ndarray:
    """The labels int64 [num_samples] of a balanced set: sample i has class chosen[i % len(chosen)], however many there are.

    Raises ValueError for no class or fewer than one sample.
    """
    if not len(chosen) or num_samples < 1:
        raise ValueError(f"need at least one class and one sample, got {len(chosen)} and {num_samples}")
    return np.asarray(chosen, dtype=np.int64)[np.arange(num_samples) % len(chosen)]
