"""Which real samples a run trains on, how it draws them, and what its exports say about them."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from drift_accel.data.digits import SPLITS, load_digits
from drift_accel.data.labelled_images import LabelledImages
from drift_accel.data.queue import QueueConfig, SampleQueue
from drift_accel.data.samplers import DirectSampler, draw_flips

SOURCES = ("digits",)
Source = LabelledImages


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The source of real samples. Raises ValueError for an unknown source or split."""

    source: str = "digits"
    """"digits": scikit-learn's handwritten digits, in memory."""
    split: str = "train"
    """Part of the source to train on: "train" or "test"."""
    flip: bool = False
    """Mirror each drawn image left to right with probability one half."""
    queue: QueueConfig | None = None
    """null: positives and negatives from the whole source; else the paper's queue of recent samples."""

    def __post_init__(self):
        if self.source not in SOURCES:
            raise ValueError(f"data.source is {self.source!r}: choose one of {', '.join(SOURCES)}")
        if self.split not in SPLITS:
            raise ValueError(f"data.split is {self.split!r}: choose one of {', '.join(SPLITS)}")


def open_source(config: DataConfig) -> Source:
    """Open the configured source."""
    return load_digits(config.split)


def make_sampler(config: DataConfig, source: Source, seed: int, *, positives: int, negatives: int) -> DirectSampler | SampleQueue:
    """The configured sampler of P positives and N negatives a label. Raises ValueError for queues that are too small."""
    if config.queue is None:
        return DirectSampler(source, seed, positives=positives, negatives=negatives)
    return SampleQueue(source, config.queue, seed, positives=positives, negatives=negatives)


def read_images(source: Source, rows: np.ndarray, seed: int, name: str, step: int, slots: np.ndarray, flip: bool) -> np.ndarray:
    """Images [slots, count, C, H, W] of drawn rows [slots, count]; which of them are mirrored is a function of the slot."""
    return source.rows(rows, draw_flips(seed, name, step, slots, rows.shape[1]) if flip else None)


def describe_source(source: Source) -> dict[str, Any]:
    """What an exported model keeps of the data it was trained on: the space of its images and the class table."""
    classes = [{"index": i, "id": name, "name": name} for i, name in enumerate(source.class_names)]
    space = {"kind": "pixels", "scale": None, "shift": None, "vae": None}
    return {**space, "image_shape": list(source.image_shape), "classes": classes}


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
