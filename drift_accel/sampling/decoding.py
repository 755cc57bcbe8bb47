"""Latents of the model space back to images, by the VAE's own scale and shift."""

import torch
from torch import Tensor, nn


def decode_latents(vae: nn.Module, latents: Tensor, chunk: int = 1) -> Tensor:
    """Return the images [N, 3, H, W] of latents [N, C, h, w], float32, nominally in [-1, 1].

    `vae` is a diffusers autoencoder on the latents' device. Its configuration, which was applied to make model space, is
    undone: latents / scaling_factor + shift_factor, or * latents_std / scaling_factor + latents_mean where it has these
    per channel. Batches of `chunk` rows, the last one padded, so that an image does not depend on the others. Raises
    ValueError for another number of channels than the VAE has, or a chunk below 1.
    """
    channels = getattr(vae.config, "latent_channels", None)
    if latents.ndim != 4 or (channels is not None and latents.shape[1] != channels):
        raise ValueError(
            f"latents must be [N, {channels}, h, w] for this VAE, got {list(latents.shape)}; "
            "use the VAE that the training latents were made with"
        )
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    dtype = next(vae.parameters()).dtype
    images = []
    with torch.inference_mode():
        for part in latents.split(chunk):
            num_rows = part.shape[0]
            part = torch.cat([part, part.new_zeros(chunk - num_rows, *part.shape[1:])])
            part = _undo_scaling(vae.config, part.float()).to(dtype)
            images.append(vae.decode(part, return_dict=False)[0][:num_rows].float())
        decoded = torch.cat(images) if images else latents.new_zeros((0, 3, *latents.shape[2:]))
    # A tensor made in inference mode could not take part in a later computation with gradients.
    return decoded.clone()


def _undo_scaling(config, latents: Tensor) -> Tensor:
    mean, deviation = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    scale = getattr(config, "scaling_factor", None) or 1.0
    if mean is not None and deviation is not None:
        mean = torch.tensor(mean, device=latents.device).view(1, -1, 1, 1)
        deviation = torch.tensor(deviation, device=latents.device).view(1, -1, 1, 1)
        return latents * deviation / scale + mean
    return latents / scale + (getattr(config, "shift_factor", None) or 0.0)
