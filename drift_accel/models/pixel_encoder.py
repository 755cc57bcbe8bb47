"""What all pretrained encoders of pixels share: how an image becomes their input, and that they stay frozen.

Shapes: B images, C channels, H x W pixels of an image, R side of the square that the network sees.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .checks import check_tensor

IMAGE_CHANNELS = 3
TRAINED_SIZE = 224  # side at which all encoders here were trained or are evaluated
# name -> (mean, deviation) of the colours in [0, 1]: "unit" leaves them as they are.
NORMALIZATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "unit": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


class PixelEncoder(nn.Module):
    """A frozen network of pixels whose maps are the features of the drift; a subclass names and computes the maps.

    Weights have no gradient and the module never leaves evaluation mode, so batch norms use their stored statistics whatever
    the trainer does. Gradients flow to the images.

    `final_maps` are the maps that are feature keys as they are: nothing is pooled from them. `has_norm_x` says whether the
    key `norm_x` belongs to the encoder's keys by default; the release has it for its masked autoencoder alone.
    """

    input_space = "pixel"
    in_channels = IMAGE_CHANNELS
    final_maps: tuple[str, ...] = ()
    has_norm_x = False
    map_names: tuple[str, ...] = ()
    default_features: tuple[str, ...] = ()
    repeated_blocks: tuple[str, ...] = ()  # class names of the network's blocks, of which there are many

    def __init__(self, image_size: int = TRAINED_SIZE, normalization: str = "imagenet"):
        super().__init__()
        self.image_size = image_size
        mean, deviation = NORMALIZATIONS[normalization]
        self.register_buffer("mean", torch.tensor(mean).reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(deviation).reshape(1, -1, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> "PixelEncoder":
        """Stay in evaluation mode: a frozen batch norm must not follow the batch."""
        return super().train(False)

    def freeze(self) -> "PixelEncoder":
        """Evaluation mode, no gradients for the weights; the constructors of subclasses end with it."""
        return self.eval().requires_grad_(False)

    def compile_repeated_blocks(self, **settings) -> None:
        """torch.compile each of the network's blocks in place, as diffusers' models do; `settings` go to it."""
        for module in self.modules():
            if type(module).__name__ in self.repeated_blocks:
                module.compile(**settings)

    def network_input(self, images: Tensor) -> Tensor:
        """Images [B,3,H,W] in [-1, 1] to the network's [B,3,R,R] in the type of its weights.

        The colours go to [0, 1] without clipping, so that a generator is pulled back from values outside, then through the
        normalisation, then to R x R, bilinearly with half-pixel centres and antialiasing. Computed in float32 or wider.

        Raises:
            ValueError: images of the wrong shape or dtype.
        """
        check_tensor("images", images, (None, self.in_channels, None, None), "float")
        wide = images.to(torch.promote_types(images.dtype, torch.float32))
        pixels = ((wide + 1) / 2 - self.mean) / self.deviation  # [B,3,H,W]
        if pixels.shape[2:] != (self.image_size, self.image_size):
            size = (self.image_size, self.image_size)
            pixels = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=True)  # [B,3,R,R]
        return pixels.to(next(self.parameters()).dtype)

    def feature_maps(self, images: Tensor, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """The maps of images [B,3,H,W] in [-1, 1] by name, each [B,C,h,w] or [B,T,S], in the order of `map_names`.

        Args:
            names: the maps to return; None means all of them. Maps left out are not kept in memory.

        Raises:
            ValueError: images of the wrong shape or dtype, or an unknown name.
        """
        wanted = self.map_names if names is None else tuple(names)
        unknown = [name for name in wanted if name not in self.map_names]
        if unknown:
            raise ValueError(f"no feature map is called {unknown}; this encoder has {list(self.map_names)}")
        maps = self.network_maps(self.network_input(images), wanted)
        return {name: maps[name] for name in self.map_names if name in wanted}

    def network_maps(self, pixels: Tensor, wanted: Sequence[str]) -> dict[str, Tensor]:
        """At least the `wanted` maps of the network's input [B,3,R,R]."""
        raise NotImplementedError(f"{type(self).__name__} computes no maps")


@torch.no_grad()
def draw_weights(network: nn.Module, generator: torch.Generator) -> None:
    """Give a network without weights random ones (variance 2 / fan-in; norms the identity): for tests alone."""
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim >= 2:
                values = torch.empty(parameter.shape, dtype=torch.float32)
                values.normal_(std=(2 / parameter[0].numel()) ** 0.5, generator=generator)
                parameter.copy_(values)
            else:
                parameter.fill_(0.0 if name == "bias" else 1.0)
        if hasattr(module, "reset_running_stats"):
            module.reset_running_stats()
