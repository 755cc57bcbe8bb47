"""Models: the generator, the masked autoencoder, the release's weights. Each loads its libraries on first use."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .convnext import ConvNextV2Encoder, load_convnext
    from .dinov2 import Dinov2Encoder, load_dinov2
    from .edm_checkpoint import load_edm_unet
    from .edm_unet import EdmUNet, check_edm_config
    from .generator import GENERATOR_PRESETS, Generator, check_generator_config
    from .masked_autoencoder import MAE_PRESETS, MaeLoss, MaskedAutoencoder, check_mae_config, expand_mask
    from .official import load_official
    from .pretrained_resnet import PretrainedResNet, load_resnet
    from .vae_decoder import VaeDecoder

_HOMES = {
    "ConvNextV2Encoder": "convnext",
    "load_convnext": "convnext",
    "Dinov2Encoder": "dinov2",
    "load_dinov2": "dinov2",
    "load_edm_unet": "edm_checkpoint",
    "EdmUNet": "edm_unet",
    "check_edm_config": "edm_unet",
    "GENERATOR_PRESETS": "generator",
    "Generator": "generator",
    "check_generator_config": "generator",
    "MAE_PRESETS": "masked_autoencoder",
    "MaeLoss": "masked_autoencoder",
    "MaskedAutoencoder": "masked_autoencoder",
    "check_mae_config": "masked_autoencoder",
    "expand_mask": "masked_autoencoder",
    "load_official": "official",
    "PretrainedResNet": "pretrained_resnet",
    "load_resnet": "pretrained_resnet",
    "VaeDecoder": "vae_decoder",
}

__all__ = [
    "GENERATOR_PRESETS",
    "MAE_PRESETS",
    "ConvNextV2Encoder",
    "Dinov2Encoder",
    "EdmUNet",
    "Generator",
    "MaeLoss",
    "MaskedAutoencoder",
    "PretrainedResNet",
    "VaeDecoder",
    "check_edm_config",
    "check_generator_config",
    "check_mae_config",
    "expand_mask",
    "load_convnext",
    "load_dinov2",
    "load_edm_unet",
    "load_official",
    "load_resnet",
]


def __getattr__(name: str):
    """Import the module that holds `name` when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted(__all__)
