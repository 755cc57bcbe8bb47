"""The VAE between images and the generator's latents: bundled, a local folder, or a hub id."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from drift_accel.models.bundled import BUNDLED_VAES, bundled_vae_path

Scale = float | Sequence[float]


def vae_location(name: str) -> str:
    """The folder or hub id that `name` stands for: a bundled VAE's name is replaced by its folder."""
    return str(bundled_vae_path(name)) if name in BUNDLED_VAES else name


def load_vae(name: str, *, revision: str | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load a diffusers AutoencoderKL in evaluation mode, frozen, from safetensors alone.

    `name` is "digits" (bundled), a folder that save_pretrained wrote, or a hub id. Raises FileNotFoundError for a path that
    does not exist, OSError for a hub id that is neither cached nor reachable.
    """
    from diffusers import AutoencoderKL

    location = vae_location(name)
    if (location.startswith((".", "/", "~")) or Path(location).suffix) and not Path(location).is_dir():
        raise FileNotFoundError(f"VAE {location} is no folder: give a folder with config.json, a hub id, or {BUNDLED_VAES[0]!r}")
    vae = AutoencoderKL.from_pretrained(location, revision=revision, torch_dtype=dtype, use_safetensors=True)
    return vae.eval().requires_grad_(False)


def vae_scaling(config: Any) -> tuple[Scale, Scale]:
    """(scale, shift) of a diffusers VAE configuration: model space = (latent - shift) * scale; one a channel where it says so."""
    factor = getattr(config, "scaling_factor", None) or 1.0
    mean, deviation = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None and deviation is not None:
        return tuple(factor / value for value in deviation), tuple(map(float, mean))
    return float(factor), float(getattr(config, "shift_factor", None) or 0.0)
