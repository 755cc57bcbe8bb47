"""Filling hidden cells without a network: what a masked autoencoder has to beat.

Shapes: B images, C channels, h x w sides of the encoder's grid, m side of a mask patch.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def fill_hidden(grid: Tensor, filling: Tensor, mask: Tensor) -> Tensor:
    """The visible cells of `grid` [B, C, h, w] and, where `mask` [B, 1, h, w] is 1, those of `filling` (broadcast)."""
    return torch.where(mask.bool(), filling.to(grid.dtype), grid)


def fill_bilinear(grid: Tensor, mask: Tensor, mask_patch_size: int) -> Tensor:
    """Fill hidden cells from their visible neighbours, weighted by a tent that ends at m + 1 cells: [B, C, h, w].

    Across one hidden patch between two visible ones that is bilinear interpolation. Where the tent holds nothing visible it is
    made twice as wide, until it does; an image without a visible cell becomes zero.

    Args:
        grid: [B, C, h, w].
        mask: [B, 1, h, w], 1 = hidden.
        mask_patch_size: m.
    """
    visible = 1 - mask.to(grid.dtype)  # [B, 1, h, w]
    filled, known = grid * visible, visible
    radius, side = mask_patch_size + 1, max(grid.shape[2:])
    while radius <= 4 * side and not bool(known.all()):
        tent = 1 - torch.arange(1 - radius, radius, dtype=grid.dtype, device=grid.device).abs() / radius  # [2r - 1]
        kernel = (tent[:, None] * tent[None])[None, None]  # [1, 1, 2r - 1, 2r - 1]
        values = F.conv2d((grid * visible).flatten(0, 1)[:, None], kernel, padding=radius - 1).reshape(grid.shape)
        weights = F.conv2d(visible, kernel, padding=radius - 1)  # [B, 1, h, w]
        new = (known == 0) & (weights > 0)
        filled = torch.where(new, values / weights.clamp_min(torch.finfo(grid.dtype).tiny), filled)
        known = torch.where(new, torch.ones_like(known), known)
        radius *= 2
    return filled


def hidden_error(prediction: Tensor, grid: Tensor, mask: Tensor) -> Tensor:
    """Squared error summed over hidden cells and channels, over the number of hidden cells of the whole batch: ()."""
    hidden = mask.to(grid.dtype)
    return ((prediction - grid).square() * hidden).sum() / hidden.sum().clamp_min(1)
