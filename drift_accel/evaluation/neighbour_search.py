"""The whole search for memorised pictures: features of samples, training set and held-out pictures, numbers and a picture."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from drift_accel.data.latent_export import Workers
from drift_accel.evaluation.evaluate import discard
from drift_accel.evaluation.feature_network import FeatureNetwork
from drift_accel.evaluation.neighbours import Neighbours, find_neighbours, neighbour_picture, summarise
from drift_accel.foundation.provenance import collect_provenance
from drift_accel.foundation.storage import atomic_write_json
from drift_accel.sampling.grid import save_grid
from drift_accel.sampling.pictures import GeneratedPictures, PictureBatch, Pictures
from drift_accel.sampling.quantization import to_uint8
from drift_accel.sampling.sample_store import SampleStore

SHOWN_CLASSES = 10


@dataclass(frozen=True, kw_only=True)
class NeighbourConfig:
    """What is shown. Raises ValueError for counts below 1."""

    k: int = 10
    """Neighbours of each shown sample."""
    shown_per_class: int = 1
    """Samples shown of each class, the first ones."""

    def __post_init__(self):
        for name in ("k", "shown_per_class"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}: give at least 1")


def search_neighbours(
    samples: GeneratedPictures,
    training: Pictures,
    held_out: Pictures | None,
    network: FeatureNetwork,
    output: Path,
    *,
    config: NeighbourConfig | None = None,
    workers: Workers | None = None,
    command: Sequence[str] = (),
    log: Callable[[str], None] = print,
) -> dict[str, Any] | None:
    """Write OUTPUT.json and OUTPUT.png (where pixels can be had); returns the record on the main process.

    All features lie in chunks beside the output until it is written, so a killed search goes on where it was.
    Raises ValueError for too few training pictures, and as features and chunks do.
    """
    config, workers = config or NeighbourConfig(), workers or Workers()
    if len(training) < config.k:
        raise ValueError(
            f"there are {len(training)} training pictures, {config.k} neighbours were asked for: give more, or a smaller --k"
        )
    work = output.with_name(f"{output.name}.in_progress")
    sets = {"samples": samples, "training": training, **({} if held_out is None else {"held_out": held_out})}
    stores = {name: SampleStore(work / name, pictures, network) for name, pictures in sets.items()}
    for name, store in stores.items():
        store.compute(workers=workers, description=f"features of {name.replace('_', '-')}", log=log)
    if not workers.is_main:
        return None
    found = {
        name: find_neighbours(store.rows("features"), stores["training"].arrays("features"), config.k)
        for name, store in stores.items()
        if name != "training"
    }
    nearest = {name: neighbours.distances[:, 0] for name, neighbours in found.items()}
    record = {
        "protocol": network.identity(),
        "samples": samples.identity(),
        "model": dict(samples.trained.origin),
        "training": training.identity(),
        "held_out": None if held_out is None else held_out.identity(),
        "nearest_distance": summarise(nearest["samples"], nearest.get("held_out")),
        "provenance": collect_provenance(command=command),
    }
    picture = _draw(samples, training, found["samples"], config)
    if picture is not None:
        save_grid(picture, output.with_suffix(".png"))
    atomic_write_json(output.with_suffix(".json"), record)
    discard(work)
    return record


def _draw(samples: GeneratedPictures, training: Pictures, neighbours: Neighbours, config: NeighbourConfig) -> np.ndarray | None:
    chosen = shown_samples(samples.labels, config.shown_per_class)

    def pixels(pictures: Pictures, index: int) -> np.ndarray | None:
        batch = pictures.batch(range(index, index + 1))
        return batch.pixels[0] if batch.pixels is not None else _decoded(samples, batch)

    shown = [pixels(samples, index) for index in chosen]
    if any(picture is None for picture in shown):
        return None
    rows = Neighbours(distances=neighbours.distances[chosen], indices=neighbours.indices[chosen])
    return neighbour_picture(
        np.stack(shown), samples.labels[chosen], rows, lambda index: pixels(training, index), samples.trained.table
    )


def _decoded(samples: GeneratedPictures, batch: PictureBatch) -> np.ndarray | None:
    """The picture of a latent, by the samples' own decoder."""
    if samples.decoder is None:
        return None
    device = next(samples.decoder.vae.parameters()).device
    return to_uint8(samples.decoder(torch.from_numpy(batch.model_space).to(device)))[0]


def shown_samples(labels: np.ndarray, per_class: int) -> list[int]:
    """The first `per_class` samples of each of the first classes, class by class."""
    classes = sorted(set(labels.tolist()))[:SHOWN_CLASSES]
    return [index for label in classes for index in np.flatnonzero(labels == label)[:per_class].tolist()]
