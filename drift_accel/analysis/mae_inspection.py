"""What a masked autoencoder fills in and what its features are, in numbers: held-out rows, hidden cells, simple fillings.

Shapes: B images, C channels, H x W sides, h x w sides of the encoder's grid, p patchify factor.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from drift_accel.drift.features import FeatureConfig, multi_scale_features
from drift_accel.models.inpainting import fill_bilinear, fill_hidden, hidden_error
from drift_accel.models.masked_autoencoder import MaskedAutoencoder

SMALLEST_ERROR = 1e-10
GREY = 0.2  # brightness of hidden cells in pictures, in [-1, 1]: neither black nor white nor the usual mean
PICTURE_RANGE = 2.0  # pictures lie in [-1, 1]
SCALES = ("conv1", "layer1", "layer2", "layer3", "layer4")


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """Images with hidden cells filled three ways, in the space of the images [B, C, H, W]; `mask` [B, 1, h, w], 1 = hidden.

    Visible cells are the images' own in all three.
    """

    images: Tensor
    mask: Tensor
    reconstructed: Tensor
    mean_filled: Tensor
    bilinear: Tensor
    errors: Mapping[str, float]
    """Squared error summed over channels, a hidden cell: of "reconstruction", "mean image", "bilinear"."""


@torch.no_grad()
def reconstruct_rows(model: MaskedAutoencoder, images: Tensor, mask: Tensor, batch_size: int = 64) -> Reconstruction:
    """Fill the hidden cells of images [B, C, H, W] by the model, by the mean of all B images at that cell, and bilinearly."""
    grid = model.encoder_input(images).float()  # [B, p*p*C, h, w]
    mask = mask.to(grid)
    pieces = [model.reconstruct(*piece).float() for piece in zip(images.split(batch_size), mask.split(batch_size), strict=True)]
    fillings = {
        "reconstruction": torch.cat(pieces),
        "mean image": grid.mean(dim=0, keepdim=True).expand_as(grid),
        "bilinear": fill_bilinear(grid, mask, model.mask_patch_size),
    }
    errors = {name: float(hidden_error(filling, grid, mask)) for name, filling in fillings.items()}
    filled = [model.unpatchify(fill_hidden(grid, filling, mask)) for filling in fillings.values()]
    return Reconstruction(
        images=images, mask=mask, reconstructed=filled[0], mean_filled=filled[1], bilinear=filled[2], errors=errors
    )  # fmt: skip


def hidden_pixels(mask: Tensor, height: int, width: int) -> Tensor:
    """The mask [B, 1, h, w] as pixels of a picture, [B, 1, height, width]."""
    return F.interpolate(mask.float(), size=(height, width), mode="nearest")


def paint_hidden(pictures: Tensor, mask: Tensor) -> Tensor:
    """Pictures [B, C, H, W] in [-1, 1] with their hidden cells in grey."""
    return fill_hidden(pictures, torch.full_like(pictures, GREY), hidden_pixels(mask, *pictures.shape[2:]))


def masked_psnr(pictures: Tensor, wanted: Tensor, mask: Tensor) -> float:
    """Peak signal to noise in dB over the hidden pixels of pictures [B, C, H, W] in [-1, 1], clipped, all together."""
    hidden = hidden_pixels(mask, *pictures.shape[2:])
    squared = (pictures.clamp(-1, 1) - wanted.clamp(-1, 1)).square() * hidden
    error = squared.sum().double() / (hidden.sum() * pictures.shape[1]).clamp_min(1)
    return float(10 * torch.log10(PICTURE_RANGE**2 / error.clamp_min(SMALLEST_ERROR)))


def measure_fillings(found: Reconstruction, decode: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """Errors a hidden cell, and PSNR in dB of the hidden pixels; `decode` makes pictures [B, 1 or 3, H, W] of images."""
    wanted = decode(found.images)
    fillings = {"reconstruction": found.reconstructed, "mean image": found.mean_filled, "bilinear": found.bilinear}
    numbers = {f"error: {name}": value for name, value in found.errors.items()}
    return numbers | {f"psnr: {name}": masked_psnr(decode(filled), wanted, found.mask) for name, filled in fillings.items()}


def caption_of(numbers: Mapping[str, float], num_rows: int, mask_ratio: float, decoded: bool) -> str:
    """Two lines for people: errors and PSNR of the masked cells beside the simple fillings."""
    error = {name: numbers[f"error: {name}"] for name in ("reconstruction", "mean image", "bilinear")}
    psnr = {name: numbers[f"psnr: {name}"] for name in error}
    gain = psnr["reconstruction"] - psnr["mean image"]
    what = "decoded pixels" if decoded else "pixels"
    return (
        f"masked cells ({mask_ratio:.0%} of {num_rows} images): squared error {error['reconstruction']:.3f} "
        f"(mean image {error['mean image']:.3f}, bilinear {error['bilinear']:.3f})\n"
        f"PSNR of their {what} {psnr['reconstruction']:.2f} dB (mean image {psnr['mean image']:.2f}: {gain:+.2f} dB, "
        f"bilinear {psnr['bilinear']:.2f})"
    )


@torch.no_grad()
def feature_inventory(model: MaskedAutoencoder, images: Tensor) -> list[dict]:
    """One entry a feature key of unmasked images: key, shape [B, T, S], mean, std (biased) and whether all is finite."""
    entries = []
    for key, value in multi_scale_features(model, images, FeatureConfig()).items():
        value = value.double()
        finite = bool(torch.isfinite(value).all())
        moments = {"mean": float(value.mean()), "std": float(value.std(correction=0))}
        entries.append({"key": key, "shape": list(value.shape), **moments, "finite": finite})
    return entries


def inventory_text(entries: list[dict]) -> str:
    """The inventory as lines of a table."""
    header = f"{'key':<22}{'[B, T, S]':<20}{'mean':>11}{'std':>11}  finite"
    lines = [
        f"{e['key']:<22}{e['shape']!s:<20}{e['mean']:>11.4f}{e['std']:>11.4f}  {'yes' if e['finite'] else 'NO'}" for e in entries
    ]
    return "\n".join([header, *lines])


@torch.no_grad()
def feature_energy(model: MaskedAutoencoder, images: Tensor) -> dict[str, np.ndarray]:
    """The mean square over channels of each scale's map of unmasked images, {name: [B, h', w']}."""
    maps = model.feature_maps(images, SCALES)
    return {name: maps[name].float().square().mean(dim=1).cpu().numpy() for name in SCALES}
