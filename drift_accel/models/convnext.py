"""ConvNeXt-V2 as a feature encoder, with the release's maps and normalisation.

Shapes: B images, stage k (from 0) has C_k channels on h_k x w_k locations (56, 28, 14, 7 a side at 224 pixels).
Sources: ConvNeXt V2 (arXiv 2301.00808; github.com/facebookresearch/ConvNeXt-V2), built and read by transformers;
arXiv 2602.04770, pixel-space recipes, as the release computes them.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .pixel_encoder import TRAINED_SIZE, PixelEncoder
from .transformers_folder import load_transformers_network

NUM_STAGES = 4
CHANNEL_EPSILON = 1e-3
VARIANCE_EPSILON = 1e-6
SMALLEST_VARIANCE = 1e-12

ADVICE = (
    "download ConvNeXt-V2 in the format of transformers, for example "
    "`hf download facebook/convnextv2-base-22k-224 --local-dir weights/convnextv2-base` (convnextv2-tiny-22k-224 for the tiny "
    "one), and give that folder"
)


class ConvNextV2Encoder(PixelEncoder):
    """The release's keys of a transformers ConvNextV2Model with four stages, all of them final.

    y_k is the map of stage k, before the next stage's downsampling, normalised over channels: (y - mean) / (std + 1e-3) with
    the biased std. Keys, spelled as in the release: `convenxt_stage_K` for K = 1, 2, 3 [B, h_k w_k, C_k]: y_k at every
    location, row-major; `convenxt_stage_K_mean`, `_std` for K = 0 .. 3 [B,1,C_k]: over the locations of y_k, the
    std as sqrt(var + 1e-6); `global_mean` [B,1,C_3]: the final LayerNorm of the raw last map's mean; `global_std`: the same
    as `convenxt_stage_3_std` (the release counts both). Statistics are float32 or wider, vectors keep the network's type.
    """

    map_names = (
        *(f"convenxt_stage_{k}" for k in range(1, NUM_STAGES)),
        *(f"convenxt_stage_{k}_{statistic}" for k in range(NUM_STAGES) for statistic in ("mean", "std")),
        "global_mean",
        "global_std",
    )
    default_features = map_names
    final_maps = map_names
    repeated_blocks = ("ConvNextV2Layer",)

    def __init__(self, network: nn.Module, image_size: int = TRAINED_SIZE):
        if len(network.encoder.stages) != NUM_STAGES:
            raise ValueError(f"the ConvNeXt-V2 has {len(network.encoder.stages)} stages; the release's keys need {NUM_STAGES}")
        super().__init__(image_size)
        self.network = network
        self.freeze()

    def network_maps(self, pixels: Tensor, wanted: Sequence[str]) -> dict[str, Tensor]:
        """All keys that `wanted` needs, of pixels [B,3,R,R]."""
        maps = {}
        x = self.network.embeddings(pixels)  # [B, C_0, R/4, R/4]
        for k, stage in enumerate(self.network.encoder.stages):
            x = stage(x)  # [B, C_k, h_k, w_k]
            name = f"convenxt_stage_{k}"
            if any(key.startswith(name) for key in wanted) or (k == NUM_STAGES - 1 and "global_std" in wanted):
                normalized = normalize_channels(x).flatten(2).transpose(1, 2)  # [B, h_k w_k, C_k]
                maps[name] = normalized.to(x.dtype)
                maps[f"{name}_mean"] = normalized.mean(1, keepdim=True)  # [B,1,C_k]
                variance = normalized.var(1, correction=0, keepdim=True)
                maps[f"{name}_std"] = (variance + VARIANCE_EPSILON).sqrt()  # [B,1,C_k]
        if "global_mean" in wanted:
            maps["global_mean"] = self._final_norm(x).unsqueeze(1)  # [B,1,C_3]
        if "global_std" in wanted:
            maps["global_std"] = maps[f"convenxt_stage_{NUM_STAGES - 1}_std"]
        return maps

    def _final_norm(self, x: Tensor) -> Tensor:
        """The network's last LayerNorm of the mean of [B,C,h,w] over space: [B,C], float32 or wider."""
        norm, dtype = self.network.layernorm, torch.promote_types(x.dtype, torch.float32)
        mean = x.mean((2, 3), dtype=dtype)
        return F.layer_norm(mean, norm.normalized_shape, norm.weight.to(dtype), norm.bias.to(dtype), norm.eps)


def normalize_channels(x: Tensor) -> Tensor:
    """(x - mean) / (std + 1e-3) over the channels of [B,C,h,w], the std biased; float32 or wider."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    variance, mean = torch.var_mean(x, dim=1, correction=0, keepdim=True)  # [B,1,h,w]
    # Below the smallest variance the root is far under 1e-3 anyway; at 0 its gradient would be infinite.
    return (x - mean) / (variance.clamp_min(SMALLEST_VARIANCE).sqrt() + CHANNEL_EPSILON)


def load_convnext(folder: str | Path, *, image_size: int = TRAINED_SIZE, random: bool = False) -> ConvNextV2Encoder:
    """The encoder of a folder that transformers' save_pretrained wrote: ConvNextV2Model or ConvNextV2ForImageClassification.

    `random` takes the folder's architecture with random weights. Raises FileNotFoundError saying what to get, ValueError for
    another model, or weights that are missing, unknown or of another shape.
    """
    from transformers import ConvNextV2Model

    return ConvNextV2Encoder(load_transformers_network(folder, ConvNextV2Model, ADVICE, random=random), image_size)
