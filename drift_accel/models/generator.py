"""The one-step generator: noise, class label, guidance scale and style indices in, an image or latent out, in one pass.

Shapes: B samples, C channels, H = W sides, p patch, N = (H/p)^2 image tokens, T = context tokens + N, D width,
E width of a head, c width of the condition, K style coordinates.
Sources: arXiv 2602.04770 (section 5 and appendix) and the release's configuration.
"""

import math

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from .checks import check_counts, check_tensor, complete_config
from .initialization import Embedding, Linear, default_generator, draw
from .transformer import (
    FinalLayer,
    Modulation,
    RMSNorm,
    TransformerBlock,
    WideLinear,
    rotary_table,
    sincos_positions_2d,
    wide_dtype,
)

GUIDANCE_FREQUENCIES = 128
GUIDANCE_EMBEDDING_SCALE = 0.02

_BASE = {"hidden_size": 768, "depth": 12, "num_heads": 12}
_LARGE = {"hidden_size": 1024, "depth": 24, "num_heads": 16}
_LATENT = {"patch_size": 2, "input_size": 32, "in_channels": 4}
_PIXEL = {"patch_size": 16, "input_size": 256, "in_channels": 3}
_DIGITS = {"patch_size": 2, "input_size": 8, "in_channels": 1}

# The published models by their names there, and one that a laptop trains on 8x8 digits.
GENERATOR_PRESETS: dict[str, dict] = {
    "tiny": {"hidden_size": 128, "depth": 4, "num_heads": 4, **_DIGITS},
    "B/2": {**_BASE, **_LATENT},
    "L/2": {**_LARGE, **_LATENT},
    "B/16": {**_BASE, **_PIXEL},
    "L/16": {**_LARGE, **_PIXEL},
}


def check_generator_config(**config) -> None:
    """Refuse an impossible configuration of Generator without building it; settings left out have their defaults.

    Raises:
        ValueError: names the setting, its value and what to set instead.
    """
    values = complete_config(Generator, config)
    counts = ["input_size", "in_channels", "patch_size", "hidden_size", "depth", "num_heads", "num_classes"]
    check_counts(values, [*counts, "style_codebook_size", "num_context_tokens"])
    check_counts(values, ["num_style_tokens"], minimum=0)
    if values["condition_size"] is not None:
        check_counts(values, ["condition_size"])
    mlp_ratio = values["mlp_ratio"]
    if not isinstance(mlp_ratio, int | float) or not math.isfinite(mlp_ratio) or mlp_ratio <= 0:
        raise ValueError(f"mlp_ratio is {mlp_ratio!r}; set it to a positive number (the published models use 4.0)")
    hidden_size, num_heads = values["hidden_size"], values["num_heads"]
    if int(mlp_ratio * hidden_size * 2 / 3) < 1:
        raise ValueError(f"mlp_ratio {mlp_ratio} of hidden_size {hidden_size} leaves no feed-forward width; raise one")
    if values["input_size"] % values["patch_size"]:
        raise ValueError(
            f"patch_size {values['patch_size']} does not divide input_size {values['input_size']}; "
            "choose a patch size that divides the side of the image or latent"
        )
    if hidden_size % num_heads:
        raise ValueError(
            f"num_heads {num_heads} does not divide hidden_size {hidden_size}; choose a number of heads that divides the width"
        )
    if hidden_size // num_heads % 2:
        raise ValueError(
            f"hidden_size {hidden_size} over num_heads {num_heads} gives heads of odd width "
            f"{hidden_size // num_heads}; the rotary positions need an even width"
        )
    if hidden_size % 4:
        raise ValueError(f"hidden_size {hidden_size} is no multiple of 4; the two-dimensional sine-cosine positions need one")


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut [B, C, H, W] into row-major patches [B, N, p*p*C], each ordered (row in patch, column in patch, channel)."""
    b, c, h, w = images.shape
    p = patch_size
    patches = images.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1)  # [B, H/p, W/p, p, p, C]
    return patches.reshape(b, (h // p) * (w // p), p * p * c)  # [B, N, p*p*C]


def unpatchify(patches: Tensor, patch_size: int, height: int) -> Tensor:
    """Undo `patchify` for images of `height` rows: [B, N, p*p*C] -> [B, C, H, W]."""
    b, n, size = patches.shape
    p = patch_size
    rows, c = height // p, size // (p * p)
    grid = patches.reshape(b, rows, n // rows, p, p, c).permute(0, 5, 1, 3, 2, 4)  # [B, C, H/p, p, W/p, p]
    return grid.reshape(b, c, height, n // rows * p)  # [B, C, H, W]


class GuidanceEmbedding(nn.Module):
    """Embedding of the guidance scale: sinusoids of the unscaled number, a two-layer network, a norm."""

    def __init__(self, condition_size: int):
        super().__init__()
        self.hidden = WideLinear(2 * GUIDANCE_FREQUENCIES, condition_size)
        self.output = WideLinear(condition_size, condition_size)
        self.norm = RMSNorm(condition_size)

    def forward(self, guidance_scale: Tensor) -> Tensor:
        """Map [B] to [B, c], in float32 or wider."""
        dtype = wide_dtype(self.hidden.weight.dtype)
        steps = torch.arange(GUIDANCE_FREQUENCIES, dtype=dtype, device=guidance_scale.device)
        frequencies = torch.exp(-math.log(1e4) / GUIDANCE_FREQUENCIES * steps)  # [128], 1e4^(-i/128)
        angles = guidance_scale.to(dtype)[:, None] * frequencies  # [B, 128]
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1)  # [B, 256]
        return self.norm(self.output(nn.functional.silu(self.hidden(sinusoids))))  # [B, c]


class Generator(ModelMixin, ConfigMixin):
    """Transformer that maps noise to an image or latent in one pass, conditioned on class, guidance scale and style.

    Its weights are drawn from a generator with seed 0, never from torch's global random state: two models of one
    configuration start equal. `initialize_weights` draws others.

    Args:
        input_size: side of the square image or latent, in pixels of that space.
        in_channels: its channels; the output has as many.
        patch_size: side of a patch; must divide `input_size`.
        hidden_size: width D, a multiple of 4 and of twice `num_heads`.
        depth: number of blocks.
        num_heads: attention heads.
        num_classes: classes; there is no null class.
        style_codebook_size: values that one style index can have.
        num_style_tokens: K, style indices a sample, each with a codebook of its own; 0 means no style input.
        num_context_tokens: tokens made from the condition and put before the image tokens.
        condition_size: width of the condition; None means `hidden_size`.
        mlp_ratio: feed-forward width before the 2/3 of SwiGLU, in units of `hidden_size`.

    Raises:
        ValueError: an impossible configuration, before anything is built.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["TransformerBlock"]
    _repeated_blocks = ["TransformerBlock"]

    @register_to_config
    def __init__(
        self,
        input_size: int = 32,
        in_channels: int = 4,
        patch_size: int = 2,
        hidden_size: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        num_classes: int = 1000,
        style_codebook_size: int = 64,
        num_style_tokens: int = 32,
        num_context_tokens: int = 16,
        condition_size: int | None = None,
        mlp_ratio: float = 4.0,
    ):
        super().__init__()
        check_generator_config(**self.config)
        condition_size = hidden_size if condition_size is None else condition_size
        grid_size = input_size // patch_size
        patch_channels = patch_size * patch_size * in_channels
        self.input_shape = (in_channels, input_size, input_size)
        self.patch_size = patch_size
        self.head_dim = hidden_size // num_heads
        self.num_style_tokens = num_style_tokens
        self.style_codebook_size = style_codebook_size
        self.num_context_tokens = num_context_tokens
        self.gradient_checkpointing = False

        self.class_embedding = Embedding(num_classes, condition_size)
        # One table for all coordinates: coordinate k owns rows k * style_codebook_size onwards.
        if num_style_tokens:
            self.style_embedding = Embedding(num_style_tokens * style_codebook_size, condition_size)
        self.guidance_embedding = GuidanceEmbedding(condition_size)
        self.patch_embedding = Linear(patch_channels, hidden_size)
        self.position_embedding = nn.Parameter(torch.empty(1, grid_size**2, hidden_size))
        self.context_projection = WideLinear(condition_size, hidden_size)
        self.context_embedding = nn.Parameter(torch.empty(1, num_context_tokens, hidden_size))
        self.blocks = nn.ModuleList(TransformerBlock(hidden_size, num_heads, mlp_ratio, condition_size) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, condition_size, patch_channels)
        self.initialize_weights()

    @torch.no_grad()
    def initialize_weights(self, generator: torch.Generator | None = None) -> None:
        """Set the initial weights; None draws from a CPU generator with seed 0.

        Linear weights are Xavier-uniform with zero bias, embeddings normal with deviation 0.02, positions 2-D
        sine-cosine; modulations and the output projection are zero, so that every block starts as the identity and
        the image as zero (DiT, section 3.2).
        """
        generator = default_generator() if generator is None else generator
        for module in self.modules():
            if isinstance(module, Linear):
                if isinstance(module, Modulation) or module is self.final_layer.output:
                    nn.init.zeros_(module.weight)
                else:
                    draw(module.weight, nn.init.xavier_uniform_, generator)
                nn.init.zeros_(module.bias)
            elif isinstance(module, Embedding):
                draw(module.weight, nn.init.normal_, generator, std=0.02)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
        draw(self.context_embedding, nn.init.normal_, generator, std=0.02)
        _, num_positions, hidden_size = self.position_embedding.shape
        self.position_embedding.copy_(sincos_positions_2d(math.isqrt(num_positions), hidden_size)[None])

    def condition(self, labels: Tensor, guidance_scale: Tensor, style_indices: Tensor | None = None) -> Tensor:
        """Return the condition [B, c], in float32 or wider, of labels [B], guidance_scale [B] and style_indices [B, K].

        Class embedding + sum of the style embeddings + 0.02 * guidance embedding (arXiv 2602.04770, appendix).

        Raises:
            ValueError: an input of the wrong shape or dtype, or missing style indices.
        """
        check_tensor("labels", labels, (None,), "index")
        check_tensor("guidance_scale", guidance_scale, (labels.shape[0],), "float")
        if self.num_style_tokens or style_indices is not None:
            check_tensor("style_indices", style_indices, (labels.shape[0], self.num_style_tokens), "index")
        condition = self.class_embedding(labels)  # [B, c]
        condition = condition.to(wide_dtype(condition.dtype))  # [B, c]
        if self.num_style_tokens:
            offsets = torch.arange(self.num_style_tokens, device=style_indices.device) * self.style_codebook_size  # [K]
            styles = self.style_embedding(style_indices + offsets)  # [B, K, c]
            condition = condition + styles.sum(dim=1, dtype=condition.dtype)  # [B, c]
        return condition + GUIDANCE_EMBEDDING_SCALE * self.guidance_embedding(guidance_scale)  # [B, c]

    def forward(self, noise: Tensor, labels: Tensor, guidance_scale: Tensor, style_indices: Tensor | None = None) -> Tensor:
        """Generate one image or latent a sample.

        Args:
            noise: [B, C, H, W], standard normal; cast to the dtype of the weights.
            labels: [B] int64 in [0, num_classes).
            guidance_scale: [B], the guidance the sample is asked for; 1 is none.
            style_indices: [B, K] int64 in [0, style_codebook_size); None only where num_style_tokens is 0.

        Returns:
            [B, C, H, W] in float32 (float64 for float64 weights).

        Raises:
            ValueError: an input of the wrong shape or dtype. Values are not looked at: that would wait for the device.
        """
        check_tensor("noise", noise, (None, *self.input_shape), "float")
        check_tensor("labels", labels, (noise.shape[0],), "index")
        condition = self.condition(labels, guidance_scale, style_indices)  # [B, c]
        patches = patchify(noise.to(self.patch_embedding.weight.dtype), self.patch_size)  # [B, N, p*p*C]
        image_tokens = self.patch_embedding(patches) + self.position_embedding  # [B, N, D]
        context_tokens = self.context_projection(condition)[:, None] + self.context_embedding  # [B, T - N, D]
        x = torch.cat([context_tokens.to(image_tokens.dtype), image_tokens], dim=1)  # [B, T, D]
        cosines, sines = rotary_table(x.shape[1], self.head_dim, wide_dtype(x.dtype), x.device)  # [T, E/2] each
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, condition, cosines, sines)  # [B, T, D]
            else:
                x = block(x, condition, cosines, sines)  # [B, T, D]
        patches = self.final_layer(x[:, self.num_context_tokens :], condition)  # [B, N, p*p*C]
        return unpatchify(patches, self.patch_size, noise.shape[2])  # [B, C, H, W]
