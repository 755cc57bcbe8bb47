"""The feature encoder, a ResNet with group norms, and the U-Net decoder that trains it as a masked autoencoder.

Shapes: B samples, C input channels, W width of the first stage (2W, 4W, 8W after it), h x w sides of a map. Stage s
(from 1) halves the sides where s > 1, rounding up.
Sources: arXiv 2602.04770 (appendix: feature encoder) and the release's configuration; ResNet (arXiv 1512.03385);
group norm (arXiv 1803.08494).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .initialization import Conv2d, Linear, draw

NORM_EPS = 1e-6
MAX_GROUPS = 32


def num_groups(channels: int) -> int:
    """Return the largest number of groups up to 32 that divides `channels`."""
    return next(groups for groups in range(min(MAX_GROUPS, channels), 0, -1) if channels % groups == 0)


def convolution3x3(in_channels: int, out_channels: int, stride: int = 1) -> Conv2d:
    """Return a 3x3 convolution without bias, padded by 1 on every side at stride 2 too."""
    return Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)


class GroupNorm(nn.GroupNorm):
    """Group norm computed in float32 or wider and returned in the dtype of its input, so that maps keep autocast's."""

    def __init__(self, channels: int):
        super().__init__(num_groups(channels), channels, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [B, channels, h, w] over the positions and channels of each group (biased variance)."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return F.group_norm(x.to(dtype), self.num_groups, weight, bias, self.eps).to(x.dtype)


class ConvNormReLU(nn.Module):
    """3x3 convolution, group norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.convolution = convolution3x3(in_channels, out_channels)
        self.norm = GroupNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, in_channels, h, w] to [B, out_channels, h, w]."""
        return F.relu(self.norm(self.convolution(x)))  # [B, out_channels, h, w]


class ResidualBlock(nn.Module):
    """Basic block ReLU(GN(conv(ReLU(GN(conv x)))) + shortcut), projected where the shape changes (ResNet, figure 2)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.convolution1 = convolution3x3(in_channels, out_channels, stride)
        self.norm1 = GroupNorm(out_channels)
        self.convolution2 = convolution3x3(out_channels, out_channels)
        self.norm2 = GroupNorm(out_channels)
        self.has_projection = stride != 1 or in_channels != out_channels
        if self.has_projection:
            self.shortcut_convolution = Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)
            self.shortcut_norm = GroupNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, in_channels, h, w] to [B, out_channels, ceil(h / stride), ceil(w / stride)]."""
        residual = F.relu(self.norm1(self.convolution1(x)))  # [B, out_channels, h', w']
        residual = self.norm2(self.convolution2(residual))  # [B, out_channels, h', w']
        shortcut = self.shortcut_norm(self.shortcut_convolution(x)) if self.has_projection else x
        return F.relu(residual + shortcut)  # [B, out_channels, h', w']


class Stage(nn.Module):
    """Residual blocks and one more group norm, whose output is the stage's feature and the next stage's input."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, stride: int):
        super().__init__()
        self.blocks = nn.ModuleList(
            ResidualBlock(in_channels if k == 0 else out_channels, out_channels, stride if k == 0 else 1)
            for k in range(num_blocks)
        )
        self.norm = GroupNorm(out_channels)


class ResNetEncoder(nn.Module):
    """Stem and four stages; every intermediate map can be asked for by name."""

    def __init__(self, in_channels: int, width: int, blocks: Sequence[int]):
        super().__init__()
        widths = [width * 2**s for s in range(len(blocks))]
        self.gradient_checkpointing = False
        self.stem = ConvNormReLU(in_channels, width)
        self.stages = nn.ModuleList(
            Stage(widths[max(s - 1, 0)], widths[s], num_blocks, stride=1 if s == 0 else 2) for s, num_blocks in enumerate(blocks)
        )
        self.map_names = encoder_map_names(blocks)

    def forward(self, x: Tensor, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Return the maps called `names` (None: all of `map_names`) of x [B, C, h, w], in the order of `map_names`.

        conv1 [B, W, h, w]; layerS [B, 2^(S-1) W, h', w'] after the stage's norm; layerS_blkK of the same shape after
        block K's ReLU and before that norm.
        """
        wanted = self.map_names if names is None else tuple(names)
        maps = {}

        def keep(name: str, value: Tensor) -> None:
            # A map that nobody asked for is not held: without gradients its memory is free at once.
            if name in wanted:
                maps[name] = value

        x = self.stem(x)  # [B, W, h, w]
        keep("conv1", x)
        for s, stage in enumerate(self.stages, start=1):
            for k, block in enumerate(stage.blocks, start=1):
                x = self._run_block(block, x)  # [B, 2^(s-1) W, h', w']
                keep(f"layer{s}_blk{k}", x)
            x = stage.norm(x)  # [B, 2^(s-1) W, h', w']
            keep(f"layer{s}", x)
        return {name: maps[name] for name in self.map_names if name in maps}

    def _run_block(self, block: ResidualBlock, x: Tensor) -> Tensor:
        """Run one block, recomputing it in the backward pass where gradient checkpointing is on."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, x)
        return block(x)


def encoder_map_names(blocks: Sequence[int]) -> tuple[str, ...]:
    """Return every map's name: conv1, the stages layer1 .., then each block's output layer1_blk1 .. in order."""
    stages = [f"layer{s}" for s in range(1, len(blocks) + 1)]
    block_names = [f"layer{s}_blk{k}" for s, count in enumerate(blocks, start=1) for k in range(1, count + 1)]
    return ("conv1", *stages, *block_names)


class UpBlock(nn.Module):
    """One step up the decoder: resize to the skip's size, join, norm, two 3x3 convolutions."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int):
        super().__init__()
        self.concat_norm = GroupNorm(in_channels + skip_channels)
        self.project = ConvNormReLU(in_channels + skip_channels, out_channels)
        self.refine = ConvNormReLU(out_channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Join x [B, in_channels, h', w'] with skip [B, skip_channels, h, w] into [B, out_channels, h, w]."""
        x = F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=False)  # [B, in_channels, h, w]
        x = self.concat_norm(torch.cat([x, skip], dim=1))  # [B, in_channels + skip_channels, h, w]
        return self.refine(self.project(x))  # [B, out_channels, h, w]


class UNetDecoder(nn.Module):
    """Decoder from layer4 to the encoder's input, with skips from layer3, layer2, layer1 and conv1."""

    def __init__(self, width: int, out_channels: int):
        super().__init__()
        self.bridge = ConvNormReLU(8 * width, 8 * width)
        skips = [4 * width, 2 * width, width, width]
        inputs = [8 * width, *skips[:-1]]
        self.up_blocks = nn.ModuleList(UpBlock(i, s, s) for i, s in zip(inputs, skips, strict=True))
        self.output = Conv2d(width, out_channels, kernel_size=1)

    def forward(self, maps: dict[str, Tensor]) -> Tensor:
        """Map the encoder's maps (conv1 [B, W, h, w], layer1 .. layer4) to [B, out_channels, h, w]."""
        x = self.bridge(maps["layer4"])  # [B, 8W, h/8, w/8]
        for up_block, name in zip(self.up_blocks, ("layer3", "layer2", "layer1", "conv1"), strict=True):
            x = up_block(x, maps[name])  # 4W, 2W, W, W channels at the skip's size
        return self.output(x)  # [B, out_channels, h, w]


@torch.no_grad()
def initialize_resnet(model: nn.Module, generator: torch.Generator) -> None:
    """Draw the weights of every convolution, linear layer and norm in `model`.

    Convolutions that a norm and ReLU follow are Kaiming-normal over the fan-out (arXiv 1502.01852, as usual for
    ResNets); layers with a bias (the output convolution, the classifier) are normal with deviation fan_in^-0.5, bias
    zero; norms are the identity.
    """
    for module in model.modules():
        if isinstance(module, Conv2d | Linear) and module.bias is not None:
            draw(module.weight, nn.init.normal_, generator, std=module.weight[0].numel() ** -0.5)
            nn.init.zeros_(module.bias)
        elif isinstance(module, Conv2d):
            draw(module.weight, nn.init.kaiming_normal_, generator, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, GroupNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
