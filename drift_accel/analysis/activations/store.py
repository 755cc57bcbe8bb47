"""Sets of activations on disk, opened by name: layer by layer, class by class, sample by sample.

FOLDER/activations/SET/batch_000000.arrow, or batch_000000.npz with batch_000000.json; FOLDER/images/SET/sample_000000.png;
FOLDER/metadata/SET/dataset_info.json. Shapes: N samples, D numbers a sample of a layer, (C,) pooled over space or (C, H, W).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from drift_accel.analysis.activations.batches import ARROW, NO_CLASS, SUFFIXES, ArrowBatch, BatchError, NpzBatch, open_batch

ACTIVATIONS, IMAGES, METADATA = "activations", "images", "metadata"
INFO_NAME = "dataset_info.json"
IN_PROGRESS = ".in_progress"
FORMAT = 1


class ActivationSet:
    """One opened set, real or generated, in either storage format; `open` makes it.

    Opening reads descriptions alone; Arrow batches are mapped, those of `.npz` are decompressed when they are asked for.
    """

    def __init__(self, folder: Path, name: str, metadata: dict[str, Any], batches: Sequence[NpzBatch | ArrowBatch]):
        self.folder, self.name, self.metadata = folder, name, metadata
        """Of the metadata: model, source, preprocessing, layers, classes, counts, seed."""
        self._batches = list(batches)
        self._starts = np.cumsum([0, *map(len, self._batches)])
        self.layers: dict[str, tuple[int, ...]] = self._batches[0].shapes()
        """Layer -> shape of one sample: (C,) pooled, or (C, H, W)."""

    @classmethod
    def open(cls, folder: str | Path, name: str) -> "ActivationSet":
        """The set `name` of the folder that holds activations/, images/ and metadata/.

        Raises FileNotFoundError where there is no such set (naming those there are), ValueError for one that is not finished,
        that is empty, or whose files are missing, damaged or do not belong together.
        """
        folder = Path(folder)
        place = folder / ACTIVATIONS / name
        info_path = folder / METADATA / name / INFO_NAME
        if (folder / ACTIVATIONS / f"{name}{IN_PROGRESS}").is_dir():
            raise ValueError(f"the set {name!r} of {folder} is not finished: give the command that extracts it again")
        if not place.is_dir():
            raise FileNotFoundError(f"{folder} has no set {name!r}: it has {', '.join(set_names(folder)) or 'none'}")
        try:
            metadata = json.loads(info_path.read_bytes())
        except FileNotFoundError:
            raise ValueError(f"{info_path} is missing: copy it beside the activations, or extract the set again") from None
        except ValueError as error:
            raise ValueError(f"{info_path} is no JSON ({error}): extract the set again") from None
        if metadata.get("format", FORMAT) != FORMAT:
            raise ValueError(f"{info_path} has format {metadata['format']!r}, this version reads format {FORMAT}")
        batches = _open_batches(place, metadata)
        if not sum(map(len, batches)):
            raise ValueError(f"the set {name!r} of {folder} is empty: extract at least one sample")
        for batch in batches[1:]:
            if (batch.layer_names, batch.known_shapes) != (batches[0].layer_names, batches[0].known_shapes):
                raise ValueError(
                    f"{batch.path} has the layers {batch.layer_names} of shapes {batch.known_shapes}, {batches[0].path} has "
                    f"{batches[0].layer_names} of shapes {batches[0].known_shapes}: they are not batches of one set"
                )
        return cls(folder, name, metadata, batches)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @cached_property
    def labels(self) -> np.ndarray:
        """The class of every sample, int64 [N]; -1 where it is not known."""
        return np.concatenate([batch.class_ids for batch in self._batches])

    @cached_property
    def _class_order(self) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort(self.labels, kind="stable")
        return order, self.labels[order]

    def sample(self, index: int) -> dict[str, Any]:
        """class_id, synset_id, class_name, original_path and image_path (Path, or None where no picture was kept).

        Raises IndexError for a sample that does not exist.
        """
        return self.samples([index])[0]

    def samples(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """`sample` of each of `indices`, in their order; the files are opened once."""
        indices = self._checked(indices)
        found: list[dict[str, Any]] = [{}] * len(indices)
        for batch, start, wanted in self._by_batch(indices):
            for place, stored in zip(wanted.tolist(), batch.samples((indices[wanted] - start).tolist()), strict=True):
                kept = {name: value for name, value in stored.items() if name != "batch_index"}
                path = None if kept.get("image_path") is None else self.folder / kept["image_path"]
                found[place] = {**kept, "image_path": path if path is not None and path.is_file() else None}
        return found

    def activations(self, index: int) -> dict[str, np.ndarray]:
        """All layers of one sample, each float32 of the layer's own shape. Raises IndexError."""
        return {layer: self.rows(layer, [index]).reshape(shape) for layer, shape in self.layers.items()}

    def class_names(self) -> dict[int, str]:
        """The names of the classes that have samples here, by class_id; samples of no known class have none."""
        first = np.unique(self.labels, return_index=True)
        return {
            int(label): self.sample(int(index))["class_name"] for label, index in zip(*first, strict=True) if label != NO_CLASS
        }

    def class_rows(self, label: int) -> np.ndarray:
        """The indices of one class's samples, ascending, int64; empty for a class without samples."""
        order, labels = self._class_order
        return order[np.searchsorted(labels, label) : np.searchsorted(labels, label, side="right")]

    def rows(self, layer: str, indices: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """A layer of the samples `indices` (None: all), in their order, float32 [n, D].

        A view of the mapped file where the samples lie in one piece of float32, else a copy.
        Raises ValueError for an unknown layer or indices that are no integers, IndexError for one that does not exist.
        """
        size = prod(self._shape(layer))
        if indices is None:
            return self._all_rows(layer, size)
        indices = self._checked(indices)
        rows = np.empty((len(indices), size), dtype=np.float32)
        for batch, start, wanted in self._by_batch(indices):
            _gather(batch, layer, indices[wanted] - start, rows, wanted)
        return rows

    def iterate(self, layer: str, batch_size: int = 1024) -> Iterator[np.ndarray]:
        """A layer in order, float32 [at most batch_size, D] at a time: memory holds one batch file at most.

        Raises ValueError for an unknown layer or a batch size below 1.
        """
        self._shape(layer)
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: give at least 1")
        return self._iterate(layer, batch_size)

    def _iterate(self, layer: str, batch_size: int) -> Iterator[np.ndarray]:
        waiting: list[np.ndarray] = []
        held = 0
        for batch in self._batches:
            for segment in batch.segments(layer):
                while len(segment):
                    part, segment = segment[: batch_size - held], segment[batch_size - held :]
                    waiting.append(part)
                    held += len(part)
                    if held == batch_size:
                        yield _joined(waiting)
                        waiting, held = [], 0
        if waiting:
            yield _joined(waiting)

    def _all_rows(self, layer: str, size: int) -> np.ndarray:
        if len(self._batches) == 1 and isinstance(self._batches[0], ArrowBatch):
            return self._batches[0].array(layer).astype(np.float32, copy=False)
        rows, start = np.empty((len(self), size), dtype=np.float32), 0
        for batch in self._batches:
            for segment in batch.segments(layer):
                rows[start : start + len(segment)] = segment
                start += len(segment)
        return rows

    def _shape(self, layer: str) -> tuple[int, ...]:
        if layer not in self.layers:
            raise ValueError(f"the set {self.name!r} has no layer {layer!r}: it has {', '.join(self.layers)}")
        return self.layers[layer]

    def _checked(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        indices = np.asarray(indices)
        if indices.size and indices.dtype.kind not in "iu":
            raise ValueError(f"indices are {indices.dtype}: wanted integers")
        indices = indices.astype(np.int64).reshape(-1)
        outside = indices[(indices < 0) | (indices >= len(self))]
        if len(outside):
            raise IndexError(f"sample {outside[0]} does not exist: the set {self.name!r} has {len(self)}, from 0")
        return indices

    def _by_batch(self, indices: np.ndarray) -> Iterator[tuple[NpzBatch | ArrowBatch, int, np.ndarray]]:
        """(batch, its first sample, places in `indices` of those it has, ascending by sample)."""
        order = np.argsort(indices, kind="stable")
        bounds = np.searchsorted(indices[order], self._starts)
        for batch, start, low, high in zip(self._batches, self._starts, bounds[:-1], bounds[1:], strict=False):
            if low < high:
                yield batch, int(start), order[low:high]


def set_names(folder: str | Path) -> list[str]:
    """The finished sets of a folder, sorted."""
    places = Path(folder).glob(f"{METADATA}/*/{INFO_NAME}")
    return sorted(path.parent.name for path in places if (Path(folder) / ACTIVATIONS / path.parent.name).is_dir())


def load_batch_activations(path_without_suffix: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(activations, metadata) of one batch: arrays [B, D] by layer; batch_size, layers, shapes and samples.

    `path_without_suffix` is such as data/activations/imagenet_real/batch_000000; `.npz` with `.json` is read where it is there,
    `.arrow` otherwise. Raises ValueError for a batch that is missing or damaged.
    """
    path = Path(path_without_suffix)
    if path.suffix in (".npz", ".json", ".arrow"):
        raise ValueError(f"{path}: give the batch's path without {path.suffix}")
    is_arrow = not path.with_name(f"{path.name}.npz").exists() and path.with_name(f"{path.name}.arrow").exists()
    batch = ArrowBatch(path) if is_arrow else NpzBatch(path)
    return {layer: batch.array(layer) for layer in batch.layer_names}, batch.metadata


def slice_sample(
    activations: Mapping[str, np.ndarray], metadata: Mapping[str, Any], batch_index: int
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """One sample of what `load_batch_activations` gave: its layers, each in its own shape, and what is known of it.

    Raises IndexError for a sample that the batch does not have.
    """
    if not 0 <= batch_index < metadata["batch_size"]:
        raise IndexError(f"sample {batch_index} does not exist: the batch has {metadata['batch_size']}, from 0")
    shapes = metadata.get("shapes", {})
    rows = {layer: array[batch_index] for layer, array in activations.items()}
    return {layer: row.reshape(shapes.get(layer, row.shape)) for layer, row in rows.items()}, metadata["samples"][batch_index]


def require_same_layers(first: ActivationSet, second: ActivationSet, layers: Sequence[str] | None = None) -> tuple[str, ...]:
    """The layers to compare two sets in: `layers`, or all that both have.

    Raises ValueError naming a layer that one lacks or whose shapes differ, and for sets without a common layer.
    """
    names = tuple(layers) if layers is not None else tuple(name for name in first.layers if name in second.layers)
    if not names:
        raise ValueError(
            f"the sets {first.name!r} and {second.name!r} have no layer in common: {', '.join(first.layers)} and "
            f"{', '.join(second.layers)}; extract both through the same model"
        )
    for name in names:
        shapes = first._shape(name), second._shape(name)
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"layer {name!r} has the shape {shapes[0]} in {first.name!r} and {shapes[1]} in {second.name!r}: extract both "
                "with the same model, the same preprocessing size and both pooled or both not"
            )
    return names


def _open_batches(place: Path, metadata: Mapping[str, Any]) -> list[NpzBatch | ArrowBatch]:
    """The batches that the metadata lists, or, for sets of other tools, those that lie in the folder."""
    if "files" in metadata:
        batches = [open_batch(place / entry["name"], metadata["storage"]) for entry in metadata["files"]]
        for batch, entry in zip(batches, metadata["files"], strict=True):
            if len(batch) != entry["samples"]:
                raise BatchError(f"{batch.path} has {len(batch)} samples, the metadata says {entry['samples']}: extract again")
        return batches
    found = {storage: sorted(place.glob(f"batch_*{suffixes[0]}")) for storage, suffixes in SUFFIXES.items()}
    storages = [storage for storage, paths in found.items() if paths]
    if len(storages) > 1:
        raise ValueError(f"{place} holds batches in the formats {' and '.join(storages)}: keep one of them")
    storage = storages[0] if storages else ARROW
    return [open_batch(path.with_suffix(""), storage) for path in found[storage]]


def _gather(batch: NpzBatch | ArrowBatch, layer: str, rows: np.ndarray, target: np.ndarray, places: np.ndarray) -> None:
    """target[places] = the batch's `rows` (ascending) of a layer."""
    start = low = 0
    for segment in batch.segments(layer):
        high = int(np.searchsorted(rows, start + len(segment)))
        if low < high:
            target[places[low:high]] = segment[rows[low:high] - start]
        start, low = start + len(segment), high


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return rows.astype(np.float32, copy=False)
