"""Several feature encoders at once: whose keys are whose, what each weighs, and the decoder between latents and pixels.

Shapes: B images, T locations and S features of a key. Source: arXiv 2602.04770, pixel-space recipes (masked autoencoder and
ConvNeXt-V2, losses summed) and encoder study (pixel encoders behind the VAE's decoder).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from drift_accel.drift.features import FeatureConfig, multi_scale_features
from drift_accel.models.encoder_configuration import EncoderConfig, check_name_and_weight, load_encoder

GLOBAL_KEY = "global"  # belongs to the training step, which adds it once
SEPARATOR = "/"


@dataclass(frozen=True)
class EncoderSpec:
    """One encoder of a step: its keys are `name/key` where there are several encoders, and weigh `weight` in the loss.

    `decoder` turns the generator's latents [B,C,h,w] into the images that a pixel encoder sees, with a gradient (VaeDecoder);
    None gives the generator's output to the encoder as it is.

    Raises ValueError for a name that is empty or holds "/", a weight that is not positive, and a decoder before an encoder of
    latents.
    """

    name: str
    encoder: nn.Module
    features: FeatureConfig = field(default_factory=FeatureConfig)
    weight: float = 1.0
    decoder: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self):
        check_name_and_weight(self.name, self.weight)
        if self.decoder is not None and getattr(self.encoder, "input_space", "pixel") == "latent":
            raise ValueError(f"encoder {self.name} takes latents, and a decoder makes pixels: leave the decoder out")


@dataclass(frozen=True, kw_only=True)
class EncoderEntryConfig(EncoderConfig):
    """One more feature encoder, with its own choice of features. Raises ValueError for values that cannot work."""

    features: FeatureConfig = field(default_factory=FeatureConfig)
    """Which keys are made of its maps."""


def as_specs(
    encoders: nn.Module | EncoderSpec | Sequence[EncoderSpec], features: FeatureConfig | None = None
) -> tuple[EncoderSpec, ...]:
    """One encoder (with `features`), one spec or several as a tuple of specs.

    Raises ValueError for no spec, two of one name, and `features` beside specs, which have their own.
    """
    if isinstance(encoders, nn.Module) or hasattr(encoders, "feature_maps"):
        return (EncoderSpec("encoder", encoders, FeatureConfig() if features is None else features),)
    specs = (encoders,) if isinstance(encoders, EncoderSpec) else tuple(encoders)
    if not specs:
        raise ValueError("there is no encoder: give one, or at least one EncoderSpec")
    if features is not None:
        raise ValueError("features are given beside EncoderSpecs: set the features of each spec instead")
    require_different([spec.name for spec in specs])
    return specs


def require_different(names: Sequence[str]) -> None:
    """Raise ValueError where two encoders have one name."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"encoders are called {twice} more than once: their keys would be mixed up, give each its own name")


def has_decoder(specs: Sequence[EncoderSpec]) -> bool:
    """Whether any encoder stands behind a decoder."""
    return any(spec.decoder is not None for spec in specs)


def decoded_images(specs: Sequence[EncoderSpec], images: Tensor) -> dict[int, Tensor]:
    """What each decoder before an encoder makes of `images` [B,C,h,w], by its id: a decoder that specs share runs once."""
    decoders = {id(spec.decoder): spec.decoder for spec in specs if spec.decoder is not None}
    return {key: decoder(images) for key, decoder in decoders.items()}


def encoder_features(
    specs: Sequence[EncoderSpec], images: Tensor, decoded: Mapping[int, Tensor] | None = None
) -> dict[str, Tensor]:
    """Every key of every encoder for the generator's output or real samples `images` [B,C,H,W]: {key: [B,T,S]}.

    Without `global`. One encoder's keys have no prefix; of several they are `name/key`, in the order of the specs. `decoded` are
    `decoded_images` where they are there already. Raises ValueError for what `multi_scale_features` refuses and for a key called
    `global`.
    """
    decoded = decoded_images(specs, images) if decoded is None else decoded
    features: dict[str, Tensor] = {}
    for spec in specs:
        seen = images if spec.decoder is None else decoded[id(spec.decoder)]
        keys = multi_scale_features(spec.encoder, seen, spec.features)
        if GLOBAL_KEY in keys:
            raise ValueError(f"encoder {spec.name} makes a key {GLOBAL_KEY!r}, which is the generator's output: rename its map")
        features.update({_prefix(specs, spec) + key: value for key, value in keys.items()})
    return features


def key_weight(specs: Sequence[EncoderSpec], key: str) -> float:
    """What a key's loss is multiplied by: the weight of its encoder, 1 for `global`.

    Raises ValueError for a key of no encoder.
    """
    if key == GLOBAL_KEY:
        return 1.0
    for spec in specs:
        if key.startswith(_prefix(specs, spec)):
            return spec.weight
    raise ValueError(f"{key} is no key of the encoders {', '.join(spec.name for spec in specs)}")


def _prefix(specs: Sequence[EncoderSpec], spec: EncoderSpec) -> str:
    return spec.name + SEPARATOR if len(specs) > 1 else ""


def load_specs(
    encoder: EncoderConfig,
    features: FeatureConfig,
    more: Sequence[EncoderEntryConfig] = (),
    decoder: nn.Module | None = None,
) -> tuple[EncoderSpec, ...]:
    """Load the encoder with its features and `more` encoders with theirs; `decoder` goes before the encoders of pixels alone.

    Raises ValueError for two of one name, before anything is loaded, and what load_encoder raises.
    """
    entries = [(encoder, features), *((entry, entry.features) for entry in more)]
    require_different([config.name for config, _ in entries])
    specs = []
    for config, choice in entries:
        loaded = load_encoder(config)
        needed = decoder if loaded.input_space == "pixel" else None
        specs.append(EncoderSpec(config.name, loaded, choice, config.weight, needed))
    return tuple(specs)


def check_encoder_inputs(specs: Sequence[EncoderSpec], image_shape: tuple[int, int, int], *, latents: bool) -> None:
    """Raise ValueError where an encoder cannot see what a generator of images [C,H,W] (`latents`: of latents) makes."""
    for spec in specs:
        space = getattr(spec.encoder, "input_space", None)
        if latents and space == "pixel" and spec.decoder is None:
            raise ValueError(
                f"encoder {spec.name} takes pixels and the generator makes latents: set decoder.vae to the VAE that made them"
            )
        if not latents and spec.decoder is not None:
            raise ValueError(
                f"encoder {spec.name} stands behind a decoder, and the generator makes pixels: leave decoder.vae out"
            )
        channels = getattr(spec.encoder, "in_channels", None)
        if spec.decoder is None and channels is not None and channels != image_shape[0]:
            raise ValueError(f"encoder {spec.name} takes {channels} channels but the generator makes {image_shape[0]}")
        patch = getattr(spec.encoder, "input_patch_size", 1)
        if spec.decoder is None and any(side % patch for side in image_shape[1:]):
            raise ValueError(
                f"encoder {spec.name} patchifies by {patch}, which does not divide the generator's {image_shape[1:]}"
            )
        side = getattr(getattr(spec.encoder, "config", None), "input_size", None)  # of a masked autoencoder
        if spec.decoder is None and side is not None and tuple(image_shape[1:]) != (side, side):
            raise ValueError(
                f"encoder {spec.name} was made for input_size {side} but the generator makes {tuple(image_shape[1:])}: give an "
                "encoder that was trained at that size"
            )
