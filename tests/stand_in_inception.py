"""A network with the calls and shapes of inception-2015-12-05.pt and random weights, as TorchScript in the expected place.

Its numbers mean nothing. It shows that a protocol feeds and reads the file as clean-fid and its authors do.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FILE = "inception-2015-12-05.pt"


class Mixed(nn.Module):
    """A block of two branches, the first of which is called conv."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(channels, 8, 1), nn.ReLU())
        self.tower = nn.Conv2d(channels, channels - 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x), self.tower(x)], dim=1)


def convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, size, stride), nn.ReLU())


def layers() -> nn.Module:
    """299x299 to 17x17 at mixed_6, then 2,048 features, in the file's names."""
    parts = nn.Sequential()
    for name, module in (
        ("conv", convolution(3, 8, 3, 2)),  # 149
        ("conv_1", convolution(8, 8, 3)),  # 147
        ("conv_2", nn.Conv2d(8, 8, 3, padding=1)),
        ("pool0", nn.MaxPool2d(3, 2)),  # 73
        ("conv_3", convolution(8, 8, 1)),
        ("conv_4", convolution(8, 12, 3)),  # 71
        ("pool1", nn.MaxPool2d(3, 2)),  # 35
        ("mixed", convolution(12, 12, 1)),
        ("mixed_1", convolution(12, 12, 1)),
        ("mixed_2", convolution(12, 12, 1)),
        ("mixed_3", convolution(12, 16, 3, 2)),  # 17
        ("mixed_4", convolution(16, 16, 1)),
        ("mixed_5", convolution(16, 16, 1)),
        ("mixed_6", Mixed(16)),
        ("mixed_7", convolution(16, 16, 1)),
        ("mixed_8", convolution(16, 32, 3, 2)),  # 8
        ("mixed_9", convolution(32, 32, 1)),
        ("mixed_10", nn.Conv2d(32, 2048, 1)),
        ("pool2", nn.AdaptiveAvgPool2d(1)),
    ):
        parts.add_module(name, module)
    return parts


class StandIn(nn.Module):
    """forward(images in [0, 255]) resizes inside and returns features or probabilities."""

    def __init__(self):
        super().__init__()
        self.layers = layers()
        self.output = nn.Linear(2048, 1008)

    def forward(self, img: Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False) -> Tensor:
        batch, height, width = img.shape[0], img.shape[2], img.shape[3]
        theta = torch.eye(2, 3)
        theta[0, 2] += theta[0, 0] / width - theta[0, 0] / 299
        theta[1, 2] += theta[1, 1] / height - theta[1, 1] / 299
        grid = F.affine_grid(theta.unsqueeze(0).repeat(batch, 1, 1), [batch, 3, 299, 299], align_corners=False)
        x = F.grid_sample(img.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
        features = self.layers((x - 128) / 128).reshape(-1, 2048)
        if return_features:
            return features
        if no_output_bias:
            return F.linear(features, self.output.weight).softmax(dim=1)
        return self.output(features).softmax(dim=1)


def write_stand_in(folder: Path, *, spatial: bool = True) -> Path:
    """Write the TorchScript file; without `spatial` its mixed_6 has another name."""
    network = StandIn()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            scale = (2 / max(parameter[0].numel(), 1)) ** 0.5 if parameter.ndim > 1 else 0.05
            parameter.copy_(scale * torch.randn(parameter.shape, generator=random))
    if not spatial:
        renamed = nn.Sequential()
        for name, module in network.layers.named_children():
            renamed.add_module(name.replace("mixed_6", "block"), module)
        network.layers = renamed
    folder.mkdir(parents=True, exist_ok=True)
    torch.jit.script(network.eval()).save(folder / FILE)
    return folder / FILE
