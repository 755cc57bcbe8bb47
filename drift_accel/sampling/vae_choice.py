"""The VAE that belongs to a generator's latents: found, checked against what the training recorded, placed."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from drift_accel.data.cache_format import same_scale
from drift_accel.data.row_encoders import VAE_DTYPES, weights_hash
from drift_accel.models.autoencoder import Scale, load_vae, vae_scaling
from drift_accel.models.bundled import BUNDLED_VAES
from drift_accel.sampling.decoding import decode_latents
from drift_accel.sampling.trained import TrainedGenerator, align_memory


@dataclass(frozen=True, kw_only=True)
class LatentDecoder:
    """A VAE with the scaling of the latents that it decodes."""

    vae: nn.Module
    name: str
    weights_sha256: str
    dtype: str
    batch: int
    """Latents decoded at once; part of the last bits of an image."""
    scaling: tuple[Scale, Scale] | None
    """(scale, shift) of the training's cache where they are not the VAE's own; None: the VAE's."""

    def __call__(self, latents: Tensor, first_index: int = 0) -> Tensor:
        """Images [N, 3, H, W] in [-1, 1] of latents [N, C, h, w] of the samples from `first_index` on."""
        return decode_latents(self.vae, latents, self.batch, first_index=first_index, scaling=self.scaling)

    def identity(self) -> dict[str, Any]:
        """What images depend on, for records."""
        return {
            "name": self.name,
            "weights_sha256": self.weights_sha256,
            "dtype": self.dtype,
            "batch": self.batch,
            "scaling": self.scaling,
        }


def open_decoder(
    trained: TrainedGenerator,
    name: str | None = None,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    batch: int = 8,
    device: torch.device | str = "cpu",
) -> LatentDecoder | None:
    """The decoder of a generator of latents; None for one of pixels.

    `name` is "digits" (bundled), a folder or a hub id; None takes the VAE that the export names, where it is at hand. `dtype`
    is float32, bfloat16 or float16. Raises ValueError where no VAE is known, for another VAE than the latents were made with
    (by its weights), for a VAE that a generator of pixels does not need, and for an unknown dtype or a batch below 1.
    """
    if dtype not in VAE_DTYPES:
        raise ValueError(f"--vae_dtype is {dtype!r}: choose one of {', '.join(VAE_DTYPES)}")
    if batch < 1:
        raise ValueError(f"--vae_batch is {batch}: give at least 1")
    if not trained.makes_latents:
        if name is not None:
            raise ValueError(f"{trained.origin['path']} makes pixels, not latents: leave --vae out")
        return None
    recorded = trained.data.get("vae") or {}
    name = name or _at_hand(recorded)
    if name is None:
        channels = trained.generator.config.in_channels
        known = f" (they were made with {recorded['name']})" if recorded.get("name") else ""
        raise ValueError(f"{trained.origin['path']} makes latents of {channels} channels: name their VAE with --vae{known}")
    vae = load_vae(name, revision=revision)
    digest = weights_hash(vae)  # of the weights as they are, before they are rounded to another type
    if recorded.get("weights_sha256") not in (None, digest):
        raise ValueError(
            f"--vae {name} is not the VAE that the training latents were made with ({recorded.get('name')}): its weights differ; "
            "give that one"
        )
    channels = trained.generator.config.in_channels
    if vae.config.latent_channels != channels:
        raise ValueError(f"--vae {name} has {vae.config.latent_channels} latent channels, the generator makes {channels}")
    if dtype != "float32":
        vae = vae.to(VAE_DTYPES[dtype])
    align_memory(vae)
    scaling = _other_scaling(trained.data, vae.config)
    return LatentDecoder(
        vae=vae.to(device), name=name, weights_sha256=digest, dtype=dtype, batch=batch, scaling=scaling
    )  # fmt: skip


def _at_hand(recorded: Mapping[str, Any]) -> str | None:
    name = recorded.get("name")
    return name if name in BUNDLED_VAES or (name and Path(name).is_dir()) else None


def _other_scaling(data: Mapping[str, Any], config: Any) -> tuple[Scale, Scale] | None:
    scale, shift = data.get("scale"), data.get("shift")
    if scale is None or shift is None:
        return None
    own = vae_scaling(config)
    return None if same_scale(own[0], scale) and same_scale(own[1], shift) else (scale, shift)
