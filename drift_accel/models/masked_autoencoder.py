"""The masked autoencoder: its encoder is the feature space of the drift, its decoder and classifier only train it.

Shapes: B samples, C image channels, H x W sides of the image, p patchify factor, h = H/p and w = W/p the encoder's
grid, m side of a mask patch on that grid.
Sources: arXiv 2602.04770 (appendix: feature encoder) and the release's configuration; MAE (arXiv 2111.06377).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor
from torch.nn import functional as F

from .checks import check_counts, check_tensor, complete_config
from .initialization import Linear, default_generator
from .resnet import ResNetEncoder, UNetDecoder, initialize_resnet

NUM_STAGES = 4
MASKED_COUNT_EPS = 1e-8

# The published encoders of latents and pixels, and one that a laptop trains on 8x8 digits.
MAE_PRESETS: dict[str, dict] = {
    "tiny": {"width": 16, "blocks": (2, 2, 2, 2), "in_channels": 1, "input_size": 8, "num_classes": 10},
    "latent-256": {"width": 256, "in_channels": 4, "input_size": 32},
    "latent-640": {"width": 640, "in_channels": 4, "input_size": 32},
    "pixel-640": {"width": 640, "in_channels": 3, "input_size": 256, "input_patch_size": 8},
}


class MaeLoss(NamedTuple):
    """What one sample contributes, each [B] in float32 or wider; only `loss` is meant to be differentiated."""

    loss: Tensor
    reconstruction: Tensor
    classification: Tensor
    accuracy: Tensor


def check_mae_config(**config) -> None:
    """Refuse an impossible configuration of MaskedAutoencoder without building it; settings left out have defaults.

    Raises:
        ValueError: names the setting, its value and what to set instead.
    """
    values = complete_config(MaskedAutoencoder, config)
    check_counts(values, ["in_channels", "width", "num_classes", "mask_patch_size", "input_patch_size", "input_size"])
    blocks = values["blocks"]
    if not isinstance(blocks, Sequence) or isinstance(blocks, str) or len(blocks) != NUM_STAGES:
        raise ValueError(f"blocks is {blocks!r}; give the number of blocks of each of the {NUM_STAGES} stages")
    check_counts({f"blocks[{s}]": count for s, count in enumerate(blocks)}, [f"blocks[{s}]" for s in range(NUM_STAGES)])
    input_size, input_patch_size = values["input_size"], values["input_patch_size"]
    if input_size % input_patch_size:
        raise ValueError(
            f"input_patch_size {input_patch_size} does not divide input_size {input_size}; "
            "choose a factor that divides the side of the image or latent"
        )
    grid_size = input_size // input_patch_size
    if grid_size % values["mask_patch_size"]:
        raise ValueError(
            f"mask_patch_size {values['mask_patch_size']} does not divide the encoder's grid of {grid_size} "
            f"(input_size {input_size} over input_patch_size {input_patch_size}); choose one that does"
        )
    if values["input_space"] not in (None, "latent", "pixel"):
        raise ValueError(f"input_space is {values['input_space']!r}; set it to 'latent', 'pixel' or None (derived)")


def expand_mask(patch_mask: Tensor, mask_patch_size: int) -> Tensor:
    """Repeat a mask over patches [B, 1, h/m, w/m] for every position of its patch: [B, 1, h, w]."""
    return patch_mask.repeat_interleave(mask_patch_size, dim=2).repeat_interleave(mask_patch_size, dim=3)


class MaskedAutoencoder(ModelMixin, ConfigMixin):
    """ResNet encoder with feature maps by name, and the U-Net decoder and classifier that it is trained with.

    Its weights are drawn from a generator with seed 0, never from torch's global random state: two models of one
    configuration start equal. `initialize_weights` draws others.

    Args:
        in_channels: channels C of the image or latent.
        width: channels of the first stage; the four stages have 1, 2, 4 and 8 times as many.
        blocks: residual blocks of the four stages.
        num_classes: classes of the classifier.
        mask_patch_size: side m of a mask patch, in positions of the encoder's grid.
        input_patch_size: p, the p x p pixels that patchify stacks into channels; 1 leaves the input as it is.
        input_size: nominal side of the input before patchify; other sides that fit are accepted.
        input_space: "latent" or "pixel", the space of the images it expects; None derives it.

    Raises:
        ValueError: an impossible configuration, before anything is built.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResidualBlock", "UpBlock"]
    _repeated_blocks = ["ResidualBlock"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        width: int = 256,
        blocks: Sequence[int] = (3, 4, 6, 3),
        num_classes: int = 1000,
        mask_patch_size: int = 2,
        input_patch_size: int = 1,
        input_size: int = 32,
        input_space: str | None = None,
    ):
        super().__init__()
        check_mae_config(**self.config)
        self.in_channels = in_channels
        self.mask_patch_size = mask_patch_size
        self.input_patch_size = input_patch_size
        grid_channels = in_channels * input_patch_size**2
        self.encoder = ResNetEncoder(grid_channels, width, tuple(blocks))
        self.decoder = UNetDecoder(width, grid_channels)
        self.classifier = Linear(8 * width, num_classes)
        self.initialize_weights()

    def initialize_weights(self, generator: torch.Generator | None = None) -> None:
        """Set the initial weights as `initialize_resnet` says; None draws from a CPU generator with seed 0."""
        initialize_resnet(self, default_generator() if generator is None else generator)

    @property
    def input_space(self) -> str:
        """Space of the images the encoder expects: "pixel" for patchified or 3-channel input unless set otherwise."""
        if self.config.input_space is not None:
            return self.config.input_space
        return "pixel" if self.input_patch_size > 1 or self.in_channels == 3 else "latent"

    @property
    def map_names(self) -> tuple[str, ...]:
        """Names of all maps that `feature_maps` has, in its order."""
        return self.encoder.map_names

    @property
    def default_features(self) -> tuple[str, ...]:
        """Names of the maps that the release uses: conv1, layer1 .. layer4 and every second block's output."""
        block_names = [f"layer{s}_blk{k}" for s, count in enumerate(self.config.blocks, start=1) for k in range(2, count + 1, 2)]
        return ("conv1", *(f"layer{s}" for s in range(1, NUM_STAGES + 1)), *block_names)

    def encoder_input(self, images: Tensor) -> Tensor:
        """Patchify images [B, C, H, W] to the encoder's grid [B, p*p*C, h, w], in their own dtype.

        Channels are ordered (row in patch, column in patch, colour).

        Raises:
            ValueError: images of the wrong shape or dtype, or sides that p does not divide.
        """
        check_tensor("images", images, (None, self.in_channels, None, None), "float")
        b, c, height, width = images.shape
        p = self.input_patch_size
        if height % p or width % p:
            raise ValueError(f"images of {height} x {width} do not divide into patches of {p} (input_patch_size)")
        if p == 1:
            return images
        patches = images.reshape(b, c, height // p, p, width // p, p).permute(0, 3, 5, 1, 2, 4)  # [B, p, p, C, h, w]
        return patches.reshape(b, p * p * c, height // p, width // p)  # [B, p*p*C, h, w]

    def unpatchify(self, grid: Tensor) -> Tensor:
        """Undo `encoder_input`: [B, p*p*C, h, w] -> [B, C, H, W].

        Raises:
            ValueError: a grid of the wrong shape or dtype.
        """
        p, c = self.input_patch_size, self.in_channels
        check_tensor("grid", grid, (None, p * p * c, None, None), "float")
        b, _, h, w = grid.shape
        patches = grid.reshape(b, p, p, c, h, w).permute(0, 3, 4, 1, 5, 2)  # [B, C, h, p, w, p]
        return patches.reshape(b, c, h * p, w * p)  # [B, C, H, W]

    def expand_mask(self, patch_mask: Tensor) -> Tensor:
        """Expand a mask over mask patches [B, 1, h/m, w/m] to the encoder's grid [B, 1, h, w].

        Raises:
            ValueError: a mask of the wrong shape or dtype.
        """
        check_tensor("patch_mask", patch_mask, (None, 1, None, None), "mask")
        return expand_mask(patch_mask, self.mask_patch_size)

    def feature_maps(self, images: Tensor, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Return the encoder's maps of unmasked images [B, C, H, W] by name, each [B, channels, h', w'].

        Ordered conv1, layer1 .. layer4, then every block's raw output layerS_blkK; in autocast's dtype under autocast.

        Args:
            names: the maps to return; None means all of them. Maps left out are not kept in memory.

        Raises:
            ValueError: images of the wrong shape or dtype, or an unknown name.
        """
        unknown = [name for name in names or () if name not in self.encoder.map_names]
        if unknown:
            raise ValueError(f"no feature map is called {unknown}; this encoder has {list(self.encoder.map_names)}")
        return self._encode(self.encoder_input(images), names)

    def _encode(self, grid: Tensor, names: Sequence[str] | None) -> dict[str, Tensor]:
        """Run the encoder on its grid [B, p*p*C, h, w], cast to the dtype of the weights."""
        return self.encoder(grid.to(self.classifier.weight.dtype), names)

    def _masked_pass(self, grid: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Hide the masked positions; return the reconstruction [B, p*p*C, h, w] and layer4 [B, 8W, h/8, w/8]."""
        check_tensor("mask", mask, (grid.shape[0], 1, grid.shape[2], grid.shape[3]), "mask")
        visible = grid * (1 - mask.to(grid.dtype))  # [B, p*p*C, h, w]
        maps = self._encode(visible, ("conv1", "layer1", "layer2", "layer3", "layer4"))
        return self.decoder(maps), maps["layer4"]

    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        """Predict all positions from the visible ones.

        Args:
            images: [B, C, H, W].
            mask: [B, 1, h, w] on the encoder's grid, 1 = hidden.

        Returns:
            [B, p*p*C, h, w]; `unpatchify` turns it into an image.

        Raises:
            ValueError: an input of the wrong shape or dtype.
        """
        return self._masked_pass(self.encoder_input(images), mask)[0]

    def forward(self, images: Tensor, labels: Tensor, mask: Tensor, lambda_cls: float = 0.0) -> MaeLoss:
        """Return each sample's training loss lambda_cls * classification + (1 - lambda_cls) * reconstruction.

        Reconstruction is the squared error summed over hidden positions and channels, over the number of hidden
        positions; classification is the cross-entropy of a linear layer on the spatial mean of layer4 in the same
        masked pass (arXiv 2602.04770, appendix: feature encoder).

        Args:
            images: [B, C, H, W].
            labels: [B] int64 in [0, num_classes).
            mask: [B, 1, h, w] on the encoder's grid, 1 = hidden.

        Raises:
            ValueError: an input of the wrong shape or dtype.
        """
        grid = self.encoder_input(images)  # [B, p*p*C, h, w]
        check_tensor("labels", labels, (images.shape[0],), "index")
        prediction, layer4 = self._masked_pass(grid, mask)  # [B, p*p*C, h, w], [B, 8W, h/8, w/8]

        dtype = torch.promote_types(prediction.dtype, torch.float32)
        hidden = mask.to(dtype)  # [B, 1, h, w]
        squared_error = (prediction.to(dtype) - grid.to(dtype)).square() * hidden  # [B, p*p*C, h, w]
        num_hidden = hidden.sum(dim=(1, 2, 3)) + MASKED_COUNT_EPS  # [B]
        reconstruction = squared_error.sum(dim=(1, 2, 3)) / num_hidden  # [B]

        pooled = layer4.mean(dim=(2, 3), dtype=dtype)  # [B, 8W]
        logits = self.classifier(pooled.to(self.classifier.weight.dtype)).to(dtype)  # [B, num_classes]
        classification = F.cross_entropy(logits, labels.long(), reduction="none")  # [B]
        accuracy = (logits.argmax(dim=1) == labels).to(dtype)  # [B]

        loss = lambda_cls * classification + (1 - lambda_cls) * reconstruction  # [B]
        return MaeLoss(loss, reconstruction, classification, accuracy)
