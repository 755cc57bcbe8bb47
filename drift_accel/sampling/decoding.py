"""Latents of the model space back to images, by the VAE's own scale and shift, or by those that the latents were made with."""

import torch
from torch import Tensor, nn

from drift_accel.models.autoencoder import Scale, vae_scaling


def decode_latents(
    vae: nn.Module,
    latents: Tensor,
    chunk: int = 1,
    *,
    first_index: int = 0,
    scaling: tuple[Scale, Scale] | None = None,
) -> Tensor:
    """Return the images [N, 3, H, W] of latents [N, C, h, w], float32, nominally in [-1, 1].

    `vae` is a diffusers autoencoder on the latents' device. Its configuration, which was applied to make model space, is
    undone (`vae_scaling`): latents / scale + shift; `scaling` (scale, shift), numbers or one a channel, replaces it.
    Image i runs at row (first_index + i) % chunk of a padded batch of `chunk` rows, so that it does not depend on the others
    or on how the indices are cut into calls. Raises ValueError for another number of channels than the VAE has, a chunk below
    1 and a negative index.
    """
    channels = getattr(vae.config, "latent_channels", None)
    if latents.ndim != 4 or (channels is not None and latents.shape[1] != channels):
        raise ValueError(
            f"latents must be [N, {channels}, h, w] for this VAE, got {list(latents.shape)}; "
            "use the VAE that the training latents were made with"
        )
    if chunk < 1 or first_index < 0:
        raise ValueError(f"chunk must be at least 1, got {chunk}, and first_index at least 0, got {first_index}")
    dtype = next(vae.parameters()).dtype
    images, end = [], first_index + len(latents)
    with torch.inference_mode():
        for start in range(first_index - first_index % chunk, end, chunk):
            asked = range(max(start, first_index), min(start + chunk, end))
            rows = slice(asked.start - start, asked.stop - start)
            batch = latents.new_zeros((chunk, *latents.shape[1:]), dtype=torch.float32)
            batch[rows] = latents[asked.start - first_index : asked.stop - first_index].float()
            batch = _undo_scaling(vae.config, batch, scaling).to(dtype)
            images.append(vae.decode(batch, return_dict=False)[0][rows].float())
        decoded = torch.cat(images) if images else latents.new_zeros((0, 3, *latents.shape[2:]))
    # A tensor made in inference mode could not take part in a later computation with gradients.
    return decoded.clone()


def _undo_scaling(config, latents: Tensor, scaling: tuple[Scale, Scale] | None) -> Tensor:
    def per_channel(values: Scale) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float32, device=latents.device).reshape(1, -1, 1, 1)

    scale, shift = vae_scaling(config) if scaling is None else scaling
    return latents / per_channel(scale) + per_channel(shift)
