"""ResNet-18 and ResNet-50 with published weights as feature encoders.

Shapes: B images, R side of the network's input; stage s has maps of side R/4, R/8, R/16, R/32.
Sources: ResNet (arXiv 1512.03385), built by torchvision; weights: supervised, MoCo v2 (arXiv 2003.04297), SimCLR
(arXiv 2002.05709), see resnet_checkpoints.py. Maps: arXiv 2602.04770, A.5 (every second block and every stage).
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .initialization import default_generator
from .pixel_encoder import TRAINED_SIZE, PixelEncoder, draw_weights
from .resnet_checkpoints import UNUSED_BUFFER, read_resnet_weights

ARCHITECTURES = ("resnet18", "resnet50")
NUM_STAGES = 4


class PretrainedResNet(PixelEncoder):
    """A torchvision ResNet in evaluation mode.

    Maps: `conv1` [B,64,R/2,R/2] behind the stem's ReLU, `layerS_blkK` behind block K of stage S (from 1) and `layerS`, the
    stage's output, which is also its last block's. `default_features` are the stages and every second block but the last.
    """

    repeated_blocks = ("BasicBlock", "Bottleneck")

    def __init__(self, network: nn.Module, image_size: int = TRAINED_SIZE, normalization: str = "imagenet"):
        super().__init__(image_size, normalization)
        network.fc = nn.Identity()
        self.network = network
        counts = [len(stage) for stage in self._stages()]
        stages = [f"layer{s}" for s in range(1, NUM_STAGES + 1)]
        blocks = [f"layer{s}_blk{k}" for s, count in enumerate(counts, start=1) for k in range(1, count)]
        self.map_names = ("conv1", *stages, *blocks)
        self.default_features = (*stages, *(name for name in blocks if int(name.rpartition("blk")[2]) % 2 == 0))
        self.freeze()

    def _stages(self) -> list[nn.Sequential]:
        return [getattr(self.network, f"layer{s}") for s in range(1, NUM_STAGES + 1)]

    def network_maps(self, pixels: Tensor, wanted: Sequence[str]) -> dict[str, Tensor]:
        """The wanted maps of pixels [B,3,R,R]."""
        maps = {}
        x = self.network.bn1(self.network.conv1(pixels)).relu()  # [B,64,R/2,R/2]
        if "conv1" in wanted:
            maps["conv1"] = x
        x = self.network.maxpool(x)  # [B,64,R/4,R/4]
        for s, stage in enumerate(self._stages(), start=1):
            for k, block in enumerate(stage, start=1):
                x = block(x)  # [B, C_s, R/2^(s+1), R/2^(s+1)]
                name = f"layer{s}" if k == len(stage) else f"layer{s}_blk{k}"
                if name in wanted:
                    maps[name] = x
        return maps


def load_resnet(
    path: str | Path,
    *,
    architecture: str,
    weights: str,
    normalization: str = "imagenet",
    image_size: int = TRAINED_SIZE,
    random: bool = False,
) -> PretrainedResNet:
    """The encoder with the weights of a file; `random` reads none and draws them.

    Args:
        path: a safetensors or torch file.
        architecture: "resnet18" or "resnet50".
        weights: the file's layout: "supervised", "moco_v2" or "simclr".
        normalization: what the weights were trained on: "imagenet", or "unit" for colours in [0, 1] as they are.

    Raises:
        FileNotFoundError: no such file, saying what to get.
        ValueError: a file that does not fit, naming a tensor that is missing, unknown or of another shape.
    """
    import torchvision

    with torch.device("meta"):
        network = getattr(torchvision.models, architecture)(weights=None)
    network.fc = nn.Identity()
    if random:
        network = network.to_empty(device="cpu")
        draw_weights(network, default_generator())
    else:
        wanted = network.state_dict()
        counters = {name: torch.zeros((), dtype=torch.long) for name in wanted if name.endswith(UNUSED_BUFFER)}
        network.load_state_dict({**counters, **read_resnet_weights(path, weights, wanted)}, assign=True)
    return PretrainedResNet(network, image_size, normalization)
