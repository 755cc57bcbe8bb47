"""DINOv2 as a feature encoder: the patch tokens of chosen blocks.

Shapes: B images, T patches of p x p pixels (row-major), D features of a token.
Source: DINOv2 (arXiv 2304.07193; github.com/facebookresearch/dinov2), built and read by transformers.
"""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from .pixel_encoder import TRAINED_SIZE, PixelEncoder
from .transformers_folder import load_transformers_network

NUM_DEFAULT_BLOCKS = 4
ADVICE = (
    "download DINOv2 in the format of transformers, for example "
    "`hf download facebook/dinov2-base --local-dir weights/dinov2-base`, and give that folder"
)


class Dinov2Encoder(PixelEncoder):
    """Maps `blockK`: the patch tokens behind block K (from 1) through the network's last LayerNorm, [B,T,D].

    That norm is what DINOv2's own `get_intermediate_layers` applies to every block. The class token is left out. Maps are in
    the network's type. Positions are interpolated to the number of patches, as the network does.

    Args:
        network: a transformers Dinov2Model.
        image_size: side of its input, a multiple of its patch size.
        blocks: the blocks that `default_features` names; None takes four, evenly spaced and ending with the last.

    Raises:
        ValueError: an image size that patches do not divide, or a block that the network does not have.
    """

    repeated_blocks = ("Dinov2Layer",)

    def __init__(self, network: nn.Module, image_size: int = TRAINED_SIZE, blocks: Sequence[int] | None = None):
        patch_size, num_blocks = network.config.patch_size, network.config.num_hidden_layers
        if image_size % patch_size:
            raise ValueError(
                f"encoder.image_size is {image_size}: DINOv2 needs a multiple of its patch size {patch_size}, "
                f"for example {max(image_size // patch_size, 1) * patch_size}"
            )
        if blocks is None:
            count = min(NUM_DEFAULT_BLOCKS, num_blocks)
            blocks = [num_blocks * k // count for k in range(1, count + 1)]
        wrong = [block for block in blocks if not 1 <= block <= num_blocks]
        if wrong:
            raise ValueError(f"encoder.blocks holds {wrong}: this DINOv2 has the blocks 1 to {num_blocks}")
        super().__init__(image_size)
        self.network = network
        self.map_names = tuple(f"block{k}" for k in range(1, num_blocks + 1))
        self.default_features = tuple(f"block{k}" for k in blocks)
        self.freeze()

    def network_maps(self, pixels: Tensor, wanted: Sequence[str]) -> dict[str, Tensor]:
        """The wanted blocks' patch tokens of pixels [B,3,R,R]."""
        states = self.network(pixels, output_hidden_states=True).hidden_states  # the embedding, then every block [B,1+T,D]
        return {
            name: self.network.layernorm(states[k])[:, 1:]
            for k, name in enumerate(self.map_names, start=1)
            if name in wanted
        }  # fmt: skip


def load_dinov2(
    folder: str | Path, *, image_size: int = TRAINED_SIZE, blocks: Sequence[int] | None = None, random: bool = False
) -> Dinov2Encoder:
    """The encoder of a folder that transformers' save_pretrained wrote: Dinov2Model or Dinov2ForImageClassification.

    `random` takes the folder's architecture with random weights. Raises FileNotFoundError saying what to get, ValueError for
    another model, or weights that are missing, unknown or of another shape, and what Dinov2Encoder refuses.
    """
    from transformers import Dinov2Model

    return Dinov2Encoder(load_transformers_network(folder, Dinov2Model, ADVICE, random=random), image_size, blocks)
