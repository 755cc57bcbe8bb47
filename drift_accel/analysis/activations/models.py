"""The networks whose activations are taken, each behind the same few methods: what it takes, what it has, one pass.

Shapes: B samples of a pass, C, H, W of the model's input. `feed` says what the model gets: "images", or, for models that make
images, "noise".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from drift_accel.analysis.activations.layer_capture import as_activations, captured, probe_modules
from drift_accel.data.class_table import ClassTable
from drift_accel.data.row_encoders import weights_hash
from drift_accel.models.masked_autoencoder import MaskedAutoencoder
from drift_accel.models.pixel_encoder import PixelEncoder
from drift_accel.sampling.draws import sample_styles
from drift_accel.sampling.trained import TrainedGenerator, align_memory

PROBE_BATCH, PROBE_SIDE = 2, 64
_PROBE = (np.zeros(PROBE_BATCH, dtype=np.int64), range(PROBE_BATCH))  # labels and indices; only shapes are looked at
IMAGES, NOISE = "images", "noise"


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """What a model takes."""

    space: str
    """"latent" or "pixel"."""
    channels: int
    size: int | None
    """Side; None: any, the model resizes."""


class ActivationModel:
    """A frozen network in evaluation mode with named layers; its weights decide `identity`.

    `num_classes` is None for a model that takes no labels; `table` names its classes where that is known.
    """

    num_classes: int | None = None
    table: ClassTable | None = None

    def __init__(self, module: nn.Module, spec: InputSpec, origin: Mapping[str, Any], device: torch.device | str):
        self.module, self.spec, self.device = module.eval().requires_grad_(False), spec, torch.device(device)
        align_memory(module)
        self.origin = {**origin, "weights_sha256": origin.get("weights_sha256") or weights_hash(module)}
        module.to(self.device)

    def identity(self) -> dict[str, Any]:
        """What decides the activations, in plain values."""
        spec = {"space": self.spec.space, "channels": self.spec.channels, "size": self.spec.size}
        return {"class": type(self.module).__name__, **self.origin, "input": spec, "device": self.device.type}

    def feature_keys(self) -> tuple[str, ...]:
        """Names that the model itself gives to its layers; `run` returns these."""
        return ()

    def split(self, layers: Sequence[str]) -> tuple[tuple[str, ...], dict[str, str]]:
        """(layers that `run` returns, layer name -> dotted name of the module whose output is taken by a hook)."""
        keys = tuple(name for name in layers if name in self.feature_keys())
        return keys, {name: name for name in layers if name not in keys}

    def layer_shapes(self, side: int | None = None) -> dict[str, tuple[int, ...]]:
        """The full shape of one sample of every layer that can be taken, feature keys first. Runs the model twice.

        `side`: of the inputs, where the model takes any.
        """
        side = self.spec.size or side or PROBE_SIDE
        inputs = torch.zeros((PROBE_BATCH, self.spec.channels, side, side), device=self.device)
        shapes = {}
        with torch.inference_mode():
            for name, found in self.run(inputs, *_PROBE, self.feature_keys(), whole=False).items():
                shapes[name] = tuple(as_activations(found, name, PROBE_BATCH, False).shape[1:])
            names = [name for name, _ in self.module.named_modules() if name and name not in shapes]
            modules = probe_modules(self.module, lambda: self.run(inputs, *_PROBE, (), whole=True), PROBE_BATCH, names)
        return {**shapes, **modules}

    def compute(
        self, layers: Sequence[str], inputs: Tensor, labels: np.ndarray, indices: Sequence[int], pooled: bool
    ) -> dict[str, np.ndarray]:
        """Float32 arrays [B,C] or [B,C,H,W] by layer of inputs [B,C,H,W] in model space, labels [B] and sample indices [B].

        Raises ValueError for a layer that there is not, or that cannot be taken.
        """
        keys, modules = self.split(layers)
        # The same algorithm always, in full precision: a set is resumed, and compared with others.
        exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        with torch.inference_mode(), exact, captured(self.module, modules, len(inputs), pooled) as found:
            maps = self.run(inputs.to(self.device), labels, indices, keys, whole=bool(modules))
            for name in keys:
                found[name] = as_activations(maps[name], name, len(inputs), pooled)
        missing = [name for name in layers if name not in found]
        if missing:
            raise ValueError(f"layer {missing[0]} did not run: --list_layers shows those that do")
        return {name: found[name].cpu().numpy() for name in layers}

    def run(
        self, inputs: Tensor, labels: np.ndarray, indices: Sequence[int], keys: Sequence[str], *, whole: bool
    ) -> Mapping[str, Tensor]:
        """A pass; returns the maps of `keys`. With `whole` every module runs, else what `keys` do not need may be left out."""
        raise NotImplementedError


class EncoderModel(ActivationModel):
    """Any feature encoder: images in, maps by name, and its modules."""

    def __init__(self, encoder: nn.Module, origin: Mapping[str, Any], device: torch.device | str):
        channels = getattr(encoder, "in_channels", 4 if encoder.input_space == "latent" else 3)
        config = getattr(encoder, "config", None)
        size = getattr(config, "input_size", None) if config is not None else getattr(encoder, "input_size", None)
        # A masked autoencoder of one channel calls its images latents unless it was told; they are grey pictures.
        told = getattr(config, "input_space", None) or (None if isinstance(encoder, MaskedAutoencoder) else encoder.input_space)
        space = told or ("pixel" if channels in (1, 3) else "latent")
        super().__init__(encoder, InputSpec(space=space, channels=channels, size=size), origin, device)

    def identity(self) -> dict[str, Any]:
        """Also what the encoder does to pixels before its network."""
        more = {"network_input_size": self.module.image_size} if isinstance(self.module, PixelEncoder) else {}
        return {**super().identity(), **more}

    def feature_keys(self) -> tuple[str, ...]:
        """The maps of `feature_maps`."""
        return tuple(self.module.map_names)

    def run(self, inputs, labels, indices, keys, *, whole):
        """`feature_maps`."""
        return self.module.feature_maps(inputs, None if whole else list(keys))


class GeneratorModel(ActivationModel):
    """Our generator: images or latents in place of its noise, or the noise itself; label, guidance and styles as in sampling."""

    def __init__(self, trained: TrainedGenerator, *, guidance_scale: float, seed: int, device: torch.device | str):
        if not 1 <= guidance_scale < float("inf"):
            raise ValueError(f"--guidance_scale is {guidance_scale}: guidance starts at 1 (no guidance)")
        config = trained.generator.config
        space = "latent" if trained.makes_latents else "pixel"
        spec = InputSpec(space=space, channels=config.in_channels, size=config.input_size)
        self.trained, self.guidance_scale, self.seed = trained, float(guidance_scale), seed
        self.num_classes, self.table = config.num_classes, trained.table
        super().__init__(trained.generator, spec, trained.origin, device)

    def identity(self) -> dict[str, Any]:
        """Also guidance and the seed of the style indices."""
        return {**super().identity(), "guidance_scale": self.guidance_scale, "style_seed": self.seed}

    def run(self, inputs, labels, indices, keys, *, whole):
        """One generation."""
        styles = sample_styles(self.module.config, self.seed, indices).to(self.device)
        guidance = torch.full((len(inputs),), self.guidance_scale, device=self.device)
        self.module(inputs, torch.as_tensor(labels, device=self.device), guidance, styles)
        return {}


class EdmModel(ActivationModel):
    """An EDM or DMD2 UNet: the input scaled by sigma, that sigma, the label as one-hot row (one step of DMD2)."""

    def __init__(self, unet: nn.Module, origin: Mapping[str, Any], *, sigma: float | None, device: torch.device | str):
        config = unet.config
        sigma = config.sigma_max if sigma is None else sigma
        if not config.sigma_min <= sigma <= config.sigma_max:
            raise ValueError(
                f"--sigma is {sigma}: give a noise level of the UNet, {config.sigma_min:g} to {config.sigma_max:g} (default: the "
                "highest, where DMD2's one step begins)"
            )
        self.sigma, self.num_classes = float(sigma), config.num_classes
        super().__init__(unet, InputSpec(space="pixel", channels=config.in_channels, size=config.input_size), origin, device)

    def identity(self) -> dict[str, Any]:
        """Also sigma."""
        return {**super().identity(), "sigma": self.sigma}

    def feature_keys(self) -> tuple[str, ...]:
        """The encoder's output, the midblock and every block."""
        return tuple(self.module.layer_modules())

    def split(self, layers):
        """Blocks alone are returned by a pass that ends with the last of them; beside other modules they are hooked too."""
        blocks = self.module.layer_modules()
        if all(name in blocks for name in layers):
            return tuple(layers), {}
        return (), {name: blocks.get(name, name) for name in layers}

    def run(self, inputs, labels, indices, keys, *, whole):
        """The maps of `keys`, or one whole denoising."""
        labels = torch.as_tensor(labels, device=self.device)
        if whole:
            self.module(self.sigma * inputs, self.sigma, labels)
            return {}
        return self.module.feature_maps(inputs, list(keys), labels=labels, sigma=self.sigma)


def default_layers(model: ActivationModel) -> tuple[str, ...]:
    """The model's own choice: an encoder's last map, a UNet's bottleneck and midblock. Raises ValueError where it has none."""
    default = tuple(getattr(model.module, "default_features", ()))
    if not default:
        raise ValueError(f"name the layers of {type(model.module).__name__} with --layers; --list_layers shows them")
    return default if isinstance(model, EdmModel) else tuple(model.module.map_names[-1:])
