"""From pixels in [-1, 1] to the 256 levels of a picture, by a rule that every result names."""

import numpy as np
import torch
from torch import Tensor

# "round": to the nearest level. "truncate": downwards, as the official release evaluates; on average half a level darker.
QUANTIZERS = ("round", "truncate")


def require_quantizer(name: str) -> None:
    """Raise ValueError unless `name` is a rule of `QUANTIZERS`."""
    if name not in QUANTIZERS:
        raise ValueError(f"the quantiser is {name!r}: choose one of {', '.join(QUANTIZERS)}")


def to_uint8(images: Tensor, quantizer: str = "round") -> np.ndarray:
    """Images [N, C, H, W] in [-1, 1] as uint8 [N, H, W, C]; values outside are clipped.

    x in [0, 1] is (image + 1) / 2; its level is 255 x rounded, or 255 x cut ("truncate"). What is not a number becomes 0
    in [0, 1], black, as in the release (arXiv 2602.04770); count such images with `count_non_finite`.
    Raises ValueError for another shape or an unknown quantiser.
    """
    require_quantizer(quantizer)
    if images.ndim != 4:
        raise ValueError(f"images must be [N, C, H, W], got {list(images.shape)}")
    levels = (images.detach().float() / 2 + 0.5).nan_to_num(nan=0.0, posinf=1.0, neginf=0.0) * 255
    levels = (levels.round() if quantizer == "round" else levels).clamp(0, 255)
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def count_non_finite(images: Tensor) -> int:
    """The number of images [N, ...] that hold a NaN or an infinite value."""
    return int((~torch.isfinite(images)).flatten(1).any(dim=1).sum()) if images.numel() else 0


def to_rgb(pixels: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, 1 or 3] with three channels; grey is repeated. Raises ValueError for other channels."""
    if pixels.ndim != 4 or pixels.shape[3] not in (1, 3):
        raise ValueError(f"pixels must be [N, H, W, 1 or 3], got {list(pixels.shape)}")
    return pixels if pixels.shape[3] == 3 else np.repeat(pixels, 3, axis=3)
