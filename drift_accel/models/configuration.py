"""What the trainers' configuration files say about models: a preset by name, and any of its values changed."""

from dataclasses import dataclass, fields
from typing import Any

from drift_accel.models.encoder_configuration import DecoderConfig, EncoderConfig, load_decoder, load_encoder

__all__ = [
    "DecoderConfig",
    "EncoderConfig",
    "GeneratorConfig",
    "MaskedAutoencoderConfig",
    "load_decoder",
    "load_encoder",
    "with_group",
]


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """The generator to train; null takes the preset's value, then the model's default.

    Raises ValueError for an unknown preset and whatever `check_generator_config` refuses.
    """

    preset: str | None = None
    """"tiny", "B/2", "L/2", "B/16" or "L/16"; null: none."""
    input_size: int | None = None
    """Side of the image or latent."""
    in_channels: int | None = None
    """Channels of the image or latent."""
    patch_size: int | None = None
    """Side of a patch; it must divide input_size."""
    hidden_size: int | None = None
    """Width of the transformer, a multiple of num_heads and of 4."""
    depth: int | None = None
    """Number of blocks."""
    num_heads: int | None = None
    """Attention heads."""
    num_classes: int | None = None
    """Classes of the label embedding."""
    style_codebook_size: int | None = None
    """Entries of each style coordinate's codebook."""
    num_style_tokens: int | None = None
    """Style coordinates; 0 turns styles off."""
    num_context_tokens: int | None = None
    """Tokens of the condition before the image tokens."""
    condition_size: int | None = None
    """Width of the condition; null: hidden_size."""
    mlp_ratio: float | None = None
    """Width of the feed-forward layers relative to hidden_size, before the gate's 2/3."""

    def __post_init__(self):
        from drift_accel.models.generator import GENERATOR_PRESETS, check_generator_config

        _require_preset("generator", self.preset, GENERATOR_PRESETS)
        with_group("generator", check_generator_config, self.arguments())

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of Generator that differ from its defaults."""
        from drift_accel.models.generator import GENERATOR_PRESETS

        return _merge(GENERATOR_PRESETS, self)

    def resolved(self) -> dict[str, Any]:
        """Every keyword argument of Generator, defaults included."""
        from drift_accel.models.checks import complete_config
        from drift_accel.models.generator import Generator

        return complete_config(Generator, self.arguments())


@dataclass(frozen=True, kw_only=True)
class MaskedAutoencoderConfig:
    """The masked autoencoder to train; null takes the preset's value, then the model's default.

    Raises ValueError for an unknown preset and whatever `check_mae_config` refuses.
    """

    preset: str | None = None
    """"tiny", "latent-256", "latent-640" or "pixel-640"; null: none."""
    in_channels: int | None = None
    """Channels of the image or latent."""
    width: int | None = None
    """Channels of the first stage; the four stages have 1, 2, 4 and 8 times as many."""
    blocks: tuple[int, int, int, int] | None = None
    """Residual blocks of the four stages."""
    num_classes: int | None = None
    """Classes of the classifier."""
    mask_patch_size: int | None = None
    """Side of a masked patch, in positions of the encoder's grid."""
    input_patch_size: int | None = None
    """Pixels a side that are stacked into channels before the encoder; 1 leaves the input as it is."""
    input_size: int | None = None
    """Side of the image or latent."""

    def __post_init__(self):
        from drift_accel.models.masked_autoencoder import MAE_PRESETS, check_mae_config

        _require_preset("mae", self.preset, MAE_PRESETS)
        with_group("mae", check_mae_config, self.arguments())

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of MaskedAutoencoder that differ from its defaults."""
        from drift_accel.models.masked_autoencoder import MAE_PRESETS

        return _merge(MAE_PRESETS, self)

    def resolved(self) -> dict[str, Any]:
        """Every keyword argument of MaskedAutoencoder, defaults included."""
        from drift_accel.models.checks import complete_config
        from drift_accel.models.masked_autoencoder import MaskedAutoencoder

        return complete_config(MaskedAutoencoder, self.arguments())


def with_group(group: str, check, arguments: dict[str, Any]) -> None:
    """Run `check(**arguments)`, naming the configuration group in what it refuses."""
    try:
        check(**arguments)
    except ValueError as error:
        raise ValueError(f"{group}: {error}") from None


def _require_preset(group: str, preset: str | None, presets: dict[str, dict]) -> None:
    if preset is not None and preset not in presets:
        raise ValueError(f"{group}.preset is {preset!r}: choose one of {', '.join(presets)}, or null")


def _merge(presets: dict[str, dict], config) -> dict[str, Any]:
    given = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "preset"}
    return {**presets.get(config.preset, {}), **{name: value for name, value in given.items() if value is not None}}
