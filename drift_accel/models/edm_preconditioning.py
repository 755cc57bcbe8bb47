"""The preconditioning of EDM: what a network sees of a noisy image, and how its output becomes the denoised image.

D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), so that input and target of the network F have unit variance at every sigma.
Shapes: B images. Source: Karras et al. 2022, arXiv 2206.00364, section 5 and table 1 ("Ours").
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .transformer import wide_dtype


@dataclass(frozen=True)
class Preconditioning:
    """The four factors of a noise level, each [B]."""

    skip: Tensor
    """c_skip = sigma_data^2 / (sigma^2 + sigma_data^2): the part of the noisy image that is kept."""
    output: Tensor
    """c_out = sigma sigma_data / sqrt(sigma^2 + sigma_data^2): the part of the network's output that is added."""
    input: Tensor
    """c_in = 1 / sqrt(sigma^2 + sigma_data^2): what the noisy image is multiplied with for the network."""
    noise: Tensor
    """c_noise = ln(sigma) / 4: how the network is told the noise level."""


def preconditioning(sigma: Tensor, sigma_data: float) -> Preconditioning:
    """The factors of noise levels [B], which are deviations in the units of the images, whose own is `sigma_data`."""
    variance = sigma.square() + sigma_data**2  # [B]
    return Preconditioning(
        skip=sigma_data**2 / variance,
        output=sigma * sigma_data / variance.sqrt(),
        input=variance.rsqrt(),
        noise=sigma.log() / 4,
    )


def noise_levels(sigma: Tensor | float, like: Tensor, lowest: float, highest: float) -> Tensor:
    """One noise level for each image of `like` [B, ...], in float32 or wider on its device: [B] from a number, () or [B].

    Looks at the values, so on a GPU it waits for them.

    Raises:
        ValueError: another shape, or a level that is not a number from `lowest` to `highest`.
    """
    dtype = wide_dtype(like.dtype)
    levels = torch.as_tensor(sigma, dtype=dtype, device=like.device)
    if levels.ndim > 1 or (levels.ndim == 1 and len(levels) != len(like)):
        raise ValueError(f"sigma has shape {list(levels.shape)}; wanted one number, or one for each of the {len(like)} images")
    # In the levels' own type, or a limit that float32 rounds up would refuse itself.
    low, high = (torch.tensor(limit, dtype=dtype, device=like.device) for limit in (lowest, highest))
    if not levels.is_meta:
        wrong = levels[~((levels >= low) & (levels <= high))]
        if wrong.numel():
            raise ValueError(
                f"sigma is {wrong.flatten()[0].item():g}; give noise levels from {lowest:g} to {highest:g} (sigma_min and "
                "sigma_max), in the units of images in [-1, 1]: the network is told ln(sigma) / 4, which 0 does not have"
            )
    return levels.expand(len(like))
