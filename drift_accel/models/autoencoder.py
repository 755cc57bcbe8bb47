"""The VAE between images and the generator's latents: bundled, a local folder, or a hub id."""

from pathlib import Path

import torch
from torch import nn

from drift_accel.models.bundled import BUNDLED_VAES, bundled_vae_path


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
