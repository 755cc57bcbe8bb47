"""The transformer's parts: root-mean-square norms, rotary attention, SwiGLU, the adaLN-zero block, the final layer.

Shapes: B samples, T tokens (context tokens first), D width, H heads, E = D / H width of a head, c width of the
condition. Linear and embedding weights are set by the model that holds these parts (see initialization.py).
Sources: arXiv 2602.04770 (appendix: generator) and the release's configuration; DiT (arXiv 2212.09748) for adaLN-zero;
RoFormer (arXiv 2104.09864) for the rotation; arXiv 2002.05202 for SwiGLU.
"""

import contextlib
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .initialization import Linear

NORM_EPS = 1e-6
ROTARY_BASE = 1e4


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float32, or `dtype` itself where it is wider."""
    return torch.promote_types(dtype, torch.float32)


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Return a context in which autocast leaves operations on the device of `tensor` alone."""
    device_type = tensor.device.type
    if not torch.amp.is_autocast_available(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


class WideLinear(Linear):
    """Linear layer computed in float32 (float64 for float64 weights), under autocast too."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features] in the wide dtype."""
        dtype = wide_dtype(self.weight.dtype)
        with without_autocast(x):
            return F.linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


class RMSNorm(nn.Module):
    """Division by the root mean square of the last dimension, then a learned gain (arXiv 1910.07467)."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., size]; computed in float32 or wider, returned in the dtype of `x`."""
        dtype = wide_dtype(x.dtype)
        normalised = F.rms_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), NORM_EPS)
        return normalised.to(x.dtype)


def rotary_table(num_tokens: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of position * 1e4^(-2i / E), i = 0 .. E/2 - 1, each [T, E/2] (RoFormer, eq. 15)."""
    exponents = torch.arange(0, head_dim, 2, dtype=dtype, device=device) / head_dim  # [E/2]
    positions = torch.arange(num_tokens, dtype=dtype, device=device)  # [T]
    angles = positions[:, None] * ROTARY_BASE**-exponents  # [T, E/2]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate the pairs (first half, second half) of x [..., T, E] by tables [T, E/2] (RoFormer, eq. 34)."""
    first, second = x.to(cosines.dtype).chunk(2, dim=-1)  # [..., T, E/2] each
    rotated = torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1)  # [..., T, E]
    return rotated.to(x.dtype)


class RotaryAttention(nn.Module):
    """Self-attention over all tokens with normalised queries and keys and rotary positions."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.qkv = Linear(hidden_size, 3 * hidden_size)
        self.query_norm = RMSNorm(self.head_dim)
        self.key_norm = RMSNorm(self.head_dim)
        self.output = Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """Attend within each sample: x [B, T, D], tables [T, E/2] -> [B, T, D]."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))  # [B, T, 3, H, E]
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, T, E] each
        query = rotate(self.query_norm(query), cosines, sines)  # [B, H, T, E]
        key = rotate(self.key_norm(key), cosines, sines)  # [B, H, T, E]
        mixed = F.scaled_dot_product_attention(query, key, value)  # [B, H, T, E], scale E^-0.5
        return self.output(mixed.transpose(1, 2).flatten(2))  # [B, T, D]


class SwiGLU(nn.Module):
    """Gated feed-forward layer down(SiLU(gate x) * up x) (arXiv 2002.05202, eq. 6, with biases)."""

    def __init__(self, hidden_size: int, mlp_ratio: float):
        super().__init__()
        # Three matrices in place of two: 2/3 of the width keeps the parameter count.
        inner_size = math.ceil(int(mlp_ratio * hidden_size * 2 / 3) / 32) * 32
        self.gate = Linear(hidden_size, inner_size)
        self.up = Linear(hidden_size, inner_size)
        self.down = Linear(inner_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map each token: [B, T, D] -> [B, T, D]."""
        return self.down(F.silu(self.gate(x)) * self.up(x))  # [B, T, D]


class Modulation(WideLinear):
    """adaLN-zero's map from the condition to shifts, scales and gates, zero at the start (DiT, section 3.2)."""

    def __init__(self, condition_size: int, hidden_size: int, num_chunks: int):
        super().__init__(condition_size, num_chunks * hidden_size)
        self.num_chunks = num_chunks

    def forward(self, condition: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return `num_chunks` tensors [B, 1, D] in `dtype` from condition [B, c]."""
        activated = F.silu(condition.to(wide_dtype(condition.dtype)))  # [B, c]
        return super().forward(activated).to(dtype)[:, None].chunk(self.num_chunks, dim=-1)  # [B, 1, D] each


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x (1 + scale) + shift for x [B, T, D], shift and scale [B, 1, D]."""
    return x * (1 + scale) + shift


class TransformerBlock(nn.Module):
    """adaLN-zero block: rotary attention, then SwiGLU, each modulated and gated by the condition (DiT, figure 3)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, condition_size: int):
        super().__init__()
        self.modulation = Modulation(condition_size, hidden_size, num_chunks=6)
        self.attention_norm = RMSNorm(hidden_size)
        self.attention = RotaryAttention(hidden_size, num_heads)
        self.mlp_norm = RMSNorm(hidden_size)
        self.mlp = SwiGLU(hidden_size, mlp_ratio)

    def forward(self, x: Tensor, condition: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """Map tokens x [B, T, D] with condition [B, c] and rotary tables [T, E/2] to [B, T, D]."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(condition, x.dtype)  # [B, 1, D] each
        attended = self.attention(modulate(self.attention_norm(x), shift_a, scale_a), cosines, sines)  # [B, T, D]
        x = x + gate_a * attended  # [B, T, D]
        return x + gate_m * self.mlp(modulate(self.mlp_norm(x), shift_m, scale_m))  # [B, T, D]


class FinalLayer(nn.Module):
    """Modulated norm and zero-initialised projection of tokens to patches, in float32 or wider under autocast too."""

    def __init__(self, hidden_size: int, condition_size: int, patch_channels: int):
        super().__init__()
        self.norm = RMSNorm(hidden_size)
        self.modulation = Modulation(condition_size, hidden_size, num_chunks=2)
        # Its output is the image itself: rounding it to bfloat16 would show in the drift's raw-image feature.
        self.output = WideLinear(hidden_size, patch_channels)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map image tokens x [B, N, D] with condition [B, c] to patches [B, N, patch_channels]."""
        shift, scale = self.modulation(condition, x.dtype)  # [B, 1, D] each
        return self.output(modulate(self.norm(x), shift, scale))  # [B, N, patch_channels]


def sincos_positions_2d(grid_size: int, hidden_size: int) -> Tensor:
    """Return the 2-D sine-cosine positions of a square grid, row-major, [grid_size^2, D] float32.

    The first half of D codes the row, the second the column; each holds sines, then cosines, of
    index * 1e4^(-i / (D/4)), i = 0 .. D/4 - 1 (arXiv 1706.03762, section 3.5, once for each axis).
    """
    quarter = hidden_size // 4
    frequencies = 1e4 ** -(torch.arange(quarter, dtype=torch.float64, device="cpu") / quarter)  # [D/4]
    angles = torch.arange(grid_size, dtype=torch.float64, device="cpu")[:, None] * frequencies  # [grid, D/4]
    axis = torch.cat([angles.sin(), angles.cos()], dim=-1)  # [grid, D/2]
    rows = axis[:, None].expand(-1, grid_size, -1)  # [grid, grid, D/2]
    columns = axis[None].expand(grid_size, -1, -1)  # [grid, grid, D/2]
    return torch.cat([rows, columns], dim=-1).flatten(0, 1).float()  # [grid^2, D]
