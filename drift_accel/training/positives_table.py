"""The table of positives around a row, in the feature space of the run's first encoder."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from drift_accel.data.class_neighbours import PositivesConfig, open_class_neighbours
from drift_accel.data.labelled_images import LabelledImages
from drift_accel.data.latent_cache import LatentCache
from drift_accel.data.samplers import NeighbourSampler
from drift_accel.data.sources import Source, source_identity
from drift_accel.data.subset import BalancedSubset
from drift_accel.drift.encoders import EncoderSpec
from drift_accel.foundation.collectives import process_index, world_group
from drift_accel.training.launch import TORCH_TYPES, place

FOLDER_NAME = "class_neighbours"
POOLED_MAP = "global_mean"  # of ConvNeXt-V2, whose last map is a deviation
# Of an encoder's configuration: where its weights lie, and what the loss does with its keys.
_NOT_OF_THE_FEATURES = ("path", "name", "weight", "allow_code", "preset")


def chosen_map(config: PositivesConfig, encoder: nn.Module) -> str:
    """The map whose mean is the feature space. Raises ValueError for one that the encoder does not have."""
    names = tuple(encoder.map_names)
    if config.map is not None and config.map not in names:
        raise ValueError(f"positives.map is {config.map!r}, but the encoder has {', '.join(names)}")
    return config.map or (POOLED_MAP if POOLED_MAP in names else names[-1])


def pooled_features(spec: EncoderSpec, images: Tensor, name: str) -> Tensor:
    """The mean over locations of one map of images [B,C,H,W], through the decoder where there is one: [B,S]."""
    seen = images if spec.decoder is None else spec.decoder(images)
    value = spec.encoder.feature_maps(seen, [name])[name]  # [B,S,h,w] or [B,T,S]
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    return value.flatten(2).mean(2) if value.ndim == 4 else value.mean(1)


def neighbour_sampler(
    config, accelerator: Accelerator, spec: EncoderSpec, source: Source, run_path: Path, identity: Mapping[str, str]
) -> NeighbourSampler:
    """Positives of a generator's run (`train.GeneratorTrainingConfig`) around a row, in the feature space of `spec`.

    Reads their table, or makes it first: rows of a class in one order whatever the number of processes. `identity` holds the
    hashes of encoder, decoder and data. Every process must call this. Raises ValueError as `chosen_map` and
    `open_class_neighbours`.
    """
    device, dtype = accelerator.device, TORCH_TYPES[config.precision]
    decoder = None if spec.decoder is None else place(spec.decoder, config, device)
    spec = replace(spec, encoder=place(spec.encoder, config, device), decoder=decoder)
    name = chosen_map(config.positives, spec.encoder)

    def extract(images: np.ndarray) -> Tensor:
        with torch.no_grad(), accelerator.autocast():
            return pooled_features(spec, torch.from_numpy(images).to(device, dtype), name)

    settings = {key: value for key, value in asdict(config.encoder).items() if key not in _NOT_OF_THE_FEATURES}
    hashes = {key: identity[key] for key in ("encoder_weights_sha256", "decoder_weights_sha256") if key in identity}
    table = open_class_neighbours(
        config.positives.folder or table_root(source, run_path),
        source,
        extract,
        choice=config.positives.choice,
        count=config.batch.positives,
        description={"map": name, "precision": config.precision, "encoder": settings, **hashes, **_rows_identity(source)},
        process_index=process_index(world_group()),
        num_processes=accelerator.num_processes,
        group=world_group(),
        log=accelerator.print,
    )
    return NeighbourSampler(source, config.seed, table, negatives=config.batch.negatives)


def table_root(source: Source, run_path: Path) -> Path:
    """Beside the rows of a cache, in the run's folder for images in memory."""
    whole = _whole(source)
    return (whole.path if isinstance(whole, LatentCache) else run_path) / FOLDER_NAME


def _rows_identity(source: Source) -> dict[str, str]:
    """What tells the rows from others: the cache's hash, or that of images in memory; and which part of them is used."""
    labels = hashlib.sha256(np.ascontiguousarray(source.labels)).hexdigest()
    hashes = source_identity(source) or {"images_sha256": hashlib.sha256(_whole(source).images).hexdigest()}
    return {**hashes, "labels_sha256": labels}


def _whole(source: Source) -> LabelledImages | LatentCache:
    return source.source if isinstance(source, BalancedSubset) else source
