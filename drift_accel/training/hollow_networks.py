"""The frozen networks of a recipe with weights of no meaning, from their descriptions alone: enough to count what they cost."""

import warnings
from dataclasses import replace
from pathlib import Path

from torch import nn

from drift_accel.drift.encoders import EncoderSpec
from drift_accel.models.autoencoder import vae_location
from drift_accel.models.vae_decoder import VaeDecoder

# AutoencoderKL's settings of stabilityai/sd-vae-ft-mse and -ema, the VAEs of the published latents.
STABLE_DIFFUSION_VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
}


def load_hollow_encoders(config, preset: str | None = None) -> tuple[EncoderSpec, ...]:
    """The architectures of a recipe's encoders, and of the decoder before those of pixels; `preset`: the first encoder's, of a
    masked autoencoder.

    Raises ValueError and FileNotFoundError as `load_hollow_encoder`.
    """
    decoder = load_hollow_decoder(config.decoder)
    entries = [(config.encoder, config.features, preset), *((entry, entry.features, None) for entry in config.more_encoders)]
    specs = []
    for entry, features, architecture in entries:
        encoder = load_hollow_encoder(entry, architecture)
        specs.append(
            EncoderSpec(entry.name, encoder, features, entry.weight, decoder if encoder.input_space == "pixel" else None)
        )
    return tuple(specs)


def load_hollow_decoder(config) -> VaeDecoder | None:
    """The configured decoder; a VAE that does not lie on this disk is taken for Stable Diffusion's, with a warning."""
    from diffusers import AutoencoderKL

    if config.vae is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            settings = AutoencoderKL.load_config(vae_location(config.vae), revision=config.revision, local_files_only=True)
    except OSError:
        warnings.warn(f"decoder.vae {config.vae} is not on this disk: estimated as Stable Diffusion's VAE", stacklevel=2)
        settings = STABLE_DIFFUSION_VAE
    vae = AutoencoderKL.from_config(settings)
    return VaeDecoder(vae, batch=config.batch, checkpointing=config.checkpointing, dtype=config.dtype)


def load_hollow_encoder(config, preset: str | None = None) -> nn.Module:
    """The configured encoder's architecture with weights of no meaning, or a masked autoencoder's preset.

    A ConvNeXt-V2 whose folder is not there is taken for the base model, as in the published recipes.

    Raises ValueError for an unknown preset, FileNotFoundError where the folder's description is not there.
    """
    from drift_accel.models.encoder_configuration import load_encoder
    from drift_accel.models.masked_autoencoder import MAE_PRESETS, MaskedAutoencoder

    described = (Path(config.path) / "config.json").exists()
    preset = config.preset if preset is None and not described else preset
    if preset is not None:
        if preset not in MAE_PRESETS:
            raise ValueError(f"the encoder's preset is {preset!r}: choose one of {', '.join(MAE_PRESETS)}")
        return MaskedAutoencoder(**MAE_PRESETS[preset]).eval().requires_grad_(False)
    if config.kind == "mae" and not described:
        raise FileNotFoundError(
            f"encoder.path {config.path} has no config.json: give the encoder's architecture, one of {', '.join(MAE_PRESETS)} "
            "(--encoder)"
        )
    if config.kind == "convnextv2" and not described:
        return _base_convnext(config)
    if config.kind != "code":
        config = replace(config, random=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_encoder(config)


def _base_convnext(config) -> nn.Module:
    from transformers import ConvNextV2Config, ConvNextV2Model

    from drift_accel.models.convnext import ConvNextV2Encoder
    from drift_accel.models.transformers_folder import undrawn_network

    network = undrawn_network(ConvNextV2Model, ConvNextV2Config(depths=[3, 3, 27, 3], hidden_sizes=[128, 256, 512, 1024]))
    return ConvNextV2Encoder(network, **({} if config.image_size is None else {"image_size": config.image_size}))
