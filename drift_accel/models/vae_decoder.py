"""From a generator's latents to pixels with a gradient, so that an encoder of pixels can judge a generator of latents.

Shapes: B latents of C channels on h x w, images [B,3,H,W].
Source: arXiv 2602.04770, encoder study; the VAE is a diffusers AutoencoderKL.
"""

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .autoencoder import Scale, vae_scaling

DECODER_DTYPES = ("float32", "bfloat16")


class VaeDecoder(nn.Module):
    """A frozen VAE's decoder as a function of latents in model space, images unclamped.

    `batch` latents are decoded at once. With `checkpointing` each such slice keeps its latents and images alone and is computed
    again in the backward pass, so that the memory is one slice's, for a second forward pass. Gradients flow to the latents.

    `dtype` "float32" decodes in the type of the VAE's weights, whatever autocast is on around it. "bfloat16" runs convolutions
    and products in bfloat16 under autocast, which keeps weights and, on a GPU, norms in float32. float16 is refused:
    activations of published VAEs exceed its range (`force_upcast` in their configuration) and become NaN.

    `scaling` (scale, shift), numbers or one a channel, undoes the model space: latents / scale + shift; None takes the VAE's
    configuration, and its latents_mean and latents_std where it has them.

    Raises ValueError for another dtype, a batch below 1, and latents of other channels than the VAE has.
    """

    def __init__(
        self,
        vae: nn.Module,
        *,
        batch: int = 8,
        checkpointing: bool = True,
        dtype: str = "float32",
        scaling: tuple[Scale, Scale] | None = None,
    ):
        super().__init__()
        check_decoder_settings(batch, dtype)
        self.vae = vae
        self.batch = batch
        self.checkpointing = checkpointing
        self.dtype = dtype
        scale, shift = vae_scaling(vae.config) if scaling is None else scaling
        self.register_buffer("scale", _per_channel(scale), persistent=False)
        self.register_buffer("shift", _per_channel(shift), persistent=False)
        self.eval().requires_grad_(False)

    def image_shape(self, latent_size: int) -> tuple[int, int, int]:
        """(3, H, W) of what latents of a side become."""
        side = latent_size * 2 ** (len(self.vae.config.block_out_channels) - 1)
        return self.vae.config.out_channels, side, side

    def train(self, mode: bool = True) -> "VaeDecoder":
        """Stay in evaluation mode."""
        return super().train(False)

    def forward(self, latents: Tensor) -> Tensor:
        """Decode latents [B,C,h,w] of model space to images [B,3,H,W], nominally in [-1, 1], float32 or wider."""
        channels = self.vae.config.latent_channels
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise ValueError(
                f"latents have shape {list(latents.shape)}, this VAE decodes [B, {channels}, h, w]: "
                "give the VAE that the generator's latents were made with"
            )
        wide = latents.to(torch.promote_types(latents.dtype, torch.float32))
        latents = (wide / self.scale + self.shift).to(next(self.vae.parameters()).dtype)  # [B,C,h,w]
        return torch.cat([self._decode_slice(part) for part in latents.split(self.batch)])  # [B,3,H,W]

    def _decode_slice(self, latents: Tensor) -> Tensor:
        if not (self.checkpointing and torch.is_grad_enabled() and latents.requires_grad):
            return self._decode(latents)
        # Nothing in the decoder draws random numbers, so their state need not be kept.
        return checkpoint(self._decode, latents, use_reentrant=False, preserve_rng_state=False)

    def _decode(self, latents: Tensor) -> Tensor:
        with self._precision(latents):
            images = self.vae.decode(latents, return_dict=False)[0]
        return images.to(torch.promote_types(latents.dtype, torch.float32))

    def _precision(self, latents: Tensor) -> AbstractContextManager:
        return torch.autocast(latents.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16")


def check_decoder_settings(batch: int, dtype: str) -> None:
    """Raise ValueError for settings that VaeDecoder cannot have."""
    if batch < 1:
        raise ValueError(f"decoder.batch is {batch}: decode at least 1 latent at once")
    if dtype not in DECODER_DTYPES:
        raise ValueError(
            f"decoder.dtype is {dtype!r}: choose one of {', '.join(DECODER_DTYPES)} (float16 overflows in published VAEs)"
        )


def _per_channel(values: Scale) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64).reshape(1, -1, 1, 1).float()
