"""What configuration files say about feature encoders and the VAE decoder before them, and loading what they say."""

import warnings
from dataclasses import dataclass
from pathlib import Path

ENCODER_KINDS = ("mae", "convnextv2", "resnet", "dinov2", "code")
# Settings that belong to some kinds alone.
_SETTINGS_OF_KINDS = {
    "architecture": ("resnet",),
    "weights": ("resnet",),
    "normalization": ("resnet",),
    "image_size": ("convnextv2", "resnet", "dinov2"),
    "blocks": ("dinov2",),
    "allow_code": ("code",),
    "preset": ("mae",),
    "random": ("mae", "convnextv2", "resnet", "dinov2"),
}
_PATHS_OF_KINDS = {
    "mae": "the folder of a trained masked autoencoder",
    "convnextv2": "the folder of a ConvNeXt-V2 in the format of transformers",
    "resnet": "the file of a ResNet's weights",
    "dinov2": "the folder of a DINOv2 in the format of transformers",
    "code": "the module:function that makes the encoder",
}


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """A feature encoder of the drift; a path alone means a masked autoencoder. Raises ValueError for values that cannot work."""

    path: str = ""
    """mae: folder of train_mae's export or of an artifact of the official release; convnextv2, dinov2: folder in the format of
    transformers; resnet: file of weights; code: module:function."""
    kind: str = "mae"
    """"mae" (ours), "convnextv2", "resnet", "dinov2" or "code" (a function of your own, see models/code_encoder.py)."""
    name: str = "encoder"
    """Stands before the encoder's keys where there are several."""
    weight: float = 1.0
    """What its keys' losses are multiplied by."""
    preset: str | None = None
    """mae: what path must hold, "latent-256", "latent-640", "pixel-640" or "tiny"; null: any that fits the generator."""
    architecture: str | None = None
    """resnet: "resnet18" or "resnet50"."""
    weights: str | None = None
    """resnet: who wrote the file: "supervised" (torchvision, timm), "moco_v2" or "simclr"."""
    normalization: str | None = None
    """resnet: what the weights were trained on, "imagenet" (mean and deviation) or "unit" (colours in [0, 1]); null: imagenet
    for supervised and moco_v2, to be given for simclr."""
    image_size: int | None = None
    """convnextv2, resnet, dinov2: side that images are resized to; null: 224."""
    blocks: tuple[int, ...] | None = None
    """dinov2: the blocks whose tokens are used, from 1; null: four, evenly spaced."""
    allow_code: bool = False
    """Allow kind code to run the function that path names, with all rights of this process."""
    random: bool = False
    """Random weights, for tests: mae, convnextv2 and dinov2 need their folder's config.json alone, resnet nothing."""

    def __post_init__(self):
        check_encoder_config(self)


def check_encoder_config(config: EncoderConfig) -> None:
    """Refuse an encoder that cannot be loaded, without looking at files.

    Raises:
        ValueError: names the setting, its value and what to set instead.
    """
    from drift_accel.models.masked_autoencoder import MAE_PRESETS
    from drift_accel.models.pixel_encoder import NORMALIZATIONS
    from drift_accel.models.pretrained_resnet import ARCHITECTURES
    from drift_accel.models.resnet_checkpoints import LAYOUTS

    if config.kind not in ENCODER_KINDS:
        raise ValueError(f"encoder.kind is {config.kind!r}: choose one of {', '.join(ENCODER_KINDS)}")
    for name, kinds in _SETTINGS_OF_KINDS.items():
        if getattr(config, name) not in (None, False) and config.kind not in kinds:
            raise ValueError(
                f"encoder.{name} is {getattr(config, name)!r}, which belongs to kind {', '.join(kinds)}, not {config.kind}: "
                "leave it out"
            )
    if config.preset not in (None, *MAE_PRESETS):
        raise ValueError(f"encoder.preset is {config.preset!r}: choose one of {', '.join(MAE_PRESETS)}, or null for any encoder")
    if not config.path and not (config.kind == "resnet" and config.random):
        raise ValueError(f"encoder.path is empty: give {_PATHS_OF_KINDS[config.kind]}")
    if config.kind == "code" and not config.allow_code:
        raise ValueError(
            f"encoder.kind code would run {config.path} with all rights of this process: read that code, then set "
            "encoder.allow_code to true"
        )
    if config.kind == "resnet":
        for name, choices in (("architecture", ARCHITECTURES), ("weights", tuple(LAYOUTS))):
            if getattr(config, name) not in choices:
                raise ValueError(f"encoder.{name} is {getattr(config, name)!r}: choose one of {', '.join(choices)}")
        if config.normalization not in (None, *NORMALIZATIONS):
            raise ValueError(f"encoder.normalization is {config.normalization!r}: choose one of {', '.join(NORMALIZATIONS)}")
        if config.weights == "simclr" and config.normalization is None:
            raise ValueError(
                "encoder.normalization is null: SimCLR weights differ, so say what they were trained on: 'unit' for the original "
                "and its conversions, sthalles, Spijkervet and AndrewAtanov, 'imagenet' for vissl and solo-learn"
            )
    if config.image_size is not None and config.image_size < 1:
        raise ValueError(f"encoder.image_size is {config.image_size}: give a side in pixels, or null for 224")
    blocks = config.blocks
    if blocks is not None and (not blocks or len(set(blocks)) != len(blocks) or min(blocks) < 1):
        raise ValueError(f"encoder.blocks is {config.blocks}: list each block once, counted from 1, or null for four")
    check_name_and_weight(config.name, config.weight)


def check_name_and_weight(name: str, weight: float) -> None:
    """Raise ValueError for a name that cannot stand before keys (`name/key`), or a weight that is not positive and finite."""
    if not isinstance(name, str) or not name or "/" in name or name == "global":
        raise ValueError(f"encoder.name is {name!r}: give a name without '/' that is not 'global'")
    if not 0 < weight < float("inf"):
        raise ValueError(f"encoder.weight of {name} is {weight}: give a positive number, or leave the encoder out")


def load_encoder(config: EncoderConfig):
    """Load the configured encoder in evaluation mode, without gradients for its weights.

    Weights are never random unless `config.random` says so, which warns.

    Raises FileNotFoundError saying what belongs there and where to get it, OSError for weights that cannot be read, ValueError
    for a folder of another kind or weights that do not fit its configuration.
    """
    if config.random:
        warnings.warn(
            f"encoder {config.name} ({config.kind}) has RANDOM WEIGHTS, as encoder.random asks: good for tests, its features "
            "mean nothing",
            stacklevel=2,
        )
    encoder = _LOADERS[config.kind](config)
    return encoder.eval().requires_grad_(False)


def _load_mae(config: EncoderConfig):
    encoder = _read_mae(config)
    if config.preset is not None:
        _require_preset(config, encoder)
    return encoder


def _require_preset(config: EncoderConfig, encoder) -> None:
    """Raise ValueError naming the settings in which a masked autoencoder is not the configured preset; classes may differ."""
    from drift_accel.models.checks import complete_config
    from drift_accel.models.masked_autoencoder import MAE_PRESETS, MaskedAutoencoder

    wanted = complete_config(MaskedAutoencoder, MAE_PRESETS[config.preset])
    compared = wanted.keys() - {"num_classes", "input_space"}  # the space follows from the others where it is not given
    pairs = {name: (value, encoder.config[name]) for name, value in wanted.items() if name in compared}
    different = [f"{name} {there} instead of {value}" for name, (value, there) in pairs.items() if _plain(there) != _plain(value)]
    if different:
        raise ValueError(
            f"encoder.path {config.path} holds another encoder than encoder.preset {config.preset}: {', '.join(different)}; give "
            "the folder of that encoder, or set encoder.preset to null to train with this one"
        )


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


def _read_mae(config: EncoderConfig):
    from drift_accel.models.checks import complete_config
    from drift_accel.models.exports import load_export
    from drift_accel.models.masked_autoencoder import MaskedAutoencoder
    from drift_accel.models.official import load_official

    folder = Path(config.path)
    if (folder / "metadata.json").exists() and not config.random:
        encoder = load_official(folder)
        if not isinstance(encoder, MaskedAutoencoder):
            raise ValueError(f"encoder.path {folder} holds a {type(encoder).__name__}: give the folder of a masked autoencoder")
        return encoder
    if not (folder / "config.json").exists():
        raise FileNotFoundError(
            f"encoder.path {folder} has no config.json and no metadata.json: train one first "
            "(accelerate launch -m drift_accel.train_mae --config ... --output_dir RUN) and give RUN/exports/ema_..."
        )
    if config.random:
        return MaskedAutoencoder(**complete_config(MaskedAutoencoder, MaskedAutoencoder.load_config(folder)))
    return load_export(folder, MaskedAutoencoder, "encoder.path")


def _load_convnext(config: EncoderConfig):
    from drift_accel.models.convnext import load_convnext

    return load_convnext(config.path, random=config.random, **_image_size(config))


def _load_resnet(config: EncoderConfig):
    from drift_accel.models.pretrained_resnet import load_resnet

    return load_resnet(
        config.path,
        architecture=config.architecture,
        weights=config.weights,
        normalization=config.normalization or "imagenet",
        random=config.random,
        **_image_size(config),
    )


def _load_dinov2(config: EncoderConfig):
    from drift_accel.models.dinov2 import load_dinov2

    return load_dinov2(config.path, blocks=config.blocks, random=config.random, **_image_size(config))


def _load_code(config: EncoderConfig):
    from drift_accel.models.code_encoder import load_code_encoder

    return load_code_encoder(config.path)


_LOADERS = {
    "mae": _load_mae,
    "convnextv2": _load_convnext,
    "resnet": _load_resnet,
    "dinov2": _load_dinov2,
    "code": _load_code,
}


def _image_size(config: EncoderConfig) -> dict[str, int]:
    return {} if config.image_size is None else {"image_size": config.image_size}


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The VAE decoder between a generator of latents and encoders of pixels. Raises ValueError for values that cannot work."""

    vae: str | None = None
    """"digits" (bundled), a folder or a hub id: the VAE that the latents were made with; null: no decoder."""
    revision: str | None = None
    """Revision of a hub id."""
    batch: int = 8
    """Latents decoded at once; memory grows with it."""
    checkpointing: bool = True
    """Decode again in the backward pass instead of keeping activations."""
    dtype: str = "float32"
    """"float32", or "bfloat16" for convolutions and products under autocast."""
    real_images: str | None = None
    """Folder of a cache of pixels with the same rows as the latents': encoders of pixels see its pictures of real samples. null:
    real latents are decoded like generated ones."""

    def __post_init__(self):
        from drift_accel.models.vae_decoder import check_decoder_settings

        check_decoder_settings(self.batch, self.dtype)
        if self.real_images is not None and self.vae is None:
            raise ValueError(
                f"decoder.real_images is {self.real_images!r} without decoder.vae, which makes images of generated latents: "
                "set decoder.vae to the VAE that the latents were made with"
            )


def load_decoder(config: DecoderConfig, scaling=None):
    """The configured VaeDecoder, or None without a VAE; `scaling` (scale, shift) of the latents, None: the VAE's own.

    Raises what `load_vae` raises.
    """
    from drift_accel.models.autoencoder import load_vae
    from drift_accel.models.vae_decoder import VaeDecoder

    if config.vae is None:
        return None
    vae = load_vae(config.vae, revision=config.revision)
    return VaeDecoder(vae, batch=config.batch, checkpointing=config.checkpointing, dtype=config.dtype, scaling=scaling)
