"""The U-Net of ADM as EDM trains it on ImageNet 64x64 and DMD2 distils it into a generator of one step.

Shapes: B images, C channels, H = W sides, E channels of the embedding, M classes.
Sources: ADM, Dhariwal and Nichol 2021, arXiv 2105.05233 (section 3, table 11); EDM, Karras et al. 2022, arXiv 2206.00364
(section 5, appendix F); DMD2, Yin et al. 2024, arXiv 2405.14867. Modules are called as in EDM's and DMD2's published
checkpoints (`enc`, `dec`, `map_layer0`, ..; "64x64_block0" is a block at that size), so a state dict needs no translation.
"""

from collections.abc import Iterator, Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from .checks import check_tensor, complete_config
from .edm_blocks import AdmBlock, group_norm, noise_embedding
from .edm_configuration import check_edm_settings
from .edm_preconditioning import Preconditioning, noise_levels, preconditioning
from .initialization import Conv2d, Linear, default_generator, draw

BOTTLENECK = "encoder_bottleneck"
MIDBLOCK = "midblock"


def check_edm_config(**config) -> None:
    """Refuse an impossible configuration of EdmUNet without building it; settings left out have their defaults.

    Raises:
        ValueError: names the setting, its value and what to set instead.
    """
    check_edm_settings(complete_config(EdmUNet, config))


class EdmUNet(ModelMixin, ConfigMixin):
    """Class-conditional denoiser of images, and with DMD2's weights a generator of one step; the defaults are ImageNet 64x64.

    `model(images, sigma, labels)` is D(x; sigma). `generate` is DMD2's one step from noise. `feature_maps` runs the same step
    on images in place of the noise and returns maps inside.

    Layers: every block of `enc` and `dec` by its name ("enc.64x64_conv", .., "dec.64x64_block3"), each with one map [B,C,h,w];
    `encoder_bottleneck` is the encoder's last output ("enc.8x8_block2", [B,768,8,8]), which DMD2's discriminator reads;
    `midblock` is the decoder's first block, at the same size ("dec.8x8_in0"). `layer_modules` lists them with their modules.

    Its weights are drawn from a generator with seed 0, never from torch's global random state. There is no dropout: that
    belongs to the training of such a network, which is not offered here.

    Args:
        input_size: side of the square images, a multiple of 2^(levels - 1).
        in_channels: their channels; the output has as many.
        num_classes: M, classes; a row of zeros in place of a class is no class.
        model_channels: channels of a level are this times its entry in `channel_mult`; also the width of the noise embedding.
        channel_mult: one entry a level, from the full size on, each level half the size of the one before.
        num_blocks: blocks a level in the encoder; the decoder has one more.
        attention_resolutions: sides of the maps whose blocks have attention.
        num_head_channels: channels of a head.
        embedding_mult: E is this times `model_channels`.
        sigma_data: deviation of the images that the network was trained on.
        sigma_min: lowest noise level that the network is used at.
        sigma_max: highest, and the level of the one-step generator.

    Raises:
        ValueError: an impossible configuration, before anything is built.
    """

    _no_split_modules = ["AdmBlock"]
    _repeated_blocks = ["AdmBlock"]
    input_space = "pixel"
    default_features = (BOTTLENECK, MIDBLOCK)

    @register_to_config
    def __init__(
        self,
        input_size: int = 64,
        in_channels: int = 3,
        num_classes: int = 1000,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        num_blocks: int = 3,
        attention_resolutions: Sequence[int] = (32, 16, 8),
        num_head_channels: int = 64,
        embedding_mult: int = 4,
        sigma_data: float = 0.5,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
    ):
        super().__init__()
        check_edm_config(**self.config)
        self.input_size, self.in_channels = input_size, in_channels
        self.input_shape = (in_channels, input_size, input_size)
        embedding_channels = embedding_mult * model_channels
        self.map_layer0 = Linear(model_channels, embedding_channels)
        self.map_layer1 = Linear(embedding_channels, embedding_channels)
        self.map_label = Linear(num_classes, embedding_channels, bias=False)
        self._build_blocks(embedding_channels)
        self.out_norm = group_norm(model_channels * channel_mult[0])
        self.out_conv = Conv2d(model_channels * channel_mult[0], in_channels, 3, padding=1)
        self.map_names = (BOTTLENECK, MIDBLOCK, *self._block_names())
        self.initialize_weights()

    def _build_blocks(self, embedding_channels: int) -> None:
        """Make `enc` and `dec`: the encoder's outputs, each kept for the decoder, which takes them back in reverse."""
        config = self.config
        levels = [(config.input_size >> i, config.model_channels * factor) for i, factor in enumerate(config.channel_mult)]

        def block(channels: int, width: int, attends: bool = False, resampling: str | None = None) -> AdmBlock:
            return AdmBlock(channels, width, embedding_channels, width // config.num_head_channels * attends, resampling)

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        channels, kept = levels[0][1], []
        for level, (size, width) in enumerate(levels):
            if level == 0:
                self.enc[f"{size}x{size}_conv"] = Conv2d(config.in_channels, width, 3, padding=1)
            else:
                self.enc[f"{size}x{size}_down"] = block(channels, channels, resampling="down")
            kept.append(channels)
            for index in range(config.num_blocks):
                self.enc[f"{size}x{size}_block{index}"] = block(channels, width, size in config.attention_resolutions)
                channels = width
                kept.append(channels)
        for level, (size, width) in reversed(list(enumerate(levels))):
            if level == len(levels) - 1:
                self.dec[f"{size}x{size}_in0"] = block(channels, channels, attends=True)
                self.dec[f"{size}x{size}_in1"] = block(channels, channels)
            else:
                self.dec[f"{size}x{size}_up"] = block(channels, channels, resampling="up")
            for index in range(config.num_blocks + 1):
                joined = channels + kept.pop()
                self.dec[f"{size}x{size}_block{index}"] = block(joined, width, size in config.attention_resolutions)
                channels = width

    @torch.no_grad()
    def initialize_weights(self, generator: torch.Generator | None = None) -> None:
        """Set the initial weights; None draws from a CPU generator with seed 0.

        Weights and biases are uniform within 1 / sqrt(fan-in), the label embedding is normal; the last convolution of each
        block, its attention's projection and the output are zero, so that the blocks start as their shortcuts (ADM).
        """
        generator = default_generator() if generator is None else generator
        last = {self.out_conv}
        for block in self.modules():
            if isinstance(block, AdmBlock):
                last |= {block.conv1, block.proj} if block.num_heads else {block.conv1}
        for module in self.modules():
            if not isinstance(module, Conv2d | Linear):
                continue
            bound = module.weight[0].numel() ** -0.5
            for parameter in (parameter for parameter in (module.weight, module.bias) if parameter is not None):
                if module in last:
                    nn.init.zeros_(parameter)
                elif module is self.map_label:
                    draw(parameter, nn.init.normal_, generator)
                else:
                    draw(parameter, nn.init.uniform_, generator, a=-bound, b=bound)

    def _block_names(self) -> list[str]:
        return [f"{half}.{name}" for half in ("enc", "dec") for name in getattr(self, half)]

    def layer_modules(self) -> dict[str, str]:
        """{layer name: name of its module, for `get_submodule`}: the layers of `map_names`, and the blocks by their place.

        `encoder_block_N` and `decoder_block_N` count the blocks of a half from 0, the first convolution among them.
        """
        blocks = self._block_names()
        encoder = [name for name in blocks if name.startswith("enc.")]
        decoder = [name for name in blocks if name.startswith("dec.")]
        return {
            BOTTLENECK: encoder[-1],
            MIDBLOCK: decoder[0],
            **{name: name for name in blocks},
            **{f"encoder_block_{i}": name for i, name in enumerate(encoder)},
            **{f"decoder_block_{i}": name for i, name in enumerate(decoder)},
        }

    def forward(self, images: Tensor, sigma: Tensor | float, labels: Tensor | None = None) -> Tensor:
        """Denoise: D(x; sigma) of images with noise of deviation sigma (EDM, equation 7).

        Args:
            images: [B, C, H, W], clean images lie in [-1, 1].
            sigma: one number, () or [B], from sigma_min to sigma_max.
            labels: [B] int64 in [0, M), or one-hot rows [B, M], or None for no class.

        Returns:
            [B, C, H, W] in float32 (float64 for float64 images and weights).

        Raises:
            ValueError: an input of the wrong shape or dtype, a noise level outside of the range, or an unknown class.
        """
        levels = self._levels(images, sigma)
        inputs, embedding, factors = self._prepare(images, levels, labels)
        for _, x in self._blocks(inputs, embedding):  # noqa: B007 the last map is the decoder's
            pass
        output = self.out_conv(F.silu(self.out_norm(x))).to(factors.skip.dtype)  # [B,C,H,W]
        return _each(factors.skip) * images + _each(factors.output) * output

    def generate(self, noise: Tensor, labels: Tensor | None) -> Tensor:
        """One step from standard normal noise [B,C,H,W] to images [B,C,H,W]: D(sigma_max noise; sigma_max) (DMD2).

        Images lie in [-1, 1] up to what the network oversteps. `labels` and errors as for `forward`.
        """
        return self(self.config.sigma_max * noise, self.config.sigma_max, labels)

    def feature_maps(
        self,
        images: Tensor,
        names: Sequence[str] | None = None,
        *,
        labels: Tensor | None = None,
        sigma: Tensor | float | None = None,
    ) -> dict[str, Tensor]:
        """Maps inside the network for images [B,C,H,W] in [-1, 1] in place of the noise, by name, each [B,C,h,w].

        The images are multiplied with sigma, as noise of one step would be (None: sigma_max). Blocks after the last map that
        is asked for are not computed.

        Args:
            names: names of `layer_modules`; None means all of `map_names`.

        Raises:
            ValueError: an unknown name, or as `forward`.
        """
        modules, names = self.layer_modules(), self.map_names if names is None else tuple(names)
        unknown = [name for name in names if name not in modules]
        if unknown:
            raise ValueError(f"no layer is called {unknown}; this network has {list(self.map_names)}")
        levels = self._levels(images, self.config.sigma_max if sigma is None else sigma)
        inputs, embedding, _ = self._prepare(_each(levels) * images, levels, labels)
        wanted, maps = {modules[name] for name in names}, {}
        for name, x in self._blocks(inputs, embedding) if wanted else ():
            if name in wanted:
                maps[name] = x
            if len(maps) == len(wanted):
                break
        return {name: maps[modules[name]] for name in names}

    def _levels(self, images: Tensor, sigma: Tensor | float) -> Tensor:
        """The noise level of each image, [B]."""
        check_tensor("images", images, (None, *self.input_shape), "float")
        return noise_levels(sigma, images, self.config.sigma_min, self.config.sigma_max)

    def _prepare(self, images: Tensor, levels: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Preconditioning]:
        """The network's input [B,C,H,W] and embedding [B,E] in the type of its weights, and the factors, each [B]."""
        factors = preconditioning(levels, self.config.sigma_data)
        dtype = self.map_layer0.weight.dtype
        embedding = noise_embedding(factors.noise, self.config.model_channels).to(dtype)  # [B, model_channels]
        embedding = self.map_layer1(F.silu(self.map_layer0(embedding)))  # [B,E]
        if labels is not None:
            embedding = embedding + self.map_label(self._one_hot(labels, len(images)).to(dtype))  # [B,E]
        return (_each(factors.input) * images).to(dtype), F.silu(embedding), factors

    def _one_hot(self, labels: Tensor, count: int) -> Tensor:
        """Labels as rows [B, M]."""
        num_classes = self.config.num_classes
        if not isinstance(labels, Tensor) or labels.ndim == 2:
            check_tensor("labels", labels, (count, num_classes), "mask")
            return labels
        check_tensor("labels", labels, (count,), "index")
        if not labels.is_meta and count and not 0 <= labels.min() <= labels.max() < num_classes:
            raise ValueError(f"labels run from {labels.min()} to {labels.max()}; this network has classes 0 to {num_classes - 1}")
        return F.one_hot(labels.long(), num_classes)

    def _blocks(self, x: Tensor, embedding: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Run the blocks in order: (name, map) of each. The decoder's last map is what the output is made from."""
        kept = []
        for name, block in self.enc.items():
            x = block(x, embedding) if isinstance(block, AdmBlock) else block(x)
            kept.append(x)
            yield f"enc.{name}", x
        for name, block in self.dec.items():
            if "_block" in name:
                x = torch.cat([x, kept.pop()], dim=1)
            x = block(x, embedding)
            yield f"dec.{name}", x


def _each(factor: Tensor) -> Tensor:
    """A factor [B] for every value of its image: [B,1,1,1]."""
    return factor[:, None, None, None]
