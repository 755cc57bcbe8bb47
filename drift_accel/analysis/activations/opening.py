"""Models and sources of activations from wherever they lie, told apart by what is in the folder or file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from drift_accel.analysis.activations.models import ActivationModel, EdmModel, EncoderModel, GeneratorModel
from drift_accel.analysis.activations.sources import NO_LABEL, PictureSource, RowSource, SampleSource
from drift_accel.data.cache_format import MANIFEST_NAME, PIXELS
from drift_accel.data.class_table import ClassTable
from drift_accel.data.crops import ImageCrop
from drift_accel.data.digits import load_digits
from drift_accel.data.downsampled_imagenet import DownsampledImageNet, is_downsampled_imagenet
from drift_accel.data.image_sources import ImageFolder, open_image_source
from drift_accel.data.latent_cache import LatentCache
from drift_accel.data.row_encoders import weights_hash
from drift_accel.data.source_classes import require_synset_folders
from drift_accel.evaluation.picture_sources import ArrayPictures, ShardPictures
from drift_accel.foundation.run_folder import RunFolder
from drift_accel.models.autoencoder import load_vae
from drift_accel.models.bundled import BUNDLED_VAES
from drift_accel.models.edm_checkpoint import find_edm_weights, load_edm_unet
from drift_accel.models.encoder_configuration import ENCODER_KINDS, EncoderConfig, load_encoder
from drift_accel.models.official import METADATA_NAME
from drift_accel.sampling.outputs import RECORD_NAME
from drift_accel.sampling.sample_store import SETTINGS_NAME
from drift_accel.sampling.trained import align_memory, load_trained
from drift_accel.sampling.vae_choice import LatentDecoder
from drift_accel.training.trained_mae import load_trained_mae

GENERATOR, MAE, EDM, CODE = "generator", "mae", "edm", "code"
MODEL_KINDS = (GENERATOR, EDM, *ENCODER_KINDS)
DIGITS = "digits"
WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".pkl")


def model_kind(path: str) -> str:
    """Which model lies at `path`: "generator", "mae", "edm", "convnextv2", "dinov2" or "code", by what is there.

    Raises FileNotFoundError where nothing is, ValueError where it cannot be told.
    """
    place = Path(path)
    if not place.exists():
        if ":" in path:
            return CODE
        raise FileNotFoundError(
            f"{path} does not exist: give a run, an export, a checkpoint, a file of weights, or module:function"
        )
    run = place.parent.parent if place.parent.name in ("checkpoints", "exports") else place
    if (run / "config.yaml").is_file():
        configuration = RunFolder(run).read_configuration()
        if {"generator", "mae"} & configuration.keys():
            return GENERATOR if "generator" in configuration else MAE
    if (place / "model_index.json").is_file() or any(place.glob("exports/*/config.json")):
        return GENERATOR
    if (place / METADATA_NAME).is_file():
        return MAE if json.loads((place / METADATA_NAME).read_bytes()).get("kind") == MAE else GENERATOR
    if (place / "config.json").is_file():
        config = json.loads((place / "config.json").read_bytes())
        names = {"Generator": GENERATOR, "MaskedAutoencoder": MAE, "EdmUNet": EDM}
        types = {"convnextv2": "convnextv2", "dinov2": "dinov2"}
        found = names.get(config.get("_class_name")) or types.get(config.get("model_type"))
        if found:
            return found
    raise ValueError(f"{path} does not say which model it is: name it with --model_kind, one of {', '.join(MODEL_KINDS)}")


def open_model(
    path: str,
    kind: str | None = None,
    *,
    choices: Mapping[str, str | None],
    encoder_options: Mapping[str, Any],
    guidance_scale: float,
    seed: int,
    sigma: float | None,
    run_code: bool,
    device: torch.device | str,
) -> ActivationModel:
    """The model at `path` behind the methods of `ActivationModel`.

    `choices`: export, ema and step of a run; `encoder_options`: settings of EncoderConfig; `sigma`: of a UNet. Raises
    ValueError and OSError as the loaders do, and for options that belong to another kind of model.
    """
    kind = kind or model_kind(path)
    given = {name: value for name, value in choices.items() if value is not None}
    allowed = {GENERATOR: ("export", "ema", "step"), MAE: ("ema",)}.get(kind, ())
    strange = [f"--model_{name}" for name in given if name not in allowed]
    if sigma is not None and kind != EDM:
        strange.append("--sigma")
    if encoder_options and kind not in ENCODER_KINDS:
        strange.append("--encoder")
    if strange:
        raise ValueError(f"{strange[0]} does not belong to a model of kind {kind}: leave it out")
    if kind == GENERATOR:
        return GeneratorModel(load_trained(path, **given), guidance_scale=guidance_scale, seed=seed, device=device)
    if kind == EDM:
        return EdmModel(load_edm(path), {"kind": EDM, "path": str(path)}, sigma=sigma, device=device)
    if kind == MAE and not encoder_options:
        trained = load_trained_mae(path, **given)
        return EncoderModel(trained.model, {"kind": MAE, "path": trained.origin}, device)
    config = EncoderConfig(kind=kind, path=str(path), allow_code=run_code and kind == CODE, **encoder_options)
    return EncoderModel(load_encoder(config), {"kind": kind, "path": str(path), **encoder_options}, device)


def load_edm(path: str) -> nn.Module:
    """The UNet of a checkpoint. Raises as `load_edm_unet`."""
    try:
        return load_edm_unet(path)
    except ValueError as error:
        raise ValueError(f"{error}. It was taken for an EDM or DMD2 UNet: if it is none, name it with --model_kind") from None


def is_edm(path: str | Path) -> bool:
    """Whether a path is a UNet: a file of weights, DMD2's folder, or our own saved one."""
    path = Path(path)
    if path.suffix in WEIGHT_SUFFIXES:
        return True
    if path.parent.name == "checkpoints":  # of a run, whose weights have the same file name
        return False
    if (path / "config.json").is_file():
        return json.loads((path / "config.json").read_bytes()).get("_class_name") == "EdmUNet"
    return path.is_dir() and find_edm_weights(path) is not None


def open_real_source(
    path: str,
    *,
    crop: ImageCrop | None = None,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str = "label",
    label_map: Path | None = None,
    label_order: str | None = None,
    table: ClassTable | None = None,
    vae: str | None = None,
    device: torch.device | str = "cpu",
) -> PictureSource | RowSource | SampleSource:
    """The pictures or rows at `path`, which exist already: see `tools/extract_activations.py`.

    `crop` is for pictures; rows of caches and the digits are taken as they are. None leaves pictures as they are. Raises
    FileNotFoundError and ValueError as the readers of each kind do.
    """
    place = Path(path)
    if path in (DIGITS, f"{DIGITS}:train"):
        kind = "train" if path.endswith("train") else "test"
        return RowSource(load_digits(kind), f"digits, {kind}", {"rows": kind}, is_latent=False)
    if is_downsampled_imagenet(place):
        source = DownsampledImageNet(place, map_file=label_map, label_order=label_order, table=table)
        return PictureSource(source, place, crop, has_ranks=True)
    if label_map is not None or label_order is not None:
        raise ValueError(f"{path} is no downsampled ImageNet: leave --label_map and --label_order out")
    if place.suffix == ".npz" and place.is_file():
        return SampleSource(ArrayPictures(place), path, is_latent=False, crop=crop)
    if not place.is_dir():
        raise FileNotFoundError(f"{path} does not exist: give a model, a folder of pictures, a saved dataset, a cache or an .npz")
    if (place / MANIFEST_NAME).is_file():
        return _open_cache(place, vae, device)
    if (place / SETTINGS_NAME).is_file() and (place / "chunks").is_dir():
        return SampleSource(ShardPictures(place), path, is_latent=False, crop=crop)
    source = open_image_source(place, split=split, image_column=image_column, label_column=label_column)
    if not isinstance(source, ImageFolder):
        # A dataset of drawn samples lists the generator's classes; another one may list a part of ImageNet's.
        return PictureSource(source, place, crop, has_ranks=not (place / RECORD_NAME).is_file())
    is_loose = "/" not in source.name(0)  # pictures without class folders
    recorded = _class_folders(place)
    if recorded:
        source.use_classes(recorded, recorded)
    pictures = PictureSource(source, place, crop, has_ranks=not recorded and not is_loose)
    if recorded and all(key.isdecimal() for key in recorded):
        pictures.forget_keys()
    if is_loose:
        pictures.labels = np.full(len(pictures), NO_LABEL)
    return pictures


def name_classes(source: PictureSource | RowSource | SampleSource, table: ClassTable | None, model: ActivationModel) -> None:
    """Give a source the labels of the class table, or of the model's own.

    Without either, labels stay what the source says, unless its classes are synsets that do not tell them. Raises ValueError
    naming each class that the table does not have, and for a table that is not the model's.
    """
    own = model.table
    is_known = own is not None and any(entry.wnid != str(entry.index) for entry in own)
    if table is not None:
        if is_known and own.wnids != table.wnids:
            raise ValueError("--class_table is not the table of the model's classes: leave it out, or give that of its data")
        source.use_table(table)
    elif is_known or (own is not None and set(_used_ids(source)) <= set(own.wnids)):
        source.use_table(own)
    elif isinstance(source, PictureSource) and source.has_ranks:
        require_synset_folders(source.place, source.class_ids or ())


def _used_ids(source) -> list[str]:
    ids = source.class_ids
    return [] if ids is None else [ids[label] for label in np.unique(source.labels).tolist() if label >= 0]


def _class_folders(place: Path) -> list[str] | None:
    """The folder of each label, as the tool that drew samples wrote it down."""
    try:
        folders = json.loads((place / RECORD_NAME).read_bytes()).get("class_folders")
    except (OSError, ValueError, AttributeError):
        return None
    return folders if isinstance(folders, list) and folders else None


def _open_cache(place: Path, vae: str | None, device: torch.device | str) -> RowSource:
    cache = LatentCache(place)
    is_latent = cache.header.kind != PIXELS
    identity = {"header_sha256": cache.manifest.header_sha256, "shards": [shard.sha256 for shard in cache.manifest.shards]}
    decoder = _cache_decoder(cache, vae, device) if is_latent else None
    if vae is not None and not is_latent:
        raise ValueError(f"{place} holds pixels, not latents: leave --vae out")
    return RowSource(cache, str(place), identity, is_latent=is_latent, decoder=decoder)


def _cache_decoder(cache: LatentCache, name: str | None, device: torch.device | str) -> LatentDecoder | None:
    """The VAE that the cache was made with; None where it is not at hand and none was named."""
    recorded = cache.header.vae
    at_hand = recorded["name"] in BUNDLED_VAES or Path(recorded["name"]).is_dir()
    if name is None and not at_hand:
        return None
    vae = load_vae(name or recorded["name"], revision=None if name else recorded["revision"])
    digest = weights_hash(vae)
    if digest != recorded["weights_sha256"]:
        raise ValueError(f"--vae {name or recorded['name']} has other weights than the VAE of {cache.path}: give that one")
    align_memory(vae)
    scaling = (cache.header.scale, cache.header.shift)
    return LatentDecoder(
        vae=vae.to(device), name=name or recorded["name"], weights_sha256=digest, dtype="float32", batch=8, scaling=scaling
    )  # fmt: skip
