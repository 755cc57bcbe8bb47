"""Which real samples a run trains on, how it draws them, and what its exports say about them."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from drift_accel.data.cache_format import MANIFEST_NAME
from drift_accel.data.digits import SPLITS, load_digits
from drift_accel.data.labelled_images import LabelledImages
from drift_accel.data.latent_cache import LatentCache
from drift_accel.data.queue import QueueConfig, SampleQueue
from drift_accel.data.samplers import DirectSampler, draw_flips
from drift_accel.data.subset import BalancedSubset
from drift_accel.foundation.random_streams import random_stream
from drift_accel.foundation.storage import sha256_file

SOURCES = ("digits", "cache")
Source = LabelledImages | LatentCache | BalancedSubset


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The source of real samples. Raises ValueError for an unknown source or split, no rows, or a cache without a path."""

    known_sources = SOURCES  # without a type: no setting
    source: str = "digits"
    """"digits": scikit-learn's handwritten digits, in memory; "cache": latents or pixels written by tools/export_latents.py."""
    path: str | None = None
    """Folder of the cache; null for the digits."""
    in_memory: bool = False
    """Read the whole cache at the start instead of mapping it."""
    split: str = "train"
    """Part of the digits to train on: "train" or "test"."""
    max_rows: int | None = None
    """Train on so many rows alone, the same number of each class as far as they reach; always the same ones. null: all."""
    flip: bool = False
    """Mirror each drawn image left to right with probability one half; of latents the stored mirrored ones are read."""
    queue: QueueConfig | None = None
    """null: positives and negatives from the whole source; else the paper's queue of recent samples."""

    def __post_init__(self):
        if self.source not in self.known_sources:
            raise ValueError(f"data.source is {self.source!r}: choose one of {', '.join(self.known_sources)}")
        if self.split not in SPLITS:
            raise ValueError(f"data.split is {self.split!r}: choose one of {', '.join(SPLITS)}")
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"data.max_rows is {self.max_rows}: give at least one row a class, or null for all")
        if self.source == "cache" and not self.path:
            raise ValueError("data.path is missing: give the folder that tools/export_latents.py wrote")
        if self.source == "digits" and self.path is not None:
            raise ValueError(f"data.path is {self.path!r} but data.source is 'digits': set data.source to 'cache'")


def open_source(config: DataConfig) -> Source:
    """Open the configured source. Raises FileNotFoundError or ValueError for a folder that is no complete cache, and for
    `max_rows` below the number of classes."""
    source = _open_whole_source(config)
    return source if config.max_rows is None else BalancedSubset(source, config.max_rows)


def _open_whole_source(config: DataConfig) -> LabelledImages | LatentCache:
    if config.source == "digits":
        return load_digits(config.split)
    cache = LatentCache(config.path, in_memory=config.in_memory)
    if config.flip and not cache.has_flipped:
        raise ValueError(f"data.flip is true but {config.path} holds no mirrored latents: export it without --no_flip")
    return cache


def make_sampler(config: DataConfig, source: Source, seed: int, *, positives: int, negatives: int) -> DirectSampler | SampleQueue:
    """The configured sampler of P positives and N negatives a label. Raises ValueError for queues that are too small."""
    if config.queue is None:
        return DirectSampler(source, seed, positives=positives, negatives=negatives)
    return SampleQueue(source, config.queue, seed, positives=positives, negatives=negatives)


def read_images(source: Source, rows: np.ndarray, seed: int, name: str, step: int, slots: np.ndarray, flip: bool) -> np.ndarray:
    """Images [slots, count, C, H, W] of drawn rows [slots, count]; mirroring and posterior draws are functions of the slot."""
    flipped = draw_flips(seed, name, step, slots, rows.shape[1]) if flip else None
    if not source.is_sampled_at_read:
        return source.rows(rows, flipped)
    return source.rows(rows, flipped, [random_stream(seed, f"{name}/posterior", step, int(slot)) for slot in slots])


def describe_source(source: Source) -> dict[str, Any]:
    """What an exported model keeps of the data it was trained on: the space of its images and the class table."""
    source = source.source if isinstance(source, BalancedSubset) else source
    if isinstance(source, LabelledImages):
        ids = source.class_names
        space = {"kind": "pixels", "scale": None, "shift": None, "vae": None}
    else:
        ids, header = source.class_ids, source.header
        space = {"kind": header.kind, "scale": header.scale, "shift": header.shift, "vae": header.vae}
    classes = [{"index": i, "id": key, "name": name} for i, (key, name) in enumerate(zip(ids, source.class_names, strict=True))]
    return {**space, "image_shape": list(source.image_shape), "classes": classes}


def source_identity(source: Source) -> dict[str, str]:
    """The hash of a cache's content by name: its manifest holds the hashes of header and shards. Nothing for other sources."""
    whole = source.source if isinstance(source, BalancedSubset) else source
    return {"cache_sha256": sha256_file(whole.path / MANIFEST_NAME)} if isinstance(whole, LatentCache) else {}


def latent_scaling(source: Source) -> tuple[Any, Any] | None:
    """(scale, shift) that the source's latents were made with, numbers or one a channel; None for pixels."""
    space = describe_source(source)
    return None if space["kind"] == "pixels" else (space["scale"], space["shift"])


def require_same_space(own: dict[str, Any], other: dict[str, Any], name: str) -> None:
    """Raise ValueError where images of `other` (a `describe_source`, named `name`) are not in the space of `own`'s."""
    problems = []
    if own["kind"] != other["kind"]:
        problems.append(f"{name} was trained on {other['kind']}, the data holds {own['kind']}")
    for key in ("scale", "shift"):
        if not _close(own[key], other[key]):
            problems.append(f"{name} was trained with VAE {key} {other[key]}, the data has {own[key]}")
    mine, theirs = ((d["vae"] or {}).get("weights_sha256") for d in (own, other))
    if mine and theirs and mine != theirs:
        names = [(d["vae"] or {}).get("name") for d in (own, other)]
        problems.append(f"{name} was trained on latents of another VAE ({names[1]}), the data's is {names[0]}")
    if problems:
        raise ValueError(f"{'; '.join(problems)}. Use an encoder trained on this data's latents, or export the data again")


def _close(first, second) -> bool:
    if first is None or second is None:
        return first is second
    return np.broadcast_shapes(np.shape(first), np.shape(second)) is not None and bool(np.allclose(first, second, rtol=1e-5))
