"""The residual block of ADM's U-Net, with its attention, and the embedding of the noise level.

Shapes: B images, C channels, H x W pixels of a map, N = H W places, E channels of the embedding, h heads of width d.
Sources: Dhariwal and Nichol 2021, arXiv 2105.05233, section 3 (BigGAN's up- and downsampling residual blocks, adaptive group
normalisation, heads of 64 channels); Karras et al. 2022, arXiv 2206.00364, appendix F. Parts are called as in the published
checkpoints (norm0, conv0, affine, ..), so that their tensors need no translation.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .initialization import Conv2d, Linear

MAX_GROUPS = 32
MIN_GROUP_CHANNELS = 4
NORM_EPS = 1e-5
LONGEST_PERIOD = 10_000


def num_groups(channels: int) -> int:
    """Groups of a group norm over so many channels."""
    return min(MAX_GROUPS, channels // MIN_GROUP_CHANNELS)


def group_norm(channels: int) -> nn.GroupNorm:
    """The group norm of all blocks."""
    return nn.GroupNorm(num_groups(channels), channels, eps=NORM_EPS)


def noise_embedding(noise: Tensor, channels: int) -> Tensor:
    """Cosines, then sines, of [B] at channels / 2 frequencies from 1 down to 1 / 10,000 (exclusive): [B, channels]."""
    half = channels // 2
    exponents = torch.arange(half, dtype=noise.dtype, device=noise.device) / half  # [half], 0 <= exponent < 1
    angles = noise[:, None] * LONGEST_PERIOD**-exponents  # [B, half]
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def resampled(x: Tensor, resampling: str | None) -> Tensor:
    """The map [B,C,H,W] at twice ("up": each pixel repeated) or half the size ("down": mean of 2 x 2), or as it is."""
    if resampling == "up":
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    return F.avg_pool2d(x, 2) if resampling == "down" else x


def attention(qkv: Tensor, num_heads: int) -> Tensor:
    """Self-attention over the places of a map: [B,3C,H,W] -> [B,C,H,W], softmax(q k^T / sqrt(d)) v in each head.

    Channel (head, c, j) of `qkv` holds query, key or value (j = 0, 1, 2) number c of its head: the three are interleaved, other
    than in ADM's own checkpoints.
    """
    b, channels, height, width = qkv.shape
    q, k, v = qkv.reshape(b, num_heads, -1, 3, height * width).transpose(2, 4).unbind(3)  # [B,h,N,d] each
    attended = F.scaled_dot_product_attention(q, k, v)  # [B,h,N,d]
    return attended.transpose(2, 3).reshape(b, channels // 3, height, width)


class AdmBlock(nn.Module):
    """Residual block [B,C,H,W] -> [B,C',H',W'] with the embedding as scale and shift, then self-attention where asked for.

    Args:
        in_channels: C.
        out_channels: C'.
        embedding_channels: E.
        num_heads: heads of the attention; 0 is none.
        resampling: "up" or "down" changes the size of the map inside the block and of its shortcut; None keeps it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_channels: int,
        num_heads: int = 0,
        resampling: str | None = None,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.resampling = resampling
        self.norm0 = group_norm(in_channels)
        self.conv0 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.affine = Linear(embedding_channels, 2 * out_channels)
        self.norm1 = group_norm(out_channels)
        self.conv1 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = None if in_channels == out_channels else Conv2d(in_channels, out_channels, 1)
        if num_heads:
            self.norm2 = group_norm(out_channels)
            self.qkv = Conv2d(out_channels, 3 * out_channels, 1)
            self.proj = Conv2d(out_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map [B,C,H,W] and the embedding [B,E] to [B,C',H',W']."""
        shortcut = resampled(x, self.resampling)  # [B,C,H',W']
        x = self.conv0(resampled(F.silu(self.norm0(x)), self.resampling))  # [B,C',H',W']
        scale, shift = self.affine(embedding)[:, :, None, None].chunk(2, dim=1)  # [B,C',1,1] each
        x = self.conv1(F.silu(self.norm1(x) * (1 + scale) + shift))  # [B,C',H',W']
        x = x + (shortcut if self.skip is None else self.skip(shortcut))  # [B,C',H',W']
        if self.num_heads:
            x = x + self.proj(attention(self.qkv(self.norm2(x)), self.num_heads))  # [B,C',H',W']
        return x
