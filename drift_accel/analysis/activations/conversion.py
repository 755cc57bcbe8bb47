"""One set of activations from one file format to the other, with the same numbers, samples and pictures."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from drift_accel.analysis.activations.batches import ARROW, NPZ, SampleRecord
from drift_accel.analysis.activations.staging import StagedSet
from drift_accel.analysis.activations.store import IMAGES, ActivationSet
from drift_accel.analysis.activations.writing import BatchWriter

ROWS_AT_ONCE = 64
# Of the metadata: what belongs to the files, not to what is in them.
_LAYOUT = (
    *("format", "name", "storage", "dtype", "batch_size", "layers", "files", "num_samples", "num_non_finite", "left_out"),
    *("settings", "provenance"),
)


def convert_set(
    source: ActivationSet,
    folder: str | Path,
    name: str,
    storage: str,
    *,
    batch_size: int | None = None,
    overwrite: bool = False,
    command: Sequence[str] = (),
    log: Callable[[str], None] = print,
) -> Path:
    """Write `source` as the set `name` of `folder` in the format `storage`; returns the file that describes it.

    `batch_size`: samples a file (None: 1,024 of Arrow, 64 of npz). Resumable at any kill. Raises ValueError for the place of
    the set itself, and as `StagedSet.write`.
    """
    if (Path(folder).resolve(), name) == (source.folder.resolve(), source.name):
        raise ValueError(f"the set {name!r} of {folder} would replace itself: give another --output_dir or --name")
    dtype = source.metadata.get("dtype", "float32")
    settings = {key: value for key, value in source.metadata.items() if key not in _LAYOUT}
    settings["converted_from"] = {"name": source.name, "storage": source.metadata.get("storage", NPZ), "num_samples": len(source)}
    staged = StagedSet(
        folder,
        name,
        settings,
        shapes=source.layers,
        num_samples=len(source),
        storage=storage,
        dtype=dtype,
        batch_size=batch_size,
    )

    def copy(places: range, writer: BatchWriter, advance: Callable[[int], None]) -> list[str]:
        for start in range(places.start, places.stop, ROWS_AT_ONCE):
            rows = range(start, min(start + ROWS_AT_ONCE, places.stop))
            samples = [_record(sample, name, writer.images) for sample in source.samples(rows)]
            writer.add({layer: source.rows(layer, np.array(rows)) for layer in source.layers}, samples)
            advance(len(rows))
        return []

    size = sum(int(np.prod(shape)) for shape in source.layers.values()) * np.dtype(dtype).itemsize
    return staged.write(
        copy,
        overwrite=overwrite,
        estimated_bytes=len(source) * size,
        command=command,
        description=f"{source.name} to {storage}",
        log=log,
    )


def other_storage(source: ActivationSet) -> str:
    """The format that a set is not in."""
    return NPZ if source.metadata.get("storage", NPZ) == ARROW else ARROW


def _record(sample: dict, name: str, images: Path) -> SampleRecord:
    """The sample with its picture copied to `images`; what other tools left out is empty."""
    picture = sample.get("image_path")
    path = None
    if picture is not None:
        shutil.copyfile(picture, images / picture.name)
        path = f"{IMAGES}/{name}/{picture.name}"
    texts = {key: sample.get(key) or "" for key in ("synset_id", "class_name", "original_path")}
    return SampleRecord(class_id=sample["class_id"], image_path=path, **texts)
